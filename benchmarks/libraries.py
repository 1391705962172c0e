"""Compare what twins predict of other libraries' optimizers with real runs of these optimizers.

    python -m benchmarks.libraries [--quick]      # two minutes, from the root of the repository

Needs the libraries: ``pip install -c constraints.txt -e ".[optimizers]"``; a missing one is left
out. For each net, recipe and learning rate, `library_runs.compare` fine-tunes a pretrained net in
fp32 with a twin, and really with the library's optimizer. The table shows predicted / real, as
means over the layers of 1,024 and more elements. Twins are *fed* with the gradients of the real
run, except in the column *separate*, in which they never see that run.
"""

from __future__ import annotations

import copy
import importlib.util
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.optim import AdamW

from benchmarks.library_runs import LIBRARIES, Comparison, Fate, Layer, compare
from benchmarks.paired import (
    Target,
    print_environment,
    print_table,
    print_targets,
    script_arguments,
    write_json,
)
from benchmarks.twin_runs import train
from benchmarks.twin_tasks import TASKS

NETS, RATES = ("perceptron", "transformer"), (1e-5, 1e-3)
ELEMENTS = 1024  # four blocks of states in 8 bits
EMBEDDING = "symbols.weight"
"""A layer most of whose drift in E4M3 is that of a few elements, which a sample may not have."""
FEWEST = 1024
"""Fewest elements of a layer that counts: what random rounding does to fewer is luck."""


class Row(NamedTuple):
    net: str
    recipe: str
    lr: float
    outcome: Comparison

    @property
    def layers(self) -> list[Layer]:
        return [layer for layer in self.outcome.layers if layer.numel >= FEWEST]


def make_rows(recipes: Sequence[str], rates: Sequence[float], steps: int) -> list[Row]:
    rows = []
    for net in NETS:
        torch.manual_seed(0)
        start = TASKS[net].make_net()
        train(start, TASKS[net].pretraining, steps, AdamW(start.parameters(), 1e-3).step)
        for recipe in recipes:
            for lr in rates:
                outcome = compare(
                    copy.deepcopy(start), TASKS[net].tuning, recipe, lr, steps, ELEMENTS
                )
                rows.append(Row(net, recipe, lr, outcome))
    return rows


def print_rows(rows: Sequence[Row]) -> None:
    def pair(row: Row, sides: tuple[str, str], figure: str) -> str:
        means = [
            statistics.fmean(getattr(getattr(layer, side), figure) for layer in row.layers)
            for side in sides
        ]
        return " / ".join(f"{each:.3f}" for each in means)

    fed, separate = ("fed", "real_fed"), ("predicted", "real")
    header = ("net", "recipe", "lr", "loss fp32 / real", "moved", "separate", "progress_kept")
    print()
    print_table(
        (*header, "drift", "exp_avg_ratio", "exp_avg_sq_ratio"),
        [
            (
                *(row.net, row.recipe, f"{row.lr:g}"),
                f"{row.outcome.loss:.3f} / {row.outcome.low_loss:.3f}",
                *(pair(row, sides, "moved") for sides in (fed, separate)),
                *(pair(row, fed, each) for each in ("kept", "drift", "m_ratio", "v_ratio")),
            )
            for row in rows
        ],
    )


def mean_error(rows: Sequence[Row], read: Callable[[Fate], float], without: str = "") -> float:
    layers = [layer for row in rows for layer in row.layers if layer.name != without]
    return statistics.fmean(abs(read(x.fed) - read(x.real_fed)) for x in layers)


def find_targets(rows: Sequence[Row]) -> list[Target]:
    targets = []
    for recipe in dict.fromkeys(row.recipe for row in rows):
        own = [row for row in rows if row.recipe == recipe]
        fast = [row for row in own if row.lr >= 1e-3]
        targets += [
            Target(f"{recipe}: moved share is off by", mean_error(own, lambda x: x.moved), 0.02),
            Target(
                f"{recipe}: drift is off by, 1e-3, without the embedding",
                mean_error(fast, lambda x: x.drift, EMBEDDING),
                0.05,
            ),
            Target(f"{recipe}: m ratio is off by", mean_error(own, lambda x: x.m_ratio), 0.02),
            Target(f"{recipe}: v ratio is off by", mean_error(own, lambda x: x.v_ratio), 0.02),
        ]
    return targets


def main() -> None:
    description = "Hold what twins predict of other libraries' optimizers against real runs."
    arguments = script_arguments(description).parse_args()
    torch.set_num_threads(1)
    print_environment()
    found = [
        name
        for name, library in LIBRARIES.items()
        if importlib.util.find_spec(library.module.partition(".")[0])
    ]
    print(f"left out, not installed: {', '.join(LIBRARIES.keys() - {*found}) or 'none'}")
    rows = make_rows(found, RATES[1:] if arguments.quick else RATES, 15 if arguments.quick else 60)
    print_rows(rows)
    targets = find_targets(rows)
    print_targets(targets, ".3f")
    write_json(
        arguments.json,
        {
            "rows": [
                {
                    "net": row.net,
                    "recipe": row.recipe,
                    "lr": row.lr,
                    "layer": layer.name,
                    **{side: getattr(layer, side)._asdict() for side in layer._fields[2:]},
                }
                for row in rows
                for layer in row.layers
            ],
            "targets": [target._asdict() for target in targets],
        },
    )


if __name__ == "__main__":
    main()
