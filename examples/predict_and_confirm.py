"""Predict from one fp32 run what bf16 weights lose; then really train in bf16, and compare.

    python examples/predict_and_confirm.py      # a perceptron on digits; a minute on one core

`PrecisionMonitor` watches a run in fp32. At each step, *twins* make the same step in bf16: a small
sample of each layer, with an optimizer of its own. Then the same model is really trained in bf16,
as by `model.to(torch.bfloat16)`, and hooks that know nothing of AltGrad record which weights move.
Two remedies are tried in the same way, if their libraries are installed: torchao's AdamW with
stochastic rounding and optimi's with Kahan summation. The digits need scikit-learn.

The files in `confirming` do the work. Read them in this order: `tasks`, `real_runs`, `comparison`,
`tables`, `picture`.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder of the package `examples`

from examples.confirming.comparison import SETTINGS, do_runs
from examples.confirming.picture import save_picture
from examples.confirming.real_runs import LIBRARIES, list_remedies
from examples.confirming.tables import (
    describe_errors,
    describe_gains,
    make_layer_table,
    make_run_table,
)
from examples.confirming.tasks import Batch, Task, digits, loss_and_accuracy

__all__ = ["Batch", "Task", "digits", "loss_and_accuracy", "main"]


def main() -> None:
    """Do all runs of each setting and seed, print tables, and save the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, choices=range(1, 10), default=3, help="1 to 9")
    parser.add_argument("--steps", type=_parse_steps, default=300, help="a multiple of 10")
    parser.add_argument("--folder", type=Path, default=Path("predict-and-confirm"))
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # what Lightning and torchao say about this machine
    warnings.filterwarnings("ignore", module="pytorch_lightning")  # advice on speed
    torch.set_num_threads(1)  # quickest for tensors of this size

    for name in LIBRARIES.keys() - list_remedies():
        print(f"{name} is left out: it needs pip install {LIBRARIES[name].package}")
    results = {}
    for setting in SETTINGS:
        print(f"{setting.name}: in fp32 with a monitor, then really in bf16 …", flush=True)
        folder = arguments.folder / setting.name.replace(", ", "-").replace(" ", "-")
        results[setting.name] = [
            do_runs(setting, seed, arguments.steps, folder / f"seed-{seed}")
            for seed in range(arguments.seeds)
        ]
    path = arguments.folder / "predicted.png"
    save_picture(results, path)
    Console(width=100).print(
        make_layer_table(results, "frozen_frac", "Weights that never move in bf16"),
        make_layer_table(results, "progress_kept", "Progress of fp32 that bf16 keeps"),
        make_run_table(results),
    )
    print(describe_errors(results), describe_gains(results), f"Picture: {path}", sep="\n\n")


def _parse_steps(text: str) -> int:
    """Return a number of steps, the last of which is observed: each tenth one is.

    Raises:
        ArgumentTypeError: The number is no positive multiple of 10.
    """
    if int(text) < 1 or int(text) % 10:
        raise argparse.ArgumentTypeError(f"{text}: expected a multiple of 10, such as 300")
    return int(text)


if __name__ == "__main__":
    main()
