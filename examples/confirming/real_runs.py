"""Real runs in fp32 and in bf16, and which of their weights move.

Nothing here uses AltGrad. Read `tasks` first; `comparison` comes next.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader

from examples.confirming.tasks import Batch, Task, loss_and_accuracy

EVALUATED = 10
"""Interval between evaluations of the loss, in steps."""


# --- how a run is stored


def make_torchao(parameters: Iterable[nn.Parameter], lr: float) -> Optimizer:
    """Make torchao's AdamW, which rounds weights in bf16 stochastically.

    Args:
        parameters: The parameters, in bf16.
        lr: The learning rate.

    Returns:
        The optimizer, with the other hyperparameters of torch's AdamW.
    """
    from torchao.optim import _AdamW

    return _AdamW(parameters, lr=lr, weight_decay=0.01, bf16_stochastic_round=True)


def make_optimi(parameters: Iterable[nn.Parameter], lr: float) -> Optimizer:
    """Make optimi's AdamW, which adds to weights in bf16 by Kahan summation.

    Args:
        parameters: The parameters, in bf16.
        lr: The learning rate.

    Returns:
        The optimizer, with the other hyperparameters of torch's AdamW.
    """
    from optimi import AdamW

    options = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    return AdamW(parameters, lr=lr, kahan_sum=True, **options)


OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter], float], Optimizer]] = {
    "fp32": AdamW,
    "bf16-true": AdamW,
    "torchao-sr": make_torchao,
    "optimi-kahan": make_optimi,
}
"""The optimizer of each run, by the name of AltGrad's recipe. All runs but fp32 are in bf16."""


class Library(NamedTuple):
    """A library of optimizers: its name for Python, and that for pip."""

    module: str
    package: str


LIBRARIES = {
    "torchao-sr": Library("torchao", "torchao"),
    "optimi-kahan": Library("optimi", "torch-optimi"),
}
"""The libraries that `OPTIMIZERS` needs, by name of the run."""


def list_remedies() -> list[str]:
    """Return the runs in `OPTIMIZERS` whose libraries are installed."""
    return [name for name, library in LIBRARIES.items() if find_spec(library.module)]


# --- what is recorded


class Movement(pl.Callback):
    """A callback that records which weights ever move, by hooks before and after each step."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the weights at the start, and register the hooks: the optimizer exists now."""
        self.parameters = dict(pl_module.named_parameters())
        self.start = self._copy()
        self.ever_moved = {name: torch.zeros_like(w).bool() for name, w in self.start.items()}
        (optimizer,) = trainer.optimizers
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def distances(self) -> dict[str, Tensor]:
        """Return weights now minus weights at the start, float32, by name of the layer."""
        return {name: w.float() - self.start[name].float() for name, w in self._copy().items()}

    def _copy(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def _before_step(self, *_: object) -> None:
        self.before = self._copy()

    def _after_step(self, *_: object) -> None:
        for name, p in self.parameters.items():
            self.ever_moved[name] |= p.detach() != self.before[name]


class Losses(pl.Callback):
    """A callback that evaluates the loss of a batch at each tenth step, in float32 arithmetic.

    Args:
        batch: The inputs and their classes.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.losses: list[float] = []

    def on_train_batch_start(
        self, _: pl.Trainer, pl_module: pl.LightningModule, _batch: object, number: int
    ) -> None:
        """Evaluate before each tenth step."""
        if number % EVALUATED == 0:
            self._evaluate(pl_module)

    def on_train_end(self, _: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate after the last step."""
        self._evaluate(pl_module)

    def _evaluate(self, module: pl.LightningModule) -> None:
        self.losses.append(evaluate(module.net, self.batch)[0])


@torch.no_grad()
def evaluate(net: nn.Module, batch: Batch) -> tuple[float, float]:
    """Evaluate a net in float32 arithmetic, whatever its weights are stored in.

    Args:
        net: The net.
        batch: The inputs and their classes.

    Returns:
        The loss in nats, and the share of inputs classified rightly.
    """
    loss, accuracy = loss_and_accuracy(copy.deepcopy(net).float(), batch)
    return loss.item(), accuracy


# --- a run


class Training(pl.LightningModule):
    """A classifier in training."""

    def __init__(self, net: nn.Module, make_optimizer: Callable[[Any], Optimizer]) -> None:
        super().__init__()
        self.net = net
        self.make_optimizer = make_optimizer

    def training_step(self, batch: Batch, _batch_index: int) -> Tensor:
        return loss_and_accuracy(self.net, batch)[0]

    def configure_optimizers(self) -> Optimizer:
        return self.make_optimizer(self.parameters())


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Attributes:
        losses: Loss on `Task.training` in nats, before each tenth step and after the last one.
        accuracy: Share of `Task.held_out` that is classified rightly after training.
        weights: Weights after training, by name of the layer.
        ever_moved: For each weight, whether any step moved it, bool, by name of the layer.
        distances: Weights after training minus those before, float32, by name of the layer.
    """

    losses: list[float]
    accuracy: float
    weights: dict[str, Tensor]
    ever_moved: dict[str, Tensor]
    distances: dict[str, Tensor]


def train(
    task: Task, stored: str, lr: float, folder: Path, callbacks: Sequence[pl.Callback] = ()
) -> Outcome:
    """Train the model of a task in fp32, or really in bf16.

    Args:
        task: The task.
        stored: Name of the run in `OPTIMIZERS`.
        lr: The learning rate.
        folder: Folder for files of the callbacks.
        callbacks: Further callbacks.

    Returns:
        The result of the run.
    """
    module = Training(task.model(), lambda parameters: OPTIMIZERS[stored](parameters, lr))
    movement, losses = Movement(), Losses(task.training)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision="32-true" if stored == "fp32" else "bf16-true",
        default_root_dir=folder,
        logger=False,
        callbacks=[movement, losses, *callbacks],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    torch.manual_seed(0)  # torchao draws from the global generator
    with torch.compiler.set_stance("force_eager"):  # torchao compiles, which takes a minute
        trainer.fit(module, DataLoader(task.batches, batch_size=None))
    return Outcome(
        losses.losses,
        evaluate(module.net, task.held_out)[1],
        {name: p.detach() for name, p in module.named_parameters()},
        movement.ever_moved,
        movement.distances(),
    )
