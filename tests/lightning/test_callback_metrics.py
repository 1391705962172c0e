"""Figures of the model in `Trainer.callback_metrics`, for EarlyStopping and ModelCheckpoint."""

import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

from altgrad import SamplingRule
from altgrad.report import read
from altgrad_lightning import PrecisionMonitor
from tests.lightning.runs import Net, batches, trainer

KEPT = "altgrad/kept_update_ratio/bf16"


class See(pl.Callback):
    """A callback that records a value and the latest figures at the end of each batch."""

    def __init__(self, monitor: PrecisionMonitor, key: str = KEPT) -> None:
        self.monitor, self.key = monitor, key
        self.values: list[float | None] = []
        self.figures: list[float] = []

    def on_train_batch_end(self, run: pl.Trainer, *_: Any) -> None:
        value = run.callback_metrics.get(self.key)
        self.values.append(None if value is None else value.item())
        figures = self.monitor.latest_model
        key = self.key.removeprefix("altgrad/")
        self.figures.append(math.nan if figures is None else figures[key])


def test_callbacks_find_the_figures_from_the_first_batch_on(tmp_path: Path) -> None:
    monitor = PrecisionMonitor(
        "bf16", every_n_steps=3, callback_metrics=["kept_update_ratio/bf16", "update_rms"]
    )
    see = See(monitor)
    run = trainer(tmp_path, monitor, see, logger=False, max_epochs=2)
    run.fit(Net(), batches(4))
    assert read(monitor.path).steps == (0, 2, 5)
    assert see.values == pytest.approx(see.figures, rel=1e-6)
    assert len({*see.values}) == 3
    assert "altgrad/update_rms" in run.callback_metrics
    assert not any("altgrad" in key for key in run.logged_metrics)


def test_only_the_due_batches_are_observed_without_callback_metrics(tmp_path: Path) -> None:
    monitor = PrecisionMonitor("bf16", every_n_steps=3)
    run = trainer(tmp_path, monitor, logger=False)
    run.fit(Net(), batches(4))
    assert read(monitor.path).steps == (2,)
    assert not any("altgrad" in key for key in run.callback_metrics)


def test_the_last_finite_value_stays(tmp_path: Path) -> None:
    class Resting(Net):
        """A net whose update at step 2 is 0, so that nothing can be kept of it."""

        def on_before_zero_grad(self, optimizer: Any) -> None:
            optimizer.param_groups[0]["lr"] = 1e-30 if self.trainer.global_step == 2 else 1e-3

    monitor = PrecisionMonitor("bf16", every_n_steps=1, callback_metrics=["kept_update_ratio/bf16"])
    see = See(monitor)
    trainer(tmp_path, monitor, see, logger=False).fit(Resting(), batches(4))
    assert [math.isnan(each) for each in see.figures] == [False, False, True, False]
    assert see.values[2] == see.values[1] != see.values[3]


def test_a_format_without_layers_in_a_step_has_no_value(tmp_path: Path) -> None:
    class Alternating(Net):
        """A net whose first layer has no gradient in every second batch."""

        def on_after_backward(self) -> None:
            if self.trainer.global_step % 2 == 0:
                self.layers[0].zero_grad()

    rule = SamplingRule("layers.0.*", formats=["e5m2"])
    key = "kept_update_ratio/e5m2"
    monitor = PrecisionMonitor(
        "bf16", every_n_steps=1, sampling=[rule], callback_metrics=[key, "update_rms"], strict=True
    )
    see = See(monitor, "altgrad/update_rms")
    run = trainer(tmp_path, monitor, see, logger=False)
    run.fit(Alternating(), batches(3))
    assert run.global_step == 3
    assert see.values == pytest.approx(see.figures, rel=1e-6)
    shown = read(monitor.path).series(key)
    assert run.callback_metrics[f"altgrad/{key}"].item() == pytest.approx(shown[1], rel=1e-6)


def test_a_figure_beyond_float32_is_left_out(tmp_path: Path) -> None:
    class Exploding(Net):
        """A net with a float64 layer whose update exceeds float32 at step 2."""

        def on_before_zero_grad(self, optimizer: Any) -> None:
            optimizer.param_groups[0]["lr"] = 1e60 if self.trainer.global_step == 2 else 1e-3

    keys = ["update_rms"]
    monitor = PrecisionMonitor("bf16", every_n_steps=1, recipes=(), callback_metrics=keys)
    see = See(monitor, "altgrad/update_rms")
    run = trainer(tmp_path, monitor, see, logger=False, precision="64-true")
    run.fit(Exploding(), batches(3))
    assert see.figures[2] > 1e50
    assert see.values[2] == see.values[1]


def test_a_first_batch_that_is_skipped_is_followed_by_the_next_one(tmp_path: Path) -> None:
    class Warm(Net):
        def on_before_zero_grad(self, optimizer: Any) -> None:
            optimizer.param_groups[0]["lr"] = 1e-3 * (self.trainer.global_step > 1)

    monitor = PrecisionMonitor("bf16", every_n_steps=4, callback_metrics=["update_rms"])
    see = See(monitor, "altgrad/update_rms")
    trainer(tmp_path, monitor, see, logger=False).fit(Warm(), batches(4))
    assert read(monitor.path).steps == (2, 3)
    assert [value is None for value in see.values] == [True, True, False, False]


def test_early_stopping_and_checkpoints_use_a_figure(tmp_path: Path) -> None:
    monitor = PrecisionMonitor("bf16", every_n_steps=2, callback_metrics=["kept_update_ratio/bf16"])
    see = See(monitor)
    stopping = EarlyStopping(KEPT, mode="min", stopping_threshold=2.0)
    saving = ModelCheckpoint(tmp_path, monitor=KEPT, mode="max", every_n_train_steps=1)
    run = trainer(
        tmp_path,
        stopping,
        saving,
        monitor,
        see,
        logger=False,
        max_epochs=3,
        enable_checkpointing=True,
    )
    run.fit(Net(), batches(4))
    assert run.current_epoch == 1
    assert saving.best_model_score.item() == max(see.values)


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ("update_rms", TypeError, "callback_metrics='update_rms': expected a list"),
        ([3], TypeError, r"callback_metrics=\[3\]: expected a list"),
        (["update_rms", "kept_update_ratio"], ValueError, r"correct \['kept_update_ratio'\]"),
        (
            ["kept_update_ratio/e5m2"],
            ValueError,
            "such as 'update_rms' or 'kept_update_ratio/bf16'",
        ),
    ],
)
def test_unknown_figures_are_an_error(keys: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PrecisionMonitor("bf16", callback_metrics=keys)


def test_a_format_of_a_rule_is_known() -> None:
    rule = SamplingRule("*", formats=["e5m2"])
    PrecisionMonitor("bf16", sampling=[rule], callback_metrics=["kept_update_ratio/e5m2"])
