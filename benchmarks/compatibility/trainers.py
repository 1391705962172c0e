"""Rows of trainers: loops, `altgrad.watch`, Lightning, Hugging Face, accelerate, Fabric."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.optim import AdamW

import altgrad
from altgrad.integrations import accelerate as with_accelerate, fabric as with_fabric
from benchmarks.compatibility.trial import SETTINGS, Row, make_rows
from tests.integrations.trainings import make_model, train
from tests.step_truth.designs import Design
from tests.step_truth.lightning_modes import LIGHTNING_MODES
from tests.step_truth.modes import Run
from tests.step_truth.plain_modes import PLAIN_MODES
from tests.step_truth.recording import Entry, Journal

STEPS = 4
WATCH: dict[str, Any] = SETTINGS | {"every_n_steps": 1, "strict": True}


def make_training() -> tuple[nn.Module, Journal, Any]:
    """Return a model with dropout, the journal of its steps, and the optimizer that writes it."""
    model = make_model()
    journal = Journal(model)
    return model, journal, journal.optimizer(AdamW, model.parameters(), lr=1e-3)


def run_loop(design: Any, folder: Path) -> Journal:
    model, journal, optimizer = make_training()
    with design.adapt(partial(altgrad.watch, model, optimizer, folder, **WATCH)):
        train(model, optimizer, STEPS)
    return journal


def reset_accelerate() -> None:
    """Reset the states that all Accelerators of a process share."""
    from accelerate.state import AcceleratorState, GradientState

    # No public name resets them.
    AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001
    GradientState._reset_state()  # noqa: SLF001


def run_accelerate(design: Any, folder: Path, *, is_first: bool) -> Journal:
    """Train by accelerate; watch before `prepare` if `is_first`, and after it otherwise."""
    from accelerate import Accelerator

    reset_accelerate()
    accelerator = Accelerator(cpu=True)
    model, journal, optimizer = make_training()
    given = model, optimizer
    wrapped = None if is_first else accelerator.prepare(*given)
    watch = partial(with_accelerate.watch, accelerator, *(wrapped or given), folder, **WATCH)
    with design.adapt(watch):
        train(*(wrapped or accelerator.prepare(*given)), STEPS, accelerator.backward)
    return journal


def run_fabric(design: Any, folder: Path, *, is_first: bool) -> Journal:
    """Train by Fabric; watch before `setup` if `is_first`, and after it otherwise."""
    from lightning.fabric import Fabric

    ranks = distributed.get_world_size() if distributed.is_initialized() else 1
    fabric = Fabric(accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto")
    fabric.launch()
    model, journal, optimizer = make_training()
    given = model, optimizer
    wrapped = None if is_first else fabric.setup(*given)
    watch = partial(with_fabric.watch, fabric, *(wrapped or given), folder, **WATCH)
    with design.adapt(watch):
        train(*(wrapped or fabric.setup(*given)), STEPS, fabric.backward)
    return journal


def run_hugging_face(design: Any, folder: Path, *, optim: str) -> Journal:
    """Train by the Trainer of Hugging Face with one of its optimizers."""
    from transformers import TrainerCallback

    from altgrad.integrations.transformers import PrecisionCallback
    from tests.integrations.hugging import make_trainer

    options = {
        "max_steps": STEPS,
        "report_to": [],
        "optim_target_modules": "all-linear",
    }  # of GaLore
    trainer = make_trainer(folder, optim=optim, **options)
    journal = Journal(trainer.model)

    class Clones(TrainerCallback):
        """The truth: clones at the Trainer's events around each optimizer step."""

        def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
            self.found = journal.copy(model.parameters())

        def on_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
            left = journal.copy(model.parameters())
            journal.steps.append({n: Entry(*self.found[n], left[n][0]) for n in self.found})

    trainer.add_callback(Clones())
    with design.adapt(partial(PrecisionCallback(folder, **WATCH).add_to, trainer)):
        trainer.train()
    return journal


def list_hugging_face_optimizers() -> list[str]:
    """Return the values of `optim` whose steps the Trainer's events surround."""
    from transformers.training_args import OptimizerNames

    names = [each.value for each in OptimizerNames]
    return [name for name in names if not name.endswith(("layerwise", "lomo"))]


def run_without_compiling(run: Run, design: Design, folder: Path) -> Journal:
    """Train without torch.compile, which takes seconds for each optimizer."""
    with torch.compiler.set_stance("force_eager"):
        return run(design, folder)


def list_rows() -> list[Row]:
    adapters: dict[str, Run] = {
        "`altgrad.watch`": run_loop,
        "accelerate, before `prepare`": partial(run_accelerate, is_first=True),
        "accelerate, after `prepare`": partial(run_accelerate, is_first=False),
        "Fabric, before `setup`": partial(run_fabric, is_first=True),
        "Fabric, after `setup`": partial(run_fabric, is_first=False),
    }
    hugging = {
        f"`{name}`": partial(run_without_compiling, partial(run_hugging_face, optim=name))
        for name in list_hugging_face_optimizers()
    }
    return [
        *make_rows("Plain loop, `UpdateMonitor`", {each.name: each.run for each in PLAIN_MODES}),
        *make_rows("Adapters", adapters),
        *make_rows("Trainer of Lightning", {each.name: each.run for each in LIGHTNING_MODES}),
        *make_rows("Trainer of Hugging Face, by `optim`", hugging),
    ]
