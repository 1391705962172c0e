"""Which batch it is, and whether it is due, against the steps at which Lightning logs the loss."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl

from altgrad_lightning.steps import find_interval, is_due, logged_step
from tests.lightning.runs import Net, batches, logged, trainer


@pytest.mark.parametrize(("every", "accumulated"), [(1, 1), (3, 1), (2, 2)])
def test_the_loss_is_logged_at_the_batches_that_are_due(
    tmp_path: Path, every: int, accumulated: int
) -> None:
    due: dict[int, bool] = {}

    class See(pl.Callback):
        def on_train_batch_end(self, run: pl.Trainer, *_: Any) -> None:
            due[logged_step(run)] = is_due(run, find_interval(run, None))

    run = trainer(tmp_path, See(), log_every_n_steps=every, accumulate_grad_batches=accumulated)
    run.fit(Net(), batches(8))
    assert [step for step in due if due[step]] == [
        step for step, _ in logged(run.logger.log_dir)["loss"]
    ]


@pytest.mark.parametrize(("own", "every", "found"), [(None, 50, 50), (7, 50, 7), (None, None, 0)])
def test_the_interval_is_that_of_the_trainer_unless_the_callback_has_its_own(
    own: int | None, every: int | None, found: int
) -> None:
    assert find_interval(SimpleNamespace(log_every_n_steps=every), own) == found


def test_no_batch_is_due_without_an_interval(tmp_path: Path) -> None:
    assert not is_due(trainer(tmp_path), 0)
