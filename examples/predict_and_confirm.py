"""Predict from one fp32 run what low-precision runs lose; then do these runs, and compare.

    python examples/predict_and_confirm.py                      # an MLP on digits; a minute
    python examples/predict_and_confirm.py --model transformer  # on Python's source; 45 minutes

`PrecisionMonitor` observes a run in fp32. Then the run is repeated with weights that really are
stored in each format: rounded to nearest, rounded stochastically, and with Kahan summation. Hooks
that use none of AltGrad's figures count which updates stall there. The digits need scikit-learn.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import pytorch_lightning as pl
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from altgrad import WeightStorage
from altgrad.report import Run, judge_run, read
from altgrad_lightning import PrecisionMonitor

FORMATS = ("fp16", "bf16", "e3m4", "e4m3fn", "e5m2")
WAYS: dict[str, dict[str, Any]] = {
    "nearest": {},
    "stochastic": {"rounding": "stochastic"},
    "kahan": {"compensation": "kahan"},
}
Batch = tuple[Tensor, Tensor]
"""Inputs of a classifier, and the class of each, int64."""


# --- what is trained


class Task(NamedTuple):
    """A model to train, and its data.

    Attributes:
        model: Function that makes the model, with equal weights at each call.
        batches: The batches to train on, one for each step.
        training: Examples from the training set, for the loss after training.
        held_out: Examples that no batch contains, for the accuracy after training.
    """

    model: Callable[[], nn.Module]
    batches: list[Batch]
    training: Batch
    held_out: Batch


def digits(seed: int, steps: int) -> Task:
    """Make the task to train a perceptron on the 8x8 digits that scikit-learn ships.

    Args:
        seed: Seed of the weights and of the batches.
        steps: Number of batches, with 128 digits each.

    Returns:
        The task. Inputs are float32 (digits, 64), from 0 to 1.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    inputs = torch.tensor(data.data, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    training, held_out = order[:1437], order[1437:]
    generator = torch.Generator().manual_seed(seed)
    drawn = training[torch.randint(len(training), (steps, 128), generator=generator)]

    def model() -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(64, 128),
            nn.LayerNorm(128),
            nn.ReLU(),
            nn.Linear(128, 128),
            nn.LayerNorm(128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )

    def batch(rows: Tensor) -> Batch:
        return inputs[rows], labels[rows]

    return Task(model, [batch(rows) for rows in drawn], batch(training), batch(held_out))


def transformer(seed: int, steps: int) -> Task:
    """Make the task to train the transformer of `altgrad demo` on Python's standard library.

    The transformer predicts the next character of source code.

    Args:
        seed: Seed of the weights and of the batches.
        steps: Number of batches, with 16 pieces of text each.

    Returns:
        The task. Inputs are int64 (pieces, characters); the class of each is the next character.
    """
    from altgrad_lightning.demo_model import CharacterTransformer, Windows, standard_library_text

    text = standard_library_text()
    end = len(text) * 9 // 10

    def batches(text: bytes, seed: int, count: int, size: int) -> list[Batch]:
        torch.manual_seed(seed)
        windows = DataLoader(Windows(text, count * size), batch_size=size)
        return [(batch[:, :-1], batch[:, 1:]) for batch in windows]

    def model() -> nn.Module:
        torch.manual_seed(seed)
        return CharacterTransformer()

    (training,), (held_out,) = batches(text[:end], 1000, 1, 64), batches(text[end:], 1001, 1, 64)
    return Task(model, batches(text[:end], seed, steps, 16), training, held_out)


class Training(pl.LightningModule):
    """A classifier in training, which keeps the loss of each step in `losses`."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.losses: list[float] = []

    def training_step(self, batch: Batch, _batch_index: int) -> Tensor:
        loss, _ = loss_and_accuracy(self.net, batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3, betas=(0.9, 0.99))


def loss_and_accuracy(net: nn.Module, batch: Batch) -> tuple[Tensor, float]:
    """Return the cross-entropy of a batch in nats, and the share of inputs classified rightly.

    Args:
        net: The classifier.
        batch: The inputs and their classes.
    """
    inputs, classes = batch
    logits, classes = net(inputs).flatten(0, -2), classes.flatten()
    right = (logits.argmax(-1) == classes).float().mean().item()
    return functional.cross_entropy(logits, classes), right


# --- which updates really stall


class Updates:
    """A count of the updates that a `WeightStorage` makes stall, by hooks before and after it.

    Args:
        module: The module that is trained.
    """

    def __init__(self, module: nn.Module) -> None:
        self.parameters = dict(module.named_parameters())
        self.stalls: list[dict[str, tuple[int, int]]] = []
        """For each step and layer, the number of stalled updates and of updates other than 0."""
        self._had_update = {name: torch.zeros_like(p).bool() for name, p in self._named()}
        self._moved = {name: torch.zeros_like(p).bool() for name, p in self._named()}

    def attach(self, optimizer: torch.optim.Optimizer, storage: WeightStorage) -> None:
        """Attach a storage to an optimizer, with hooks that count what it does to updates.

        Args:
            optimizer: The optimizer.
            storage: The storage, which rounds the weights after each step.
        """
        # Hooks are called in the order in which they are registered.
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._before_storing)
        storage.attach(optimizer)
        optimizer.register_step_post_hook(self._after_storing)

    def stall(self, layer: str | None = None) -> float:
        """Return the mean over steps of the share of updates that stalled.

        Args:
            layer: Name of the layer; None for the whole model.
        """
        return statistics.fmean(
            sum(stalled for stalled, _ in counts) / max(sum(updates for _, updates in counts), 1)
            for counts in (
                [*step.values()] if layer is None else [step[layer]] for step in self.stalls
            )
        )

    def never_moved(self, layer: str | None = None) -> float:
        """Return the share of weights that no step moved, among those with updates other than 0.

        Args:
            layer: Name of the layer; None for the whole model.
        """
        layers = [*self.parameters] if layer is None else [layer]
        had = sum(self._had_update[name].sum().item() for name in layers)
        still = sum((self._had_update[n] & ~self._moved[n]).sum().item() for n in layers)
        return still / max(had, 1)

    def _named(self) -> list[tuple[str, Tensor]]:
        return [(name, p.detach()) for name, p in self.parameters.items()]

    def _before_step(self, *_: object) -> None:
        self._stored = {name: p.clone() for name, p in self._named()}

    def _before_storing(self, *_: object) -> None:
        self._is_update = {name: p != self._stored[name] for name, p in self._named()}

    def _after_storing(self, *_: object) -> None:
        counts = {}
        for name, p in self._named():
            moved = p != self._stored[name]
            is_update = self._is_update[name]
            counts[name] = (int((is_update & ~moved).sum()), int(is_update.sum()))
            self._had_update[name] |= is_update
            self._moved[name] |= moved
        self.stalls.append(counts)


# --- the runs


@dataclass
class Outcome:
    """The result of a run.

    Attributes:
        losses: Loss of the batch of each step, in nats.
        loss: Loss after training on `Task.training`, in nats.
        accuracy: Share of `Task.held_out` that is classified rightly after training.
        weights: Weights after training, by name of the layer.
        updates: Counts of the updates that stalled; None for the run in fp32.
    """

    losses: list[float]
    loss: float
    accuracy: float
    weights: dict[str, Tensor] = field(repr=False)
    updates: Updates | None = None


class Stored(pl.Callback):
    """A callback that stores the weights of a run by a `WeightStorage`, and counts updates."""

    def __init__(self, storage: WeightStorage) -> None:
        self.storage = storage

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach the storage: Lightning has made the optimizers, and no step has been made."""
        self.updates = Updates(pl_module)
        self.updates.attach(trainer.optimizers[0], self.storage)


def train(task: Task, folder: Path, callback: pl.Callback) -> Outcome:
    """Train the model of a task; runs of one task differ by nothing but the callback.

    Args:
        task: The task.
        folder: Folder for the run file of a `PrecisionMonitor`.
        callback: The `PrecisionMonitor` of the run in fp32, or a `Stored`.

    Returns:
        The result of the run.
    """
    module = Training(task.model())
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        callbacks=[callback],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, DataLoader(task.batches, batch_size=None))
    with torch.no_grad():
        loss, _ = loss_and_accuracy(module.net, task.training)
        _, accuracy = loss_and_accuracy(module.net, task.held_out)
    weights = {name: p.detach() for name, p in module.named_parameters()}
    updates = callback.updates if isinstance(callback, Stored) else None
    return Outcome(module.losses, loss.item(), accuracy, weights, updates)


class Prediction:
    """The figures that the fp32 run gives for formats, and its verdicts on each layer.

    Args:
        run: The run file of the fp32 run.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.verdicts = judge_run(run).by_layer

    def __call__(self, metric: str, format: str, layer: str | None = None) -> float:
        """Return the mean of a figure over the observed steps; the last value of never_moved_frac.

        Args:
            metric: Name of the metric.
            format: Name of the format.
            layer: Name of the layer; None for the whole model.
        """
        values = [x for x in self.run.series(f"{metric}/{format}", layer).values() if isfinite(x)]
        return values[-1] if metric == "never_moved_frac" else statistics.fmean(values)


class Experiment(NamedTuple):
    """The runs of one seed.

    Attributes:
        prediction: Figures and verdicts of the fp32 run.
        fp32: Result of the fp32 run.
        stored: Result of each run in a format, by the format and the name in `WAYS`.
    """

    prediction: Prediction
    fp32: Outcome
    stored: dict[tuple[str, str], Outcome]


def experiment(
    task: Task, folder: Path, formats: Sequence[str], ways: Sequence[str], every: int = 1
) -> Experiment:
    """Do all runs of a task: one in fp32 that predicts, then one for each format and way.

    Args:
        task: The task.
        folder: Folder for the run file.
        formats: Names of the formats.
        ways: Names in `WAYS` of the ways to store weights.
        every: Interval between observed steps, in steps.

    Returns:
        The results of all runs.
    """
    monitor = PrecisionMonitor(formats=formats, max_elements=None, every_n_steps=every)
    fp32 = train(task, folder, monitor)
    assert monitor.path is not None
    stored = {
        (format, way): train(task, folder, Stored(WeightStorage(format, **WAYS[way])))
        for format in formats
        for way in ways
    }
    return Experiment(Prediction(read(monitor.path)), fp32, stored)


# --- what is shown


def gains(experiment: Experiment) -> list[str]:
    """Return the names of the gains of normalizations: vectors named weight, which begin as 1."""
    weights = experiment.fp32.weights
    return [n for n in weights if n.endswith(".weight") and weights[n].dim() == 1]


def table(experiments: Sequence[Experiment], formats: Sequence[str]) -> Table:
    """Return a table with a row for each format: means over the seeds, and the span of losses.

    Args:
        experiments: The runs of each seed.
        formats: Names of the formats.
    """
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for title in (
        "format",
        "stall\npredicted",
        "stall\nmeasured",
        "update\nkept",
        "never moved\npredicted",
        "never moved\nmeasured",
        "loss, rounded\nto nearest",
        "loss,\nstochastic",
        "loss,\nKahan",
        "accuracy\nnearest",
    ):
        shown.add_column(title, justify="left" if title == "format" else "right")
    for format in formats:
        nearest = [each.stored[format, "nearest"] for each in experiments]
        predictions = [each.prediction for each in experiments]
        numbers = (
            statistics.fmean(p("stall_frac", format) for p in predictions),
            statistics.fmean(_updates(o).stall() for o in nearest),
            statistics.fmean(p("kept_update_ratio", format) for p in predictions),
            statistics.fmean(p("never_moved_frac", format) for p in predictions),
            statistics.fmean(_updates(o).never_moved() for o in nearest),
        )
        losses = (_span([e.stored[format, way].loss for e in experiments]) for way in WAYS)
        accuracy = statistics.fmean(o.accuracy for o in nearest)
        shown.add_row(format, *(f"{x:.3f}" for x in numbers), *losses, f"{accuracy:.3f}")
    loss = _span([e.fp32.loss for e in experiments])
    accuracy = statistics.fmean(e.fp32.accuracy for e in experiments)
    shown.add_row("fp32", *["–"] * 5, loss, "–", "–", f"{accuracy:.3f}")
    return shown


def about_gains(experiments: Sequence[Experiment]) -> str:
    """Return a sentence about the gains in bf16: how many are predicted frozen, and really are."""
    pairs = [(e, name) for e in experiments for name in gains(e)]
    said = [e.prediction.verdicts[name]["bf16"].verdict.short == "frozen" for e, name in pairs]
    stored = [e.stored["bf16", "nearest"].weights[name] for e, name in pairs]
    are_so = [bool((each == 1).all()) for each in stored]
    moved = max((e.fp32.weights[name] - 1).abs().max().item() for e, name in pairs)
    count = len(gains(experiments[0]))
    runs = "1 run" if len(experiments) == 1 else f"{len(experiments)} runs"
    return (
        f"Of the {count} LayerNorm gains in {runs} in bf16, {sum(said)} of "
        f"{len(said)} are predicted to be frozen, and {sum(are_so)} of {len(are_so)} are exactly "
        f"1.0 after training; in fp32 they move by up to {moved:.2f}."
    )


def about_predictors(experiments: Sequence[Experiment], formats: Sequence[str]) -> str:
    """Return a sentence about the mean error of two figures as predictions of a layer's stall.

    Args:
        experiments: The runs of each seed.
        formats: Names of the formats.
    """
    errors: dict[str, list[float]] = {"stall_frac": [], "grad_below_stiffness_frac": []}
    for e in experiments:
        for format in formats:
            outcome = e.stored[format, "nearest"]
            for name in outcome.weights:
                true = _updates(outcome).stall(name)
                for metric, each in errors.items():
                    each.append(abs(e.prediction(metric, format, name) - true))
    off = {metric: statistics.fmean(each) for metric, each in errors.items()}
    return (
        f"Of a layer, the predicted stall is off by {off['stall_frac']:.3f} on average; the share "
        "of gradients that are smaller than the grid's step would be off by "
        f"{off['grad_below_stiffness_frac']:.3f}."
    )


def picture(experiments: Sequence[Experiment], formats: Sequence[str], path: Path) -> None:
    """Save a picture: the predicted against the measured share of stalls, and the loss by step.

    Args:
        experiments: The runs of each seed.
        formats: Names of the formats, the finest first.
        path: File of the picture.
    """
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    colours = dict(zip(formats, plt.get_cmap("viridis")(torch.linspace(0, 0.9, len(formats)))))  # noqa: B905
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    left.plot([0, 1], [0, 1], color="#bbb", linewidth=1, zorder=0)
    for format in formats:
        for is_matrix in (False, True):
            points = [
                (e.prediction("stall_frac", format, name), _updates(outcome).stall(name))
                for e in experiments
                for outcome in [e.stored[format, "nearest"]]
                for name, weight in outcome.weights.items()
                if (weight.dim() > 1) == is_matrix
            ]
            left.scatter(
                *zip(*points, strict=True),
                s=22,
                edgecolors=colours[format],
                color=colours[format] if is_matrix else "none",
                label=format if is_matrix else None,
            )
    left.set(
        xlabel="predicted by the fp32 run",
        ylabel="measured in the run in the format",
        title="Share of updates that stall: ● matrices, ○ vectors",
        aspect="equal",
    )
    left.legend(frameon=False)
    first = experiments[0]
    right.plot(_smooth(first.fp32.losses), color="black", linewidth=2, label="fp32")
    for format in formats:
        losses = _smooth(first.stored[format, "nearest"].losses)
        right.plot(losses, color=colours[format])
        if losses[-1] > 1.05 * _smooth(first.fp32.losses)[-1]:
            right.text(len(losses), losses[-1], f" {format}", va="center", color=colours[format])
    coarsest = formats[-1]
    right.plot(
        _smooth(first.stored[coarsest, "stochastic"].losses),
        "--",
        color=colours[coarsest],
        label=f"{coarsest}, stochastic",
    )
    right.set_xlim(right=1.15 * len(first.fp32.losses))
    right.set(yscale="log", xlabel="step", title="Loss of the batches, smoothed; seed 0")
    right.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _updates(outcome: Outcome) -> Updates:
    assert outcome.updates is not None
    return outcome.updates


def _span(values: Sequence[float]) -> str:
    low, high = (f"{x:.2f}" if x >= 1 else f"{x:.2g}" for x in (min(values), max(values)))
    return low if low == high else f"{low}–{high}"


def _smooth(losses: Sequence[float], width: int = 10) -> list[float]:
    return [statistics.fmean(losses[max(0, k - width) : k + 1]) for k in range(len(losses))]


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: expected {least} or more")
        return int(text)

    return number


TASKS = {"digits": digits, "transformer": transformer}
EVERY = {"digits": 1, "transformer": 10}
"""Interval between observed steps of the fp32 run, in steps, by name of the task."""


def main() -> None:
    """Run the experiment for each seed, print the table, and save the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", choices=TASKS, default="digits")
    parser.add_argument("--seeds", type=_at_least(1), default=3, help="how many")
    parser.add_argument("--steps", type=_at_least(20), default=300)
    parser.add_argument("--folder", type=Path, default=Path("predict-and-confirm"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")  # advice on speed

    experiments = []
    for seed in range(arguments.seeds):
        print(f"seed {seed}: one run in fp32, then {len(FORMATS) * len(WAYS)} stored in a format …")
        task = TASKS[arguments.model](seed, arguments.steps)
        folder = arguments.folder / f"seed-{seed}"
        experiments.append(experiment(task, folder, FORMATS, [*WAYS], EVERY[arguments.model]))
    path = arguments.folder / f"{arguments.model}.png"
    picture(experiments, FORMATS, path)
    Console(width=130).print(table(experiments, FORMATS))
    about = about_gains(experiments), about_predictors(experiments, FORMATS)
    print(*about, f"Picture: {path}", sep="\n\n")


if __name__ == "__main__":
    main()
