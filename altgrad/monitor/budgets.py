"""`Budgets`: an `OverheadBudget` for each optimizer, whose steps are counted apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from weakref import WeakKeyDictionary

from torch.optim import Optimizer

from altgrad.monitor.schedule import OverheadBudget


class Budgets:
    """Those of all optimizers, in the order in which they are first asked for.

    Args:
        share, every_n_steps: As in `OverheadBudget`.

    Attributes:
        share: As given.
    """

    def __init__(self, share: float, every_n_steps: int) -> None:
        self.share = share
        self._unused = OverheadBudget(share, every_n_steps)
        self._of: WeakKeyDictionary[Optimizer, OverheadBudget] = WeakKeyDictionary()
        self._restored: list[Mapping[str, int]] = []

    def of(self, optimizer: Optimizer) -> OverheadBudget:
        """That of one."""
        if optimizer not in self._of:
            budget = copy(self._unused)
            if self._restored:
                budget.load_state_dict(self._restored.pop(0))
            self._of[optimizer] = budget
        return self._of[optimizer]

    def state_dict(self) -> list[Mapping[str, int]]:
        """Of each, in their order."""
        return [*(budget.state_dict() for budget in self._of.values()), *self._restored]

    def load_state_dict(self, state: Sequence[Mapping[str, int]]) -> None:
        """The reverse, for the optimizers that will be asked for from now on."""
        self._of.clear()
        self._restored = [*state]
