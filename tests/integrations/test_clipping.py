"""Gradients are those that the optimizer applies: clipped, and unscaled, by each trainer's means.

The truth is the limit itself: far below the norm of the gradients, it is their norm after clipping.
"""

import math
from pathlib import Path
from typing import Any

import lightning.fabric
import pytest
import torch
from accelerate import Accelerator

import altgrad
from altgrad.integrations import accelerate as with_accelerate, fabric as with_fabric
from altgrad.integrations.transformers import PrecisionCallback
from altgrad_lightning import PrecisionMonitor
from tests.integrations.hugging import make_trainer
from tests.integrations.trainings import FORMAT, make_training
from tests.lightning.runs import Net, batches, trainer

LIMIT = 0.01
OPTIONS: dict[str, Any] = {"formats": FORMAT, "recipes": (), "every_n_steps": 1, "strict": True}


def compute_norm(figures: Any) -> float:
    return figures["gradient_rms"] * math.sqrt(figures.elements)


def compute_loss(model: Any) -> torch.Tensor:
    return (model(torch.randn(4, 8)) - 1).square().mean()


def clip_by_hand(folder: Path) -> Any:
    model, optimizer = make_training()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    run = altgrad.watch(model, optimizer, folder, scaler=scaler, **OPTIONS)
    scaler.scale(compute_loss(model)).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
    scaler.step(optimizer)
    return run.latest.model


def clip_by_accelerate(folder: Path) -> Any:
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(*make_training())
    run = with_accelerate.watch(accelerator, model, optimizer, folder, **OPTIONS)
    accelerator.backward(compute_loss(model))
    accelerator.clip_grad_norm_(model.parameters(), LIMIT)
    optimizer.step()
    return run.latest.model


def clip_by_fabric(folder: Path) -> Any:
    fabric = lightning.fabric.Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(*make_training())
    run = with_fabric.watch(fabric, model, optimizer, folder, **OPTIONS)
    fabric.backward(compute_loss(model))
    fabric.clip_gradients(model, optimizer, max_norm=LIMIT)
    optimizer.step()
    return run.latest.model


def clip_by_hugging_face(folder: Path) -> Any:
    hugging = make_trainer(folder, max_steps=1, max_grad_norm=LIMIT)
    callback = PrecisionCallback(folder, **OPTIONS)
    callback.add_to(hugging)
    hugging.train()
    return callback.run.latest.model


def clip_by_lightning(folder: Path) -> Any:
    monitor = PrecisionMonitor(run_file=False, **OPTIONS)
    trainer(folder, monitor, gradient_clip_val=LIMIT, logger=False).fit(Net(), batches(1))
    return monitor.latest_model


@pytest.mark.parametrize(
    "train",
    [clip_by_hand, clip_by_accelerate, clip_by_fabric, clip_by_hugging_face, clip_by_lightning],
)
def test_gradients_are_clipped_and_unscaled_as_the_optimizer_applies_them(
    tmp_path: Path, train: Any
) -> None:
    assert compute_norm(train(tmp_path)) == pytest.approx(LIMIT, rel=1e-3)
