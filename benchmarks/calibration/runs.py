"""Do the runs that the verdicts are calibrated and tested on, and write a row for each.

    python -m benchmarks.calibration.runs [--processes 2]     # 30 minutes on two cores

Run it from the root of the repository. For each task, optimizer and learning rate, an
`UpdateMonitor` observes one run in fp32, which predicts. The run is then repeated with a
`WeightStorage`, for each format and way of rounding, to see what is true. A row of `runs.csv` has
the prediction and the result for a model. A row of `layers.csv` has them for a layer, in the runs
that round to nearest.
"""

from __future__ import annotations

import argparse
import csv
import math
import multiprocessing
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from altgrad import StepRecord, UpdateMonitor, WeightStorage
from benchmarks.calibration.tasks import CALIBRATION, HELD_OUT, OPTIMIZERS, TASKS, Config
from examples.predict_and_confirm import WAYS, Task, Updates, loss_and_accuracy

FOLDER = Path(__file__).parent
FORMATS = ("fp16", "bf16", "e3m4", "e4m3fn", "e5m2", "mxfp4")
UNSCALED = ("e3m4", "e4m3fn", "e5m2")
REMEDIED = ("bf16", "e4m3fn", "e5m2")
"""Formats that are also stored with stochastic rounding and Kahan summation."""
OBSERVED = 10
"""Interval between observed steps, in steps."""

METRICS = {
    "kept": "kept_update_ratio",
    "stall": "stall_frac",
    "never_moved": "never_moved_frac",
    "underflow": "underflow_frac",
    "saturated": "saturated_frac",
}
Row = dict[str, Any]


def plans() -> list[tuple[str, str, str]]:
    """Return format, scaling and way of rounding of each run that is repeated."""
    scaled = [(format, "tensor", "nearest") for format in FORMATS]
    unscaled = [(format, "none", "nearest") for format in UNSCALED]
    ways = [way for way in WAYS if way != "nearest"]
    return scaled + unscaled + [(format, "tensor", way) for format in REMEDIED for way in ways]


def make_rows(config: Config) -> tuple[list[Row], list[Row]]:
    """Do all runs of one way to train.

    Args:
        config: The way to train.

    Returns:
        A row for each run in a format; and one for each layer of those that round to nearest.
    """
    torch.set_num_threads(1)
    task = TASKS[config.task]()
    with torch.no_grad():
        initial = loss_and_accuracy(task.model(), task.training)[0].item()
    fp32, predicted = watch(task, config)
    runs: list[Row] = []
    layers: list[Row] = []
    for format, scaling, way in plans():
        which = {**config._asdict(), "format": format, "scaling": scaling, "way": way}
        loss, updates = store(task, config, format, scaling, way)
        figures = predicted[scaling][format]
        truth = {"true_stall": updates.stall(), "true_never_moved": updates.never_moved()}
        losses = {"initial": initial, "fp32": fp32, "loss": loss}
        runs.append(which | figures[None] | truth | losses)
        if way == "nearest":
            layers += [
                which
                | {"layer": name, "elements": parameter.numel(), "dims": parameter.dim()}
                | {key: value for key, value in figures[name].items() if key in METRICS}
                | {"true_stall": updates.stall(name)}
                | {"true_never_moved": updates.never_moved(name)}
                for name, parameter in updates.parameters.items()
            ]
    return runs, layers


def watch(task: Task, config: Config) -> tuple[float, dict[str, dict[str, dict[Any, Row]]]]:
    """Do the run in fp32, and predict the others from it.

    Args:
        task: The task.
        config: The way to train.

    Returns:
        The loss after training; and figures by scaling, format and layer, where None stands for
        the model.
    """
    net = task.model()
    optimizer = OPTIMIZERS[config.optimizer](net, config.lr)
    records: dict[str, list[StepRecord]] = {"tensor": [], "none": []}
    monitors = [
        UpdateMonitor(
            net,
            records[scaling].append,
            formats=formats,
            scaling=None if scaling == "none" else "tensor",
            every_n_steps=OBSERVED,
            max_elements=None,
            strict=True,
        ).attach(optimizer)
        for scaling, formats in (("tensor", FORMATS), ("none", UNSCALED))
    ]
    loss = train(net, optimizer, task)
    for monitor in monitors:
        monitor.detach()
    names = [name for name, _ in net.named_parameters()]
    predicted = {
        scaling: {
            format: {
                None: _figures([r.model for r in observed], format),
                **{n: _figures([r.layers[n] for r in observed], format) for n in names},
            }
            for format in (FORMATS if scaling == "tensor" else UNSCALED)
        }
        for scaling, observed in records.items()
    }
    return loss, predicted


def store(task: Task, config: Config, format: str, scaling: str, way: str) -> tuple[float, Updates]:
    """Repeat a run with weights that are stored in a format.

    Args:
        task: The task.
        config: The way to train.
        format: Name of the format.
        scaling: ``"tensor"`` or ``"none"``.
        way: Name of the way of rounding in `WAYS`.

    Returns:
        The loss after training, and counts of the updates that stalled.
    """
    net = task.model()
    optimizer = OPTIMIZERS[config.optimizer](net, config.lr)
    storage = WeightStorage(format, None if scaling == "none" else "tensor", **WAYS[way])
    updates = Updates(net)
    updates.attach(optimizer, storage)
    return train(net, optimizer, task), updates


def train(net: nn.Module, optimizer: torch.optim.Optimizer, task: Task) -> float:
    """Train a net, and return its loss afterwards on fixed examples of the training set.

    Args:
        net: The net.
        optimizer: Its optimizer.
        task: The task with the batches.
    """
    for batch in task.batches:
        optimizer.zero_grad()
        loss, _ = loss_and_accuracy(net, batch)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return loss_and_accuracy(net, task.training)[0].item()


def _figures(observed: Iterable[Mapping[str, float]], format: str) -> Row:
    """Return figures as verdicts use them: means over the steps, and the last never_moved_frac.

    ``kept_by_energy`` is the mean of kept_update_ratio with each step weighed by Σ update².

    Args:
        observed: Figures of each observed step.
        format: Name of the format.
    """
    each = [*observed]
    values = {key: [f[f"{metric}/{format}"] for f in each] for key, metric in METRICS.items()}
    means = {key: _mean([*filter(math.isfinite, of_key)]) for key, of_key in values.items()}
    known = [k for k, kept in enumerate(values["kept"]) if math.isfinite(kept)]
    energies = [each[k]["update_rms"] ** 2 for k in known]
    by_energy = sum(values["kept"][k] * e for k, e in zip(known, energies, strict=True))
    return means | {
        "never_moved": values["never_moved"][-1],
        "kept_by_energy": by_energy / sum(energies) if sum(energies) else math.nan,
    }


def _mean(values: list[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def write(path: Path, rows: list[Row]) -> None:
    """Write rows to a CSV file, with six digits: more would differ on another processor.

    Args:
        path: The file.
        rows: One or more rows with the same keys.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0]], lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()}
            for row in rows
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the rows go")
    arguments = parser.parse_args()
    configs = [*CALIBRATION, *HELD_OUT]
    runs: list[Row] = []
    layers: list[Row] = []
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        for config, (of_run, of_layers) in zip(configs, pool.imap(make_rows, configs), strict=True):
            print(*config, flush=True)
            runs += of_run
            layers += of_layers
            write(arguments.folder / "runs.csv", runs)
            write(arguments.folder / "layers.csv", layers)


if __name__ == "__main__":
    main()
