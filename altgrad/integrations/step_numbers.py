"""`StepNumbers`: number the steps of a training that may have several optimizers.

Each optimizer counts its own steps. The training gives out one number for all of them: optimizers
share a number as long as each steps at most once, and a second step begins the next number::

    optimizers:  critic  critic  critic generator  critic
    numbers:     0       1       2      2          3

Read this file first. `run_watch` comes next: it writes one record for each number.
"""

from __future__ import annotations

from torch.optim import Optimizer


class StepNumbers:
    """The numbers of a training's steps, which optimizers share as long as each steps once.

    The next number begins when one of the optimizers steps again. All steps in one backward pass
    count as those of one optimizer, None.

    Args:
        first: Number of the first step.

    Attributes:
        first: The `first` argument.
        last: Number of the last step that began; `first` − 1 before the first one.
    """

    def __init__(self, first: int = 0) -> None:
        self.first = first
        self.last = first - 1
        self._indices: dict[Optimizer | None, int] = {}  # of those that made the last step

    @property
    def has_begun(self) -> bool:
        """True after the first step."""
        return self.last >= self.first

    def find_next(self, optimizer: Optimizer | None, index: int) -> int:
        """Return the number of the coming step of an optimizer.

        Args:
            optimizer: The optimizer; None for a step inside of a backward pass.
            index: The optimizer's own count of its steps. A step that a GradScaler skips has the
                same index as the next one, and keeps its number.
        """
        made = self._indices.get(optimizer)
        is_new = not self._indices or (made is not None and made != index)
        return self.last + is_new

    def begin(self, number: int) -> None:
        """Begin the step that has this number; no optimizer has taken part in it yet."""
        self.last = number
        self.end()

    def join(self, optimizer: Optimizer | None, index: int) -> None:
        """Record that an optimizer takes part in the last step that began.

        Args:
            optimizer: The optimizer; None for a step inside of a backward pass.
            index: The optimizer's own count of its steps.
        """
        self._indices[optimizer] = index

    def end(self) -> None:
        """End the last step, so that the next step of any optimizer begins a new number."""
        self._indices.clear()
