"""Compare what twins predict with runs that really store weights in low precision.

    python -m benchmarks.twins [--quick]       # three minutes, from the root of the repository

A twin stores a sample of each layer as a recipe says, and makes every step of an fp32 run. For each
architecture, a net is trained in fp32. It is then fine-tuned twice: in fp32 with twins, and really
stored as the recipe says. `twin_runs` does both. The table shows predicted / real, as means over
layers:

- without a mark, for a real run that computes its own gradients;
- **fed**, for an fp32 run that takes the gradients of the real run;
- **now**, for the real run itself, as a monitor of it says.

The target for `frozen_frac` counts only layers with at least 64 sampled elements that move. Runs in
fp16-true have a table of their own, since they end in NaN.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from scipy.stats import spearmanr
from torch import nn
from torch.optim import SGD, AdamW

from benchmarks.paired import (
    Target,
    print_environment,
    print_table,
    print_targets,
    script_arguments,
    write_json,
)
from benchmarks.twin_runs import Comparison, Fate, Layer, compare, train
from benchmarks.twin_tasks import TASKS, Task

Sides = tuple[str, str]
SEPARATE, FED = ("predicted", "real"), ("fed", "real_fed")  # attributes of a `Layer`
NOW = ("now", "real_fed")
FEWEST_MOVED = 64
"""Fewest sampled elements that move, for a layer whose frozen_frac is held to its target."""
PRETRAINING_RATE = 1e-3
OPTIMIZERS = {"AdamW": AdamW, "SGD": partial(SGD, momentum=0.9)}


class Case(NamedTuple):
    """A way to train, and the recipe that a twin predicts and a real run follows.

    Attributes:
        recipe: Short name of the recipe.
        optimizer: Name in `OPTIMIZERS`.
        lr: Learning rate.
        is_tuned: True to fine-tune the pretrained net on new data, False to train from the start.
    """

    recipe: str
    optimizer: str
    lr: float
    is_tuned: bool = True


CASES = (
    Case("bf16-true", "AdamW", 1e-3, is_tuned=False),
    *(Case("bf16-true", "AdamW", lr) for lr in (1e-5, 1e-4, 3e-4, 1e-3)),
    Case("bf16-true", "SGD", 3e-3),
    *(Case(recipe, "AdamW", 1e-4) for recipe in ("bf16", "bf16-sr")),
)
QUICK_CASES = tuple(case for case in CASES if case.is_tuned and case.lr in (1e-4, 1e-3))
FP16 = Case("fp16-true", "AdamW", 1e-4)  # with eps=1e-8, which is 0 in fp16


class Row(NamedTuple):
    net: str
    case: Case
    outcome: Comparison


def make_rows(name: str, task: Task, cases: Iterable[Case], steps: int) -> list[Row]:
    torch.manual_seed(0)
    fresh = task.make_net()
    tuned = copy.deepcopy(fresh)
    optimizer = AdamW(tuned.parameters(), PRETRAINING_RATE)
    train(tuned, task.pretraining, steps, optimizer.step)

    def do(case: Case, steps: int) -> Row:
        def make(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
            return OPTIMIZERS[case.optimizer](parameters, lr=case.lr)

        start, world = (tuned, task.tuning) if case.is_tuned else (fresh, task.pretraining)
        return Row(name, case, compare(start, world, make, case.recipe, steps))

    return [*(do(case, steps) for case in cases), do(FP16, steps // 10)]


# --- tables


def mean(numbers: Iterable[float]) -> float:
    known = [number for number in numbers if not math.isnan(number)]
    return statistics.fmean(known) if known else math.nan


def layer_mean(row: Row, side: str, figure: str) -> float:
    return mean(getattr(getattr(layer, side), figure) for layer in row.outcome.layers)


def print_rows(rows: Sequence[Row]) -> None:
    def pair(row: Row, sides: Sides, figure: str) -> str:
        both = [layer_mean(row, side, figure) for side in sides]
        return " / ".join("–" if math.isnan(each) else f"{each:.3f}" for each in both)

    header = ("net", "run", "lr", "recipe", "loss fp32 / low", "frozen_frac", "progress_kept")
    cells = [
        (
            *(row.net, ("tuned, " if row.case.is_tuned else "") + row.case.optimizer),
            *(f"{row.case.lr:g}", row.case.recipe),
            f"{row.outcome.loss:.3f} / {row.outcome.low_loss:.3f}",
            *(pair(row, SEPARATE, figure) for figure in ("frozen", "kept")),
            pair(row, FED, "kept"),
            *(pair(row, sides, "v_ratio") for sides in (SEPARATE, FED)),
        )
        for row in rows
    ]
    print()
    print_table((*header, "fed", "exp_avg_sq_ratio", "fed"), cells)


def print_fp16(rows: Sequence[Row]) -> None:
    cells = [
        (
            *(row.net, *(f"{layer_mean(row, side, 'nonfinite'):.3f}" for side in SEPARATE)),
            f"{row.outcome.low_loss:.3f}",
        )
        for row in rows
    ]
    print()
    print_table(("fp16-true", "twin_nonfinite_frac", "not finite for real", "loss"), cells)


class Pooled(NamedTuple):
    """A figure of many layers: means predicted and real, and how far these are apart.

    Attributes:
        layers: Number of layers with both values.
        predicted: Mean of the predicted values.
        real: Mean of the real values.
        off: Mean of abs(predicted - real).
        bias: Mean of predicted - real.
        spearman: Rank correlation of predicted and real values.
    """

    layers: int
    predicted: float
    real: float
    off: float
    bias: float
    spearman: float


def pool(layers: Sequence[Layer], sides: Sides, read: Callable[[Fate], float]) -> Pooled:
    each = [[getattr(layer, side) for side in sides] for layer in layers]
    pairs = [tuple(map(read, fates)) for fates in each if None not in fates]
    known = [pair for pair in pairs if not any(map(math.isnan, pair))]
    predicted, real = zip(*known, strict=True)
    return Pooled(
        *(len(known), mean(predicted), mean(real)),
        mean(abs(a - b) for a, b in known),
        mean(a - b for a, b in known),
        float(spearmanr(predicted, real).statistic),
    )


def octaves(fate: Fate) -> float:
    return math.log2(fate.v_ratio)


def pool_all(layers: Sequence[Layer]) -> dict[str, Pooled]:
    many = [layer for layer in layers if layer.moved >= FEWEST_MOVED]
    return {
        f"frozen_frac, {FEWEST_MOVED} and more moved": pool(many, SEPARATE, lambda x: x.frozen),
        "frozen_frac, all layers": pool(layers, SEPARATE, lambda x: x.frozen),
        "progress_kept": pool(layers, SEPARATE, lambda x: x.kept),
        "exp_avg_sq_ratio, octaves": pool(layers, SEPARATE, octaves),
        "frozen_frac, fed": pool(layers, FED, lambda x: x.frozen),
        "progress_kept, fed": pool(layers, FED, lambda x: x.kept),
        "exp_avg_sq_ratio, fed, octaves": pool(layers, FED, octaves),
        "frozen_frac, now": pool(layers, NOW, lambda x: x.frozen),
        "progress_kept, now": pool(layers, NOW, lambda x: x.kept),
        "exp_avg_sq_ratio, now, octaves": pool(layers, NOW, octaves),
    }


def find_targets(
    pooled: dict[str, Pooled], layers: Sequence[Layer], fp16: Sequence[Row]
) -> list[Target]:
    apart = [abs(octaves(x.fed) - octaves(x.real_fed)) for x in layers]
    known = [each for each in apart if not math.isnan(each)]
    missed = [
        row.net
        for row in fp16
        if math.isfinite(row.outcome.low_loss)
        or not any(layer.predicted.nonfinite > 0 for layer in row.outcome.layers)
    ]
    kept = pooled["progress_kept"]
    return [
        Target(
            f"frozen_frac is off by, in layers of which {FEWEST_MOVED} sampled elements move",
            pooled[f"frozen_frac, {FEWEST_MOVED} and more moved"].off,
            0.03,
        ),
        Target("progress_kept, fed, is off by", pooled["progress_kept, fed"].off, 0.05),
        Target("progress_kept, now, is off by", pooled["progress_kept, now"].off, 0.05),
        Target("frozen_frac, now, is off by", pooled["frozen_frac, now"].off, 0.03),
        Target(
            "layers whose exp_avg_sq_ratio, fed, is off by more than 0.1 octaves, share of",
            sum(each > 0.1 for each in known) / len(known),
            0.05,
        ),
        Target(f"1 − Spearman of progress_kept over {kept.layers} layers", 1 - kept.spearman, 0.1),
        Target("nets whose fp16-true does not end in NaN, or without a sign", len(missed), 0),
    ]


def main() -> None:
    arguments = script_arguments("Hold what twins predict against real runs.").parse_args()
    torch.set_num_threads(1)
    print_environment()
    cases, steps = (QUICK_CASES, 30) if arguments.quick else (CASES, 300)
    rows = [row for name, task in TASKS.items() for row in make_rows(name, task, cases, steps)]
    fp16 = [row for row in rows if row.case is FP16]
    print_rows([row for row in rows if row.case is not FP16])
    print_fp16(fp16)
    ranked = [row for row in rows if row.case.recipe == "bf16-true"]
    layers = [layer for row in ranked for layer in row.outcome.layers]
    pooled = pool_all(layers)
    print()
    print_table(
        ("all runs in bf16-true", "layers", "predicted", "real", "off by", "bias", "Spearman"),
        [
            (
                *(name, f"{each.layers}", *(f"{x:.3f}" for x in each[1:4])),
                *(f"{each.bias:+.3f}", f"{each.spearman:.3f}"),
            )
            for name, each in pooled.items()
        ],
    )
    single = [pool(row.outcome.layers, SEPARATE, lambda x: x.kept).spearman for row in ranked]
    print(
        f"\nSpearman of progress_kept within a run: {min(single):.2f} to {max(single):.2f}, "
        f"median {statistics.median(single):.2f}"
    )
    targets = find_targets(pooled, layers, fp16)
    print_targets(targets, ".3f")
    write_json(
        arguments.json,
        {
            "rows": [
                {"net": row.net, **row.case._asdict(), **layer_figures(layer)}
                for row in rows
                for layer in row.outcome.layers
            ],
            "pooled": {name: each._asdict() for name, each in pooled.items()},
            "targets": [target._asdict() for target in targets],
        },
    )


def layer_figures(layer: Layer) -> dict[str, object]:
    sides = {side: getattr(layer, side) for side in (*SEPARATE, *FED, "now")}
    figures = {side: fate._asdict() for side, fate in sides.items() if fate is not None}
    return {"layer": layer.name, "moved": layer.moved, **figures}


if __name__ == "__main__":
    main()
