"""`logged_step`, `find_interval` and `is_due`: which batches of a Trainer are observed.

Batches to observe are called due. They are counted as Lightning counts the steps that it logs.

Nothing needs to be read before this file. `session` and `callback_metrics` use these functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytorch_lightning import Trainer


def logged_step(trainer: Trainer) -> int:
    """Return the step at which Lightning logs the current batch."""
    # Lightning has no public name for this step. Its LearningRateMonitor reads the same attribute:
    # lightning/pytorch/callbacks/lr_monitor.py.
    return trainer.fit_loop.epoch_loop._batches_that_stepped  # noqa: SLF001


def find_interval(trainer: Trainer, every_n_steps: int | None) -> int:
    """Return the interval between batches whose optimizer steps are observed; 0 for none.

    Args:
        trainer: The Trainer.
        every_n_steps: The argument of `PrecisionMonitor`; None for the interval at which the
            Trainer logs.
    """
    # A Trainer that logs at no step has 0 or None here.
    return every_n_steps or getattr(trainer, "log_every_n_steps", None) or 0


def is_due(trainer: Trainer, every: int) -> bool:
    """Return True if the optimizer steps of the current batch are to be observed.

    These are the batches with the numbers ``every - 1``, ``2 * every - 1`` and so on.

    Args:
        trainer: The Trainer.
        every: The interval in batches; 0 for none.
    """
    return every > 0 and (logged_step(trainer) + 1) % every == 0
