"""`Trainer.callback_metrics` under DDP: the first rank observes, and all ranks decide alike."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from altgrad.report import read
from altgrad_lightning import PrecisionMonitor
from tests.lightning.runs import Net, batches, trainer
from tests.processes import run

KEPT = "altgrad/kept_update_ratio/bf16"
BATCHES = 6  # of an epoch, on each rank


class See(pl.Callback):
    """A callback that records a value, and counts the all-reduces of the Trainer's strategy."""

    def __init__(self) -> None:
        self.values: list[float | None] = []
        self.reduced: list[int] = []

    def on_train_start(self, fitted: pl.Trainer, *_: Any) -> None:
        reduce = fitted.strategy.reduce

        def count(tensor: Tensor, *others: Any, **options: Any) -> Any:
            if isinstance(tensor, Tensor) and tensor.numel() == 2:  # not those of Lightning
                self.reduced.append(tensor.numel())
            return reduce(tensor, *others, **options)

        fitted.strategy.reduce = count

    def on_train_batch_end(self, fitted: pl.Trainer, *_: Any) -> None:
        value = fitted.callback_metrics.get(KEPT)
        self.values.append(None if value is None else value.item())


class Manual(Net):
    """A net that steps in every second batch."""

    automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_index: int) -> None:
        self.manual_backward(self.layers(batch[0]).square().mean())
        if batch_index % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


def fit(
    rank: int, folder: Path, module: type[Net], every: int, options: dict[str, Any]
) -> dict[str, Any]:
    warnings.filterwarnings("error", message=".*(PrecisionMonitor|UpdateMonitor|StepObserver)")
    torch.manual_seed(0)
    monitor = PrecisionMonitor(
        "bf16", every_n_steps=every, callback_metrics=["kept_update_ratio/bf16"]
    )
    see = See()
    stopping = EarlyStopping(KEPT, mode="min", stopping_threshold=2.0)
    saving = ModelCheckpoint(folder / "saved", monitor=KEPT, mode="max", every_n_train_steps=1)
    options = {
        "strategy": "ddp",
        "devices": 2,
        "max_epochs": 3,
        "enable_checkpointing": True,
    } | options
    fitted = trainer(folder, stopping, monitor, see, saving, logger=False, **options)
    data = DataLoader(batches(2 * BATCHES).dataset, batch_size=4, shuffle=False)
    fitted.fit(module(), data)
    return {
        "epochs": fitted.current_epoch,
        "values": see.values,
        "reduced": see.reduced,
        "best": saving.best_model_score.item(),
        "path": monitor.path,
    }


def assert_ranks_decide_alike(found: list[dict[str, Any]], steps: list[int]) -> None:
    first, second = found
    assert first["epochs"] == second["epochs"] == 1  # EarlyStopping
    assert first["values"] == second["values"]
    assert first["best"] == second["best"] == max(filter(None, first["values"]))  # ModelCheckpoint
    assert second["path"] is None
    rows = read(first["path"]).series("kept_update_ratio/bf16")
    assert [*rows] == steps
    passed = [*dict.fromkeys(filter(None, first["values"]))]
    assert passed == pytest.approx([*rows.values()], rel=1e-6)


def test_two_ranks_stop_and_save_by_the_figures_of_the_first(tmp_path: Path) -> None:
    found = run(fit, 2, tmp_path, Net, 3, {})
    assert_ranks_decide_alike(found, [0, 2, 5])
    # One all-reduce of two numbers in each batch that is due.
    assert found[0]["reduced"] == found[1]["reduced"] == [2, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "every", "options", "steps", "reduced"),
    [
        (Net, 2, {"accumulate_grad_batches": 2}, [0, 1], 2),
        (Manual, 1, {}, [1, 3, 5], 3),
        (Net, 100, {}, [0], 1),
    ],
    ids=["accumulation", "manual", "first batch only"],
)
def test_ranks_share_figures_only_after_steps_that_are_due(
    tmp_path: Path,
    module: type[Net],
    every: int,
    options: dict[str, Any],
    steps: list[int],
    reduced: int,
) -> None:
    found = run(fit, 2, tmp_path, module, every, options)
    assert_ranks_decide_alike(found, steps)
    assert found[0]["reduced"] == found[1]["reduced"] == [2] * reduced


def fail_to_observe(rank: int, folder: Path) -> dict[str, Any]:
    """Train with a monitor whose measurement fails on the first rank."""
    from altgrad.measurement.measurer import Measurer

    def broken(*_: Any) -> Any:
        raise RuntimeError("broken on purpose")

    Measurer.measure_batch = broken
    warnings.filterwarnings("ignore", message="PrecisionMonitor stops observing")
    monitor = PrecisionMonitor("bf16", every_n_steps=2, callback_metrics=["update_rms"])
    see = See()
    fitted = trainer(folder, monitor, see, logger=False, strategy="ddp", devices=2)
    fitted.fit(Net(), DataLoader(batches(2 * BATCHES).dataset, batch_size=4))
    return {
        "steps": fitted.global_step,
        "metrics": [*fitted.callback_metrics],
        "shared": see.reduced,
    }


def test_ranks_train_on_if_the_first_one_stops_observing(tmp_path: Path) -> None:
    for seen in run(fail_to_observe, 2, tmp_path):
        assert seen["steps"] == BATCHES
        assert not any("altgrad" in key for key in seen["metrics"])
        assert len(seen["shared"]) == len([0, 1, 3, 5])
