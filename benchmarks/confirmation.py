"""Hold what `altgrad compare` shows of a prediction against a count of all elements.

    python -m benchmarks.confirmation [--quick]     # two minutes, from the root of the repository

Each net is trained in fp32 and fine-tuned twice, in fp32 with the twin of bf16-true, and really in
bf16. Both runs write a run file, of which `find_confirmation` finds the recipe and shows, per
layer, what was predicted and what the real run says of itself. Beside them stands what happened,
computed by `twin_runs.find_fate` from all elements of both runs, without AltGrad.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.optim import AdamW

from altgrad import UpdateMonitor
from altgrad.report import Confirmation, RunFile, find_confirmation, read
from benchmarks.paired import (
    Target,
    print_environment,
    print_table,
    print_targets,
    script_arguments,
    write_json,
)
from benchmarks.twin_runs import Fate, Run, find_fate, train
from benchmarks.twin_tasks import TASKS, World

RATES = (1e-5, 1e-4, 1e-3)
METRICS = ("frozen_frac", "progress_kept")
FROZEN = 0.99


class Case(NamedTuple):
    """A pair of runs: the net, the learning rate, what was shown, and what happened by layer."""

    net: str
    lr: float
    shown: Confirmation
    counted: dict[str, Fate]


class Figure(NamedTuple):
    """A figure of a layer: predicted by fp32, said by the real run, and counted."""

    predicted: float
    real: float
    counted: float


def fine_tune(net: nn.Module, world: World, lr: float, steps: int, folder: Path) -> Run:
    """Fine-tune a net, and write its run file; in fp32, with the twin of bf16-true.

    Args:
        net: The net, in fp32 or bf16.
        world: The data.
        lr: Learning rate of AdamW.
        steps: Number of steps.
        folder: Folder of the run file.
    """
    run = Run(net, lambda parameters: AdamW(parameters, lr=lr))
    monitor = UpdateMonitor(
        [*run.parameters.items()],
        lambda record: file.append(record.index, record, skipped={}),
        formats="e4m3fn",
        every_n_steps=10,
        recipes="bf16-true",
        strict=True,
        warn=lambda _: None,  # that bf16 loses weight decay, and keeps the second moment large
    )
    with monitor.attach(run.optimizer), RunFile.create(folder, monitor.run_header()) as file:
        train(net, world, steps, run.step)
    return run


def make_cases(name: str, rates: Iterable[float], steps: int) -> list[Case]:
    torch.manual_seed(0)
    task = TASKS[name]
    start = task.make_net()
    optimizer = AdamW(start.parameters(), 1e-3)
    train(start, task.pretraining, steps, optimizer.step)
    cases = []
    for lr in rates:
        with tempfile.TemporaryDirectory() as folder:
            fp32, bf16 = Path(folder, "fp32"), Path(folder, "bf16")
            high = fine_tune(copy.deepcopy(start), task.tuning, lr, steps, fp32)
            low = fine_tune(copy.deepcopy(start).bfloat16(), task.tuning, lr, steps, bf16)
            shown = find_confirmation(read(fp32), read(bf16))
        assert shown is not None
        assert shown.recipe == "bf16-true"
        counted = {layer: find_fate(low, high, layer) for layer in high.parameters}
        cases.append(Case(name, lr, shown, counted))
    return cases


def list_figures(cases: Iterable[Case], metric: str) -> list[Figure]:
    return [
        Figure(
            *layer.pairs[metric][:2],
            getattr(case.counted[str(layer.name)], "frozen" if metric == METRICS[0] else "kept"),
        )
        for case in cases
        for layer in case.shown.layers
    ]


def measure_error(figures: Iterable[Figure], side: str) -> float:
    """Return the mean distance of a side, ``predicted`` or ``real``, from what was counted."""
    return mean(abs(getattr(figure, side) - figure.counted) for figure in figures)


def measure_bias(figures: Iterable[Figure], side: str) -> float:
    """Return by how much a side, ``predicted`` or ``real``, is too high on average."""
    return mean(getattr(figure, side) - figure.counted for figure in figures)


def mean(numbers: Iterable[float]) -> float:
    known = [number for number in numbers if not math.isnan(number)]
    return statistics.fmean(known)


def main() -> None:
    arguments = script_arguments("Hold what compare shows against a count.").parse_args()
    torch.set_num_threads(1)
    print_environment()
    rates, steps = (RATES[1:2], 40) if arguments.quick else (RATES, 300)
    cases = [*itertools.chain(*(make_cases(name, rates, steps) for name in TASKS))]
    print()
    print_table(
        (
            *("net", "learning rate", "layers"),
            *(f"{metric}, {side}" for metric in METRICS for side in ("predicted", "real")),
            "frozen: predicted, real, both, counted",
        ),
        [
            (
                *(case.net, f"{case.lr:g}", f"{len(case.shown.layers)}"),
                *(
                    f"{measure_error(list_figures([case], metric), side):.3f}"
                    for metric in METRICS
                    for side in ("predicted", "real")
                ),
                ", ".join(
                    map(str, (*case.shown.frozen[:3], sum_frozen(list_figures([case], METRICS[0]))))
                ),
            )
            for case in cases
        ],
    )
    for metric, side in itertools.product(METRICS, ("predicted", "real")):
        every = list_figures(cases, metric)
        error, bias = measure_error(every, side), measure_bias(every, side)
        print(f"{metric}, {side}: off by {error:.3f}, bias {bias:+.3f}, {len(every)} layers")
    frozen = list_figures(cases, "frozen_frac")
    said = [each for each in frozen if each.predicted >= FROZEN]
    targets = [
        Target(
            "predicted frozen_frac is off the count by", measure_error(frozen, "predicted"), 0.03
        ),
        Target("real frozen_frac is off the count by", measure_error(frozen, "real"), 0.03),
        Target(
            f"{len(said)} layers predicted frozen: share that are not",
            sum(each.counted < FROZEN for each in said) / max(len(said), 1),
            0.05,
        ),
    ]
    print_targets(targets, ".3f")
    figures = {
        metric: [each._asdict() for each in list_figures(cases, metric)] for metric in METRICS
    }
    write_json(arguments.json, figures)


def sum_frozen(figures: Iterable[Figure]) -> int:
    return sum(figure.counted >= FROZEN for figure in figures)


if __name__ == "__main__":
    main()
