"""`altgrad.integrations.fabric.watch`: before or after `setup`, with loggers and checkpoints."""

import warnings
from pathlib import Path
from typing import Any

import lightning.fabric
import lightning_fabric
import pytest
import torch
from lightning.fabric.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from altgrad import RunWatch
from altgrad.integrations.fabric import watch
from altgrad.report import read
from tests.integrations.trainings import (
    FORMAT,
    RecordingAdamW,
    assert_equal,
    assert_true,
    clone_weights,
    make_model,
    make_training,
    train,
)
from tests.processes import run

NAMES = [name for name, _ in make_model().named_parameters()]


def train_watched(
    folder: Path, fabric: Any, is_first: bool, steps: int = 4, **options: Any
) -> tuple[RunWatch, nn.Module, RecordingAdamW]:
    """Watch before `setup` if `is_first`, and after it otherwise; then train."""
    model, optimizer = make_training()
    options = {"formats": FORMAT, "every_n_steps": 2, "recipes": (), **options}
    if is_first:
        watched = watch(fabric, model, optimizer, folder, **options)
    wrapped, stepping = fabric.setup(model, optimizer)
    if not is_first:
        watched = watch(fabric, wrapped, stepping, folder, **options)
    torch.manual_seed(1)
    train(wrapped, stepping, steps, fabric.backward)
    return watched, model, optimizer


@pytest.mark.parametrize("package", [lightning.fabric, lightning_fabric])
@pytest.mark.parametrize("is_first", [True, False])
def test_figures_are_those_of_the_recorded_step(
    tmp_path: Path, is_first: bool, package: Any
) -> None:
    fabric = package.Fabric(accelerator="cpu", devices=1)
    watched, _, optimizer = train_watched(tmp_path, fabric, is_first)
    watched.close()
    assert read(tmp_path).steps == (1, 3)
    assert_true(watched.latest.layers, NAMES, optimizer.steps[3])


@pytest.mark.parametrize("is_first", [True, False])
def test_training_is_bit_identical(tmp_path: Path, is_first: bool) -> None:
    fabric = lightning.fabric.Fabric(accelerator="cpu", devices=1)
    model, optimizer = make_training()
    wrapped = fabric.setup(model, optimizer)
    torch.manual_seed(1)
    train(*wrapped, 4, fabric.backward)
    state = torch.get_rng_state()
    _, other, _ = train_watched(tmp_path, fabric, is_first, recipes=["bf16-sr"])
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal(clone_weights(other), clone_weights(model))


@pytest.mark.filterwarnings("ignore:altgrad.watch (cannot judge|expects|sees)")
def test_weights_that_setup_converts_are_described_as_they_are_trained(tmp_path: Path) -> None:
    found = {}
    for is_first in (True, False):
        fabric = lightning.fabric.Fabric(accelerator="cpu", devices=1, precision="bf16-true")
        options = {"formats": ["bf16", "e4m3fn"], "recipes": ["bf16-sr"]}
        watched, _, _ = train_watched(tmp_path / str(is_first), fabric, is_first, **options)
        watched.close()
        assert read(watched.path).now.dtype == "bfloat16"
        found[is_first] = {n: dict(f) for n, f in watched.latest.layers.items()}
    assert repr(found[True]) == repr(found[False])


def test_loggers_of_fabric_get_figures_and_pictures(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="board", version="1")
    fabric = lightning.fabric.Fabric(accelerator="cpu", devices=1, loggers=logger)
    watched, _, _ = train_watched(tmp_path, fabric, is_first=False, charts="all")
    watched.close()
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir).Reload()
    (_, last) = events.Scalars("2-AltGrad-model/update_rms")
    rms = watched.latest.model["update_rms"]
    assert (last.step, last.value) == (3, pytest.approx(rms, rel=1e-6))
    assert "5-AltGrad-ranges/ranges" in events.Tags()["images"]


def test_a_checkpoint_of_fabric_goes_on_with_the_run(tmp_path: Path) -> None:
    fabric = lightning.fabric.Fabric(accelerator="cpu", devices=1)
    watched, _, _ = train_watched(tmp_path, fabric, is_first=False, steps=3)
    fabric.save(tmp_path / "saved.ckpt", {"altgrad": watched})
    watched.close()
    model, optimizer = fabric.setup(*make_training())
    resumed = watch(fabric, model, optimizer, tmp_path, formats=FORMAT, every_n_steps=2)
    fabric.load(tmp_path / "saved.ckpt", {"altgrad": resumed})
    train(model, optimizer, 3, fabric.backward)
    resumed.close()
    assert resumed.path == watched.path
    assert read(tmp_path).steps == (1, 3, 5)


def train_on_a_rank(_: int, folder: str, is_first: bool) -> dict[str, Any]:
    warnings.filterwarnings("error", message=".*altgrad")
    fabric = lightning.fabric.Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    watched, _, optimizer = train_watched(Path(folder), fabric, is_first)
    watched.close()
    latest = watched.latest
    return {
        "layers": None if latest is None else {n: dict(f) for n, f in latest.layers.items()},
        "step": optimizer.steps[3],
        "path": watched.path,
    }


@pytest.mark.slow
@pytest.mark.parametrize("is_first", [True, False])
def test_under_ddp_the_first_rank_alone_observes_and_writes(tmp_path: Path, is_first: bool) -> None:
    first, second = run(train_on_a_rank, 2, str(tmp_path), is_first)
    assert_true(first["layers"], NAMES, first["step"])
    assert_equal([after for _, after in first["step"]], [after for _, after in second["step"]])
    assert (first["path"], second["path"]) == (tmp_path / "altgrad.jsonl", None)
    assert second["layers"] is None
