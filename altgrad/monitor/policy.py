"""`StepPolicy`: decide which steps are observed, by their index and by what observing costs.

Read `schedule` and `overhead` first, which `StepPolicy` combines; `training_steps` comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from altgrad.monitor.overhead import Budgets, Clock
from altgrad.monitor.schedule import StepSchedule

if TYPE_CHECKING:
    from torch.optim import Optimizer


class StepPolicy:
    """A policy that decides which steps are observed: by a schedule, and by a limit on time.

    Args:
        every_n_steps: Interval in steps, a `StepSchedule`, or a function of a step's index that
            returns True if the step is to be observed.
        overhead_budget: Maximum share of the whole time that observing may take. None sets no
            limit.

    Attributes:
        every_n_steps: Shortest interval between observed steps, in steps; 1 for a function.
        is_wanted: Function of a step's index that returns True if the schedule includes the step,
            whatever it costs.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        every_n_steps: int | StepSchedule | Callable[[int], bool],
        overhead_budget: float | None,
    ) -> None:
        if not (isinstance(every_n_steps, StepSchedule) or callable(every_n_steps)):
            every_n_steps = StepSchedule(every_n_steps)
        if isinstance(every_n_steps, StepSchedule):
            self.is_wanted: Callable[[int], bool] = every_n_steps.is_due
            self.every_n_steps = every_n_steps.every_n_steps
        else:
            # The steps that a function selects are not known in advance: assume every step.
            self.is_wanted = every_n_steps
            self.every_n_steps = 1
        self._clock = Clock()
        self._budgets = None
        if overhead_budget is not None:
            self._budgets = Budgets(overhead_budget, self.every_n_steps)

    @property
    def overhead_budget(self) -> float | None:
        """The maximum share of the whole time that observing may take; None without a limit."""
        return None if self._budgets is None else self._budgets.share

    def is_paid_for(self, optimizer: Optimizer, index: int) -> bool:
        """Return True if the limit on the time of observing allows to observe a step.

        Args:
            optimizer: The optimizer.
            index: Index of the step to decide about.
        """
        return self._budgets is None or self._budgets.get(optimizer).is_due(index)

    def observing(self, seconds: float = 0.0) -> AbstractContextManager[None]:
        """Count the time within a ``with`` block, and `seconds` before it, as observing."""
        return self._clock.observing(seconds)

    def seconds(self, optimizer: Optimizer, index: int) -> tuple[float, float]:
        """Return the time to observe the last observed step, and the mean time of a training step.

        Args:
            optimizer: The optimizer.
            index: Index of the step that is being observed.

        Returns:
            The time to observe, and the mean time of the training steps since then, both in
            seconds; NaN if unknown.
        """
        return self._clock.seconds(optimizer, index)

    def charge(self, optimizer: Optimizer, index: int, seconds: tuple[float, float]) -> None:
        """Count the time to observe a step, by which the overhead budget delays the next one.

        Args:
            optimizer: The optimizer.
            index: Index of the step.
            seconds: Result of the method `seconds`, or the maximum over ranks.
        """
        if self._budgets is not None:
            budget = self._budgets.get(optimizer)
            budget.update(*seconds)
            budget.mark_observed(index)

    def mark_end(self, optimizer: Optimizer, index: int) -> None:
        """Record the time at the end of an observed step, for the next call of `seconds`.

        Args:
            optimizer: The optimizer.
            index: Index of the observed step.
        """
        self._clock.tick(optimizer, index)

    def state_dict(self) -> list[Mapping[str, int]] | None:
        """Return the state of each optimizer's overhead budget; None without a budget."""
        return None if self._budgets is None else self._budgets.state_dict()

    def load_state_dict(self, state: Sequence[Mapping[str, int]] | None) -> None:
        """Restore overhead budgets from a `state_dict`; do nothing if one of the runs has none."""
        if self._budgets is not None and state is not None:
            self._budgets.load_state_dict(state)
