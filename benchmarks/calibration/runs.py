"""Do the runs that the verdicts are calibrated and tested on, and write a row for each.

    python -m benchmarks.calibration.runs calibration     # 40 minutes on two cores
    python -m benchmarks.calibration.runs held_out        # 30 minutes

Run it from the root of the repository. Of each way to train, one run is done in fp32, whose twins
predict. The run is then repeated in each of the `ways`, to see what is true. A row of the
``…_runs.csv`` has the prediction and the result for a model, a row of the ``…_layers.csv`` for a
layer. `calibrate` reads them.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import multiprocessing
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from altgrad import Figures, Recipe, StepRecord, UpdateMonitor
from benchmarks.calibration.configs import PARTS, Config, make_optimizer
from benchmarks.calibration.tasks import TASKS, Data
from benchmarks.calibration.truth import find_state_ratio, find_truth, join
from benchmarks.calibration.ways import FORMATS, WAYS, Way
from benchmarks.twin_runs import Run
from examples.predict_and_confirm import Batch, loss_and_accuracy

FOLDER = Path(__file__).parent
DECAY = 0.99
"""Decay of the average of the weights that the runs in fp32 keep, twice: in fp32 and in bf16."""
AVERAGE = Recipe("ema-bf16", states={"average": "bf16"})
TWIN_METRICS = {
    "kept": "progress_kept",
    "window_kept": "window_progress_kept",
    "drift": "drift",
    "frozen": "frozen_frac",
    "still": "still_frac",
    "step": "step_projection",
    "decay": "decay_projection",
    "nonfinite": "twin_nonfinite_frac",
}
STEP_METRICS = {
    "step_kept": "kept_update_ratio",
    "step_stall": "stall_frac",
    "step_never_moved": "never_moved_frac",
    "underflow": "underflow_frac",
    "saturated": "saturated_frac",
}
"""Metrics of single steps: columns with their means over the observed steps."""
LAYER_COLUMNS = (
    *Config._fields,
    *("way", "scaling", "layer", "elements"),
    *("kept", "kept_error", "drift", "frozen", "frozen_error"),
    *("nonfinite", "v_ratio", "step_kept", "step_never_moved"),
    *("now_kept", "now_frozen", "real_kept", "real_frozen", "fp32_moved", "real_v_ratio", "energy"),
)
"""Columns of the rows of layers."""
_SQUARES, _MOMENTS = ("exp_avg_sq", "square_avg"), ("exp_avg", "momentum_buffer")
Row = dict[str, Any]


class Watched(NamedTuple):
    """A finished run with the records of its monitor."""

    run: Run
    net: nn.Module
    records: Sequence[StepRecord]


def make_rows(config: Config) -> tuple[list[Row], list[Row]]:
    """Do all runs of one way to train.

    Args:
        config: The way to train.

    Returns:
        A row for each run in low precision, and one for each of its layers.
    """
    torch.set_num_threads(1)
    task = TASKS[config.task]
    start = task.make_start(config.seed, is_tuned=config.start == "tuned")
    data = task.draw(config.seed, config.steps, config.start == "tuned")
    ways = [way for way in WAYS[config.ways] if way.suits(config)]
    tensor, none = ([w for w in ways if w.scaling == scaling] for scaling in ("tensor", "none"))
    high, average = predict(config, start, data, tensor)
    predicted = {"tensor": high}
    if none:
        predicted["none"] = predict(config, start, data, none)[0]
    losses = {"initial": measure_loss(start, data.training)}
    losses["fp32"] = measure_loss(high.net, data.training)
    runs, layers = [], []
    for way in ways:
        own, own_layers = repeat(config, way, start, data, predicted[way.scaling])
        runs.append(config._asdict() | own | losses)
        layers += [config._asdict() | each for each in own_layers]
    if config.ways == "real":
        runs.append(config._asdict() | losses | average)
    return runs, layers


# --- the run in fp32


def predict(
    config: Config, start: nn.Module, data: Data, ways: Sequence[Way]
) -> tuple[Watched, Row]:
    """Do the run in fp32, with a twin for each way in which it will be repeated.

    Args:
        config: The way to train.
        start: The net at the start.
        data: The data.
        ways: The ways, all with the same scaling.

    Returns:
        The run; and the row of an average of its weights that is kept in bf16.
    """
    net = copy.deepcopy(start)
    run = Run(net, lambda parameters: make_optimizer(config, parameters))
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    averaged.update_parameters(net)
    low = {name: each.detach().bfloat16() for name, each in net.named_parameters()}
    recipes = [*(way.recipe for way in ways), *([AVERAGE] if config.ways == "real" else ())]
    names = {str(way.recipe.weights) for way in ways}
    formats = [format for format in FORMATS if format in names]
    scaling = None if ways[0].scaling == "none" else "tensor"
    records: list[StepRecord] = []
    monitor = UpdateMonitor(
        net,
        records.append,
        formats=formats,
        scaling=scaling,
        every_n_steps=lambda index: is_observed(config, index),
        max_elements=None,
        recipes=recipes,
        strict=True,
    ).watch_average(averaged)

    def step() -> None:
        run.step()
        averaged.update_parameters(net)
        for name, weights in run.parameters.items():
            low[name] = low[name].float().lerp(weights.detach(), 1 - DECAY).bfloat16()

    with monitor.attach(run.optimizer):
        train(config, run, net, data, step)
    return Watched(run, net, records), describe_average(averaged.module, low, data, records)


def describe_average(
    high: nn.Module,
    low: Mapping[str, Tensor],
    data: Data,
    records: Sequence[StepRecord],
) -> Row:
    """Compare the averages of the weights in bf16 and in fp32, with what the twin predicts.

    Args:
        high: The net with the averages in fp32.
        low: The averages in bf16, by name of the layer.
        data: The data.
        records: Records of the run, whose last one is predicted from.
    """
    stored = copy.deepcopy(high)
    apart, size = 0.0, 0.0
    with torch.no_grad():
        for name, parameter in stored.named_parameters():
            apart += (parameter.double() - low[name].double()).square().sum().item()
            size += parameter.double().square().sum().item()
            parameter.copy_(low[name])
    figures = records[-1].model
    return {
        "way": AVERAGE.name,
        "family": "average",
        "scaling": "tensor",
        "m_error": figures.get(f"average_error/{AVERAGE.name}", math.nan),
        "real_m_error": math.sqrt(apart / size),
        "fp32": measure_loss(high, data.training),
        "loss": measure_loss(stored, data.training),
    }


# --- the repeats


def repeat(
    config: Config, way: Way, start: nn.Module, data: Data, high: Watched
) -> tuple[Row, list[Row]]:
    """Repeat a run in low precision, and compare it with the prediction.

    Args:
        config: The way to train.
        way: The way to repeat it.
        start: The net at the start.
        data: The data.
        high: The run in fp32.

    Returns:
        The row of the model and those of its layers.
    """
    net = copy.deepcopy(start)
    made: list[Any] = [*way.start(config, net)]
    net = made[0]
    low = Run(net, lambda _: made[1])
    records: list[StepRecord] = []
    is_low = config.ways == "real" and way.family not in ("states", "control")
    if is_low:
        with watch_now(config, low, records):
            train(config, low, net, data, low.step)
    else:
        train(config, low, net, data, low.step)
    which = {"way": way.recipe.name, "family": way.family, "scaling": way.scaling}
    truths = {name: find_truth(low, high.run, name) for name in high.run.parameters}
    squares = "" if way.recipe.optimizer is not None else find_state(high, _SQUARES)

    def describe(name: str | None) -> Row:
        truth = join(truths.values()) if name is None else truths[name]
        ratio = find_state_ratio(low, high.run, name, squares) if squares else math.nan
        now = read_twin(records[-1], name, "now", "now_") if records else {}
        return (
            which
            | read_twin(high.records[-1], name, way.recipe.name)
            | read_states(high, name, way.recipe.name)
            | read_steps(high.records, name, str(way.recipe.weights))
            | {f"now_{key}": now.get(f"now_{key}", math.nan) for key in ("kept", "frozen", "still")}
            | truth.figures()
            | {"real_v_ratio": ratio, "real_m_error": math.nan}
        )

    total = math.fsum(truth.energy for truth in truths.values())
    rows = [
        describe(name)
        | {
            "layer": name,
            "elements": parameter.numel(),
            "energy": truths[name].energy / total if total else math.nan,
        }
        for name, parameter in high.run.parameters.items()
    ]
    return describe(None) | {"loss": measure_loss(net, data.training)}, rows


def watch_now(config: Config, low: Run, records: list[StepRecord]) -> UpdateMonitor:
    """Attach a monitor to a run in low precision, which compares it with float32.

    Args:
        config: The way to train.
        low: The run.
        records: List to which the record of each observed step is added.
    """
    return UpdateMonitor(
        [*low.parameters.items()],
        records.append,
        formats="e5m2",
        every_n_steps=lambda index: is_observed(config, index),
        max_elements=256,
        recipes="fp32",
        strict=True,
        warn=lambda _: None,  # known losses, of which the runs are examples
    ).attach(low.optimizer)


def is_observed(config: Config, index: int) -> bool:
    """Return True for each thirtieth of the steps, and for the last one."""
    return index % (config.steps // 30) == 0 or index == config.steps - 1


def train(config: Config, run: Run, net: nn.Module, data: Data, step: Any) -> None:
    """Train a net on all batches.

    Args:
        config: The way to train.
        run: The run of the net.
        net: The net.
        data: The data.
        step: Function that steps the optimizer.
    """
    dtype = next(net.parameters()).dtype
    for number, (inputs, classes) in enumerate(data.batches):
        for group in run.optimizer.param_groups:
            rate = config.rate(number)
            if isinstance(group["lr"], Tensor):  # torchao's
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        net.zero_grad()
        outputs = net(inputs.to(dtype) if inputs.is_floating_point() else inputs).flatten(0, -2)
        nn.functional.cross_entropy(outputs.float(), classes.flatten()).backward()
        step()


def measure_loss(net: nn.Module, batch: Batch) -> float:
    """Return the loss of a net on a batch, computed in float32 whatever its dtype."""
    with torch.no_grad():
        return loss_and_accuracy(copy.deepcopy(net).float(), batch)[0].item()


# --- what was predicted


def choose(record: StepRecord, name: str | None) -> Figures:
    """Return the figures of a layer, or of the model if `name` is None."""
    return record.model if name is None else record.layers[name]


def read_twin(record: StepRecord, name: str | None, recipe: str, prefix: str = "") -> Row:
    """Read the figures of a twin, with the standard errors of two of them.

    Args:
        record: The record of the last step.
        name: Name of the layer; None for the model.
        recipe: Name of the recipe.
        prefix: Start of the names of the columns.
    """
    figures = choose(record, name)
    keys = {column: f"{metric}/{recipe}" for column, metric in TWIN_METRICS.items()}
    row = {f"{prefix}{column}": figures.get(key, math.nan) for column, key in keys.items()}
    for column in ("kept", "frozen"):
        has_value = keys[column] in figures
        error = figures.standard_error(keys[column]) if has_value else math.nan
        row[f"{prefix}{column}_error"] = error
    return row


def find_state(high: Watched, names: Iterable[str]) -> str:
    """Return which of the states the optimizer has; an empty text for none."""
    states = {key for state in high.run.optimizer.state.values() for key in state}
    return next((name for name in names if name in states), "")


def read_states(high: Watched, name: str | None, recipe: str) -> Row:
    """Read what a twin predicts for the optimizer's second and first moment.

    Args:
        high: The run in fp32.
        name: Name of the layer; None for the model.
        recipe: Name of the recipe.
    """
    figures = choose(high.records[-1], name)
    row = {}
    for letter, names in (("v", _SQUARES), ("m", _MOMENTS)):
        state = find_state(high, names)
        for end in ("ratio", "error", "zero_frac"):
            row[f"{letter}_{end}"] = figures.get(f"{state}_{end}/{recipe}", math.nan)
    return row


def read_steps(records: Sequence[StepRecord], name: str | None, format: str) -> Row:
    """Read figures of single steps in the format of the weights: means over the observed steps.

    ``step_kept_by_energy`` weighs each step by Σ update².

    Args:
        records: Records of all observed steps.
        name: Name of the layer; None for the model.
        format: Name of the format; without figures in it, all are NaN.
    """
    each = [choose(record, name) for record in records]
    values = {
        column: [figures.get(f"{metric}/{format}", math.nan) for figures in each]
        for column, metric in STEP_METRICS.items()
    }
    means = {column: _mean(filter(math.isfinite, own)) for column, own in values.items()}
    known = [k for k, kept in enumerate(values["step_kept"]) if math.isfinite(kept)]
    energies = [each[k]["update_rms"] ** 2 for k in known]
    by_energy = sum(values["step_kept"][k] * e for k, e in zip(known, energies, strict=True))
    return means | {
        "step_never_moved": values["step_never_moved"][-1],
        "step_kept_by_energy": by_energy / sum(energies) if sum(energies) else math.nan,
    }


def _mean(values: Iterable[float]) -> float:
    known = [*values]
    return statistics.fmean(known) if known else math.nan


# --- files


def write(path: Path, rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Write rows to a CSV file, with four digits: more would differ on another processor.

    Args:
        path: The file.
        rows: The rows. A value that a row lacks, or NaN, is an empty cell.
        columns: Names of the columns to write.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_as_cell(row.get(column, "")) for column in columns] for row in rows)


def _as_cell(value: object) -> object:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.4g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the rows go")
    arguments = parser.parse_args()
    runs: list[Row] = []
    layers: list[Row] = []
    configs = PARTS[arguments.part]
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
        for config, (own, own_layers) in zip(configs, pool.imap(make_rows, configs), strict=True):
            print(*config, flush=True)
            runs += own
            layers += own_layers
            write(arguments.folder / f"{arguments.part}_runs.csv", runs, [*runs[0]])
            write(arguments.folder / f"{arguments.part}_layers.csv", layers, LAYER_COLUMNS)


if __name__ == "__main__":
    main()
