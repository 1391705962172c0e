"""What one fp32 run predicts, beside what real runs in bf16 do.

Read `real_runs` first; `tables` comes next.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from altgrad.report import Run, read
from altgrad_lightning import PrecisionMonitor
from examples.confirming.real_runs import Outcome, list_remedies, train
from examples.confirming.tasks import Task, digits, shifted_digits

BF16 = "bf16-true"
"""All tensors in bf16: weights, gradients, and both moments of AdamW."""


class Setting(NamedTuple):
    """A way to train with AdamW.

    Attributes:
        name: What to call it.
        make_task: Function of a seed and a number of steps that makes the task.
        lr: The learning rate.
    """

    name: str
    make_task: Callable[[int, int], Task]
    lr: float


SCRATCH = Setting("from scratch, 1e-3", digits, 1e-3)
TUNED = Setting("fine-tuned, 1e-5", shifted_digits, 1e-5)
SETTINGS = (SCRATCH, Setting("fine-tuned, 1e-4", shifted_digits, 1e-4), TUNED)


class Experiment(NamedTuple):
    """The runs of one setting with one seed.

    Attributes:
        prediction: What the monitor wrote during the run in fp32.
        fp32: Result of the run in fp32.
        low: Result of each run in bf16, by its name in `OPTIMIZERS`.
    """

    prediction: Run
    fp32: Outcome
    low: dict[str, Outcome]


def do_runs(setting: Setting, seed: int, steps: int, folder: Path) -> Experiment:
    """Do all runs of a setting: one in fp32 that predicts, then those in bf16.

    Args:
        setting: The setting.
        seed: Seed of the weights and of the batches.
        steps: Number of steps of each run.
        folder: Folder for the run file of the monitor.

    Returns:
        The results of all runs.
    """
    task = setting.make_task(seed, steps)
    names = [BF16, *list_remedies()]
    monitor = PrecisionMonitor(formats="bf16", recipes=names, every_n_steps=10)
    fp32 = train(task, "fp32", setting.lr, folder, [monitor])
    low = {name: train(task, name, setting.lr, folder) for name in names}
    assert monitor.path is not None
    return Experiment(read(monitor.path), fp32, low)


# --- figures of a layer: as predicted, and as measured


def predict(experiment: Experiment, metric: str, name: str, layer: str) -> float:
    """Return the last figure of a twin in the fp32 run: a sample that is stepped in bf16.

    Args:
        experiment: The runs.
        metric: ``"frozen_frac"`` or ``"progress_kept"``.
        name: Name of the run in bf16, which is that of the twin, too.
        layer: Name of the layer.
    """
    return [*experiment.prediction.series(f"{metric}/{name}", layer).values()][-1]


def measure_frozen(low: Outcome, fp32: Outcome, layer: str) -> float:
    """Return the share of weights that never moved in bf16, among those that fp32 moved.

    Args:
        low: The run in bf16.
        fp32: The run in fp32.
        layer: Name of the layer.
    """
    moved = fp32.ever_moved[layer]
    return (moved & ~low.ever_moved[layer]).sum().item() / moved.sum().item()


def measure_progress(low: Outcome, fp32: Outcome, layer: str) -> float:
    """Return which share of the way of the fp32 run the run in bf16 went, in its direction.

    Args:
        low: The run in bf16.
        fp32: The run in fp32.
        layer: Name of the layer.
    """
    whole = fp32.distances[layer]
    return ((low.distances[layer] * whole).sum() / whole.square().sum()).item()


MEASURES = {"frozen_frac": measure_frozen, "progress_kept": measure_progress}
"""By metric of AltGrad, the function that finds what is true of two real runs."""


class Pair(NamedTuple):
    """A figure of a layer, as predicted by the fp32 run and as measured in the real one."""

    predicted: float
    measured: float


def compare_layers(experiment: Experiment, metric: str, name: str = BF16) -> dict[str, Pair]:
    """Return a figure of each layer, as predicted and as measured.

    Args:
        experiment: The runs.
        metric: ``"frozen_frac"`` or ``"progress_kept"``.
        name: Name of the run in bf16.

    Returns:
        The figures by name of the layer.
    """
    measure, low = MEASURES[metric], experiment.low[name]
    return {
        layer: Pair(predict(experiment, metric, name, layer), measure(low, experiment.fp32, layer))
        for layer in experiment.fp32.weights
    }


def average_pairs(pairs: Iterable[Pair]) -> Pair:
    """Return the mean of predicted figures, and that of measured ones."""
    predicted, measured = zip(*pairs, strict=True)
    return Pair(statistics.fmean(predicted), statistics.fmean(measured))


# --- the loss


class Loss(NamedTuple):
    """What a run in bf16 loses against the run in fp32, in two ways.

    Attributes:
        end: The loss after training, in nats.
        lost: By how much less the loss fell than in fp32, as a share of its fall in fp32.
        ratio: The loss after training as a multiple of that in fp32.
    """

    end: float
    lost: float
    ratio: float


def compare_losses(low: Outcome, fp32: Outcome) -> Loss:
    """Return what a run loses against the run in fp32.

    Args:
        low: The run, in bf16.
        fp32: The run in fp32.
    """
    start, best, end = fp32.losses[0], fp32.losses[-1], low.losses[-1]
    return Loss(end, (end - best) / (start - best), end / best)
