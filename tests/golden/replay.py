"""Replay a small run, whose every step is stored, under a monitor.

Training differs from processor to processor; the weights and gradients of this run do not. So the
figures of each step are the same everywhere, and in every version: `tests/golden/test_golden.py`
compares them with the figures that version 0.1.0 recorded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from altgrad import Figures, StepRecord, UpdateMonitor
from altgrad_lightning import PrecisionMonitor

DATA = Path(__file__).parent / "data"
STEPS_FILE = DATA / "steps.pt"
FIGURES_FILE = DATA / "figures.json"
RUN_FILE = DATA / "altgrad.jsonl"
STATE_FILE = DATA / "monitor-state.pt"
CHECKPOINT_FILE = DATA / "trainer.ckpt"

FORMATS = ("bf16", "e4m3fn", "e5m2", "nvfp4")
MAX_ELEMENTS = 768
"""A quarter of hidden.weight: counts of the model stay whole numbers times a power of two."""
CHECKPOINT_STEP = 2


class RecordedStep(NamedTuple):
    """The gradients and weights after one step; parameters without a gradient are missing."""

    gradients: dict[str, Tensor]
    after: dict[str, Tensor]


class RecordedRun(NamedTuple):
    """The initial weights of a run, and its steps."""

    start: dict[str, Tensor]
    steps: list[RecordedStep]


def load_run() -> RecordedRun:
    data = torch.load(STEPS_FILE, weights_only=True)
    return RecordedRun(data["start"], [RecordedStep(**step) for step in data["steps"]])


class Replay(torch.optim.Optimizer):
    """An optimizer that sets the weights to those after each recorded step."""

    def __init__(self, module: nn.Module, steps: list[RecordedStep], first_step: int = 0) -> None:
        self.parameters = dict(module.named_parameters())
        self.remaining = iter(steps[first_step:])
        super().__init__(self.parameters.values(), {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for name, after in next(self.remaining).after.items():
            self.parameters[name].copy_(after)
        return loss


class ReplayedModule(pl.LightningModule):
    """A module with the recorded names, whose loss has the recorded gradients."""

    def __init__(self, run: RecordedRun) -> None:
        super().__init__()
        self.run = run
        for name, weights in run.start.items():
            owner, _, attribute = name.partition(".")
            if owner not in self._modules:
                self.add_module(owner, nn.Module())
            self.get_submodule(owner).register_parameter(
                attribute, nn.Parameter(weights.detach().clone())
            )

    def compute_step_loss(self, index: int) -> Tensor:
        """Return Σ p · g, whose derivative by p is g, exactly."""
        named = dict(self.named_parameters())
        gradients = self.run.steps[index].gradients
        return torch.stack([(named[name] * g).float().sum() for name, g in gradients.items()]).sum()

    def training_step(self, *_: Any) -> Tensor:
        return self.compute_step_loss(self.trainer.global_step)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Replay(self, self.run.steps)

    def on_train_start(self) -> None:
        """Have the optimizer go on from the step that a resumed run has reached."""
        (optimizer,) = self.trainer.optimizers
        optimizer.remaining = iter(self.run.steps[self.trainer.global_step :])


def replay(
    first_step: int = 0, last_step: int | None = None, state: dict[str, Any] | None = None
) -> tuple[list[StepRecord], UpdateMonitor]:
    """Return the records of some steps; `state` comes from a monitor that saw the steps before."""
    run = load_run()
    module = ReplayedModule(run)
    optimizer = Replay(module, run.steps, first_step)
    for step in run.steps[:first_step]:
        with torch.no_grad():
            for name, after in step.after.items():
                optimizer.parameters[name].copy_(after)
    records: list[StepRecord] = []
    monitor = UpdateMonitor(
        module,
        records.append,
        formats=FORMATS,
        max_elements=MAX_ELEMENTS,
        recipes=(),  # version 0.1.0 had no twins
        strict=True,
        warn=lambda _: None,
    )
    if state is not None:
        monitor.load_state_dict(state)
    with monitor.attach(optimizer):
        for index in range(first_step, len(run.steps) if last_step is None else last_step):
            optimizer.zero_grad()
            module.compute_step_loss(index).backward()
            optimizer.step()
    return records, monitor


def fit(folder: Path, *callbacks: pl.Callback, **options: Any) -> PrecisionMonitor:
    """Replay the run in a Trainer, which writes the run file to the folder."""
    run = load_run()
    monitor = PrecisionMonitor(
        FORMATS, every_n_steps=1, max_elements=MAX_ELEMENTS, recipes=(), strict=True
    )
    trainer = pl.Trainer(
        max_epochs=len(run.steps)
        // CHECKPOINT_STEP,  # the checkpoint was saved at the end of an epoch
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        callbacks=[monitor, *callbacks],
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = DataLoader(range(CHECKPOINT_STEP), batch_size=1)
    trainer.fit(ReplayedModule(run), batches, **options)
    return monitor


# --- figures as JSON


def rows_of(records: list[StepRecord]) -> Iterator[tuple[int, str, Figures]]:
    """Yield step, layer ("" for the model) and figures, in the order of the records."""
    for step, record in enumerate(records):
        for name, figures in record.layers.items():
            yield step, name, figures
        yield step, "", record.model


def number_to_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def load_figures() -> dict[str, Any]:
    return json.loads(FIGURES_FILE.read_text(encoding="utf-8"))
