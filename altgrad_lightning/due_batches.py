"""`DueBatches`: decide which optimizer steps of a Trainer are observed.

Every n-th batch is due, and steps in a due batch are observed. An optimizer that does not step in a
due batch is observed at its next step: otherwise an optimizer that steps in every fifth batch might
never be observed.

Nothing needs to be read before this file. `session` calls `DueBatches.take_step` before each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

from torch.optim import Optimizer


class DueBatches:
    """A schedule of the optimizer steps that are observed (measured): those in every n-th batch.

    These batches are called due. An optimizer that does not step in one is observed at its next
    step. The schedule remembers the batch in which each optimizer was last observed.

    Args:
        every: Interval n between due batches. With 0 no batch is due.

    Attributes:
        every: The `every` argument.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._last: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._restored: list[int] = []
        self._before_first: int | None = None  # the batch before the first one of this training
        self._last_step: int | None = None  # the batch of the last step of any optimizer

    def take_step(self, optimizer: Optimizer, batch: int) -> bool:
        """Return True if a step is to be observed, and then remember its batch for the optimizer.

        If an optimizer steps several times in an observed batch, all these steps are observed.

        Args:
            optimizer: The optimizer that is about to step.
            batch: Number of the batch, counted from 0.
        """
        self._last_step = batch
        if not self.every:
            return False
        # Read at the first step: Lightning corrects the number of a resumed batch that late.
        if self._before_first is None:
            self._before_first = batch - 1
        latest_due = (batch + 1) // self.every * self.every - 1
        if latest_due <= self._last.get(optimizer, self._before_first) < batch:
            return False
        self._last[optimizer] = batch
        return True

    def misses_steps(self, batch: int) -> bool:
        """Return True if a due batch ends, and no step was seen in it or in the one before.

        The previous batch counts, because batches whose gradients accumulate have the same number,
        and optimizers step in the last of these batches alone.

        Args:
            batch: Number of the batch that ends.
        """
        if self._last_step is None:
            self._last_step = batch - 1
        is_due = self.every > 0 and (batch + 1) % self.every == 0
        return is_due and batch - self._last_step > 1

    def get_last(self, optimizers: Sequence[Optimizer]) -> list[int]:
        """Return the batch in which each optimizer was last observed, for a checkpoint.

        Args:
            optimizers: The optimizers of the Trainer.

        Returns:
            The numbers of the batches, in the order of the optimizers. An optimizer that was not
            observed has the number of the batch before the training began. Before the first step,
            the numbers are the restored numbers.
        """
        if self._before_first is None:
            return [*self._restored]
        return [self._last.get(each, self._before_first) for each in optimizers]

    def restore_last(self, optimizers: Sequence[Optimizer], last: object) -> None:
        """Restore a result of `get_last`, or ignore an invalid value, as from a damaged checkpoint.

        Args:
            optimizers: The optimizers of the Trainer, in the order of the call of `get_last`.
            last: Number of the batch in which each optimizer was last observed.
        """
        if not isinstance(last, list) or not all(isinstance(each, int) for each in last):
            return
        self._restored = [*last]
        self._last.update(zip(optimizers, last, strict=False))
