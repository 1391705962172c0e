"""`StepPolicy`: which steps are observed, as far as their number and their cost decide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from altgrad.monitor.overhead import Budgets, Clock
from altgrad.monitor.schedule import StepSchedule

if TYPE_CHECKING:
    from torch.optim import Optimizer


class StepPolicy:
    """The schedule of a monitor, its budget of time, and the clock that both go by.

    Args:
        every_n_steps: Interval in steps, a `StepSchedule`, or a function of a step's index that
            returns whether to observe it.
        overhead_budget: The share of all time that observing may take; None sets no limit.

    Attributes:
        every_n_steps: The least distance between observed steps that is known beforehand.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: A number out of range.
    """

    def __init__(
        self,
        every_n_steps: int | StepSchedule | Callable[[int], bool],
        overhead_budget: float | None,
    ) -> None:
        if not (isinstance(every_n_steps, StepSchedule) or callable(every_n_steps)):
            every_n_steps = StepSchedule(every_n_steps)
        if isinstance(every_n_steps, StepSchedule):
            self._is_wanted: Callable[[int], bool] = every_n_steps.is_due
            self.every_n_steps = every_n_steps.every_n_steps
        else:
            self._is_wanted = every_n_steps
            self.every_n_steps = 1
        self._clock = Clock()
        self._budgets = None
        if overhead_budget is not None:
            self._budgets = Budgets(overhead_budget, self.every_n_steps)

    @property
    def overhead_budget(self) -> float | None:
        """Return the share of all time that observing may take; None if there is no limit."""
        return None if self._budgets is None else self._budgets.share

    def is_wanted(self, index: int) -> bool:
        """Return whether the schedule has this step."""
        return self._is_wanted(index)

    def is_paid_for(self, optimizer: Optimizer, index: int) -> bool:
        """Return whether the steps since the last observed one have paid for it.

        Args:
            optimizer: The optimizer.
            index: Index of the step that may be observed.
        """
        return self._budgets is None or self._budgets.of(optimizer).is_due(index)

    def observing(self, seconds: float = 0.0) -> AbstractContextManager[None]:
        """Count what is done within as observing, and these seconds with it."""
        self._clock.add(seconds)
        return self._clock.observing()

    def seconds(self, optimizer: Optimizer, index: int) -> tuple[float, float]:
        """Return what the last observed step cost, and how long a step of training takes.

        Args:
            optimizer: The optimizer.
            index: Index of the step that is being observed.

        Returns:
            Both in seconds; NaN where they are not known.
        """
        return self._clock.seconds(optimizer, index)

    def observed(self, optimizer: Optimizer, index: int, seconds: tuple[float, float]) -> None:
        """Charge the budget of an optimizer for a step that was observed.

        Args:
            optimizer: The optimizer.
            index: Index of the step.
            seconds: What `seconds` returned; of several ranks the largest.
        """
        if self._budgets is not None:
            budget = self._budgets.of(optimizer)
            budget.update(*seconds)
            budget.observed(index)

    def ended(self, optimizer: Optimizer, index: int) -> None:
        """Start the clock of the next observed step.

        Args:
            optimizer: The optimizer.
            index: Index of the step that has been observed.
        """
        self._clock.tick(optimizer, index)

    def state_dict(self) -> list[Mapping[str, int]] | None:
        """Return the interval and the last observed step of each budget; None without one."""
        return None if self._budgets is None else self._budgets.state_dict()

    def load_state_dict(self, state: Sequence[Mapping[str, int]] | None) -> None:
        """Go on with the budgets of a `state_dict`, if both runs have one."""
        if self._budgets is not None and state is not None:
            self._budgets.load_state_dict(state)
