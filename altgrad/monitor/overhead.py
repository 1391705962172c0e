"""Time observing and training, and bound the share of the time that observing takes.

`Clock` measures, `OverheadBudget` computes intervals from the numbers, and `Budgets` holds a budget
for each optimizer.

`policy` comes next and connects the three.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from fractions import Fraction
from typing import NamedTuple
from weakref import WeakKeyDictionary

from torch.optim import Optimizer

from altgrad._messages import check_int

_MOST_MULTIPLES = 1_000_000  # the longest interval, in multiples of the shortest one
_NEVER = -1  # in place of the last observed step, as long as there is none


class _Mark(NamedTuple):
    """The times at the end of an observed step of one optimizer.

    Attributes:
        step: Index of the step.
        end: Time of `time.perf_counter`, in seconds.
        own: Total time spent on observing until `end`, with all optimizers, in seconds.
        step_own: Time spent on observing since the previous observed step ended, in seconds; NaN
            for the first observed step.
    """

    step: int
    end: float
    own: float
    step_own: float


class Clock:
    """A clock of the host that separates the time to observe from the time to train."""

    def __init__(self) -> None:
        self._own = 0.0
        self._marks: WeakKeyDictionary[Optimizer, _Mark] = WeakKeyDictionary()

    @contextmanager
    def observing(self, seconds: float = 0.0) -> Iterator[None]:
        """Count the time within a ``with`` block, and `seconds` before it, as observing."""
        self._own += seconds
        start = time.perf_counter()
        try:
            yield
        finally:
            self._own += time.perf_counter() - start

    def seconds(self, optimizer: Optimizer, index: int) -> tuple[float, float]:
        """Return the time to observe the last observed step, and the mean time of a training step.

        Args:
            optimizer: The optimizer.
            index: Index of the step that is being observed.

        Returns:
            The time spent on observing between the ends of the last two observed steps of
            `optimizer`, other optimizers included; and the mean time of a training step since the
            last observed step. Both in seconds; NaN if unknown.
        """
        mark = self._marks.get(optimizer)
        if mark is None or index <= mark.step:  # steps are counted from 0 again
            return math.nan, math.nan
        training = time.perf_counter() - mark.end - (self._own - mark.own)
        return mark.step_own, max(training, 0.0) / (index - mark.step)

    def tick(self, optimizer: Optimizer, index: int) -> None:
        """Record the time at the end of an observed step, for the next call of `seconds`.

        Args:
            optimizer: The optimizer.
            index: Index of the step.
        """
        mark = self._marks.get(optimizer)
        # The first observed step also sets up memory, which no later step does: leave out its time.
        step_own = math.nan if mark is None else self._own - mark.own
        self._marks[optimizer] = _Mark(index, time.perf_counter(), self._own, step_own)


class OverheadBudget:
    """A limit on the share of the time that observing takes, kept by observing less often.

    The more an observed step costs, the more steps go unobserved after it. The interval depends
    only on the numbers passed in, and is equal on ranks that pass equal numbers.

    Args:
        share: Maximum share of the whole time, training and observing, that observing may take;
            between 0 and 1, both excluded.
        every_n_steps: Shortest interval in steps, at least 1. Every interval is a multiple of it.

    Attributes:
        share: The `share` argument.
        every_n_steps: The `every_n_steps` argument.
        interval: Number of steps from the last observed step to the next.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.
    """

    def __init__(self, share: float, every_n_steps: int) -> None:
        if isinstance(share, bool) or not isinstance(share, (int, float)):
            raise TypeError(f"share={share!r}: expected float, got {type(share).__name__}")
        if not 0 < share < 1:
            raise ValueError(
                f"share={share!r}: expected a number between 0 and 1, both excluded, such as 0.01 "
                "for 1 % of the time"
            )
        check_int("every_n_steps", every_n_steps, 1)
        self.share = share
        self.every_n_steps = every_n_steps
        self.interval = every_n_steps
        self._last_observed_step = _NEVER

    def update(self, own_seconds: float, training_seconds: float) -> None:
        """Set the shortest interval with ``own / (own + interval · training) <= share``.

        - The interval is a multiple of `every_n_steps`, from 1 to 1,000,000 times.
        - An `own_seconds` of 0 or below, within the noise of the clock, counts as no cost.
        - The interval is left unchanged if a number is NaN or infinite, or if `training_seconds`
          is 0 or below.

        Args:
            own_seconds: Time to observe the last observed step, in seconds.
            training_seconds: Mean time of a training step without observing, in seconds.
        """
        if not (math.isfinite(own_seconds) and math.isfinite(training_seconds)):
            return
        if training_seconds <= 0:
            return
        # Fractions neither overflow nor round to the wrong side of a whole number.
        share = Fraction(self.share)
        needed = Fraction(own_seconds) * (1 - share) / (share * Fraction(training_seconds))
        self.interval = self._allowed(math.ceil(needed))

    def _allowed(self, steps: int) -> int:
        """Return the smallest multiple of `every_n_steps` that is at least `steps`.

        The result is from 1 to 1,000,000 times `every_n_steps`.
        """
        multiples = -(-steps // self.every_n_steps)
        return self.every_n_steps * min(max(multiples, 1), _MOST_MULTIPLES)

    def is_due(self, step: int) -> bool:
        """Return True if a step is due, as the interval since the last observed step has passed.

        Before the first observed step, every step is due. So is a step with a lower index than the
        last observed step: steps are then counted from 0 again, as in a resumed run.
        """
        last = self._last_observed_step
        return last == _NEVER or step < last or step >= last + self.interval

    def mark_observed(self, step: int) -> None:
        """Record that a step, counted from 0, was observed: its cost delays the next one."""
        self._last_observed_step = step

    def state_dict(self) -> dict[str, int]:
        """Return the interval and the last observed step.

        Returns:
            A dict with the keys ``interval``, in steps, and ``last_observed_step``, an index; -1 if
            no step was observed.
        """
        return {"interval": self.interval, "last_observed_step": self._last_observed_step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore the interval and the last observed step from a result of `state_dict`.

        The saved run may have had another `every_n_steps`: the interval is rounded up to a multiple
        of this budget's `every_n_steps`, at most 1,000,000 times.

        Raises:
            TypeError: An entry is not an int.
            ValueError: An entry is missing or out of range.
        """
        expected = self.state_dict().keys()
        if state.keys() != expected:
            raise ValueError(
                f"state has the entries {sorted(state)}; expected {sorted(expected)}, as "
                "OverheadBudget.state_dict() returns them"
            )
        check_int("interval", state["interval"], 1)
        check_int("last_observed_step", state["last_observed_step"], _NEVER)
        self.interval = self._allowed(state["interval"])
        self._last_observed_step = state["last_observed_step"]


class Budgets:
    """A collection of limits on the time that observing takes, one `OverheadBudget` per optimizer.

    The limits are in the order of their first use.

    Args:
        share: Maximum share of the whole time that observing may take.
        every_n_steps: Shortest interval, in steps.

    Attributes:
        share: The `share` argument.
    """

    def __init__(self, share: float, every_n_steps: int) -> None:
        self.share = share
        self._unused = OverheadBudget(share, every_n_steps)
        # Weak keys: a budget goes when its optimizer goes.
        self._by_optimizer: WeakKeyDictionary[Optimizer, OverheadBudget] = WeakKeyDictionary()
        self._restored: list[Mapping[str, int]] = []

    def get(self, optimizer: Optimizer) -> OverheadBudget:
        """Return the limit on the time to observe an optimizer's steps, made on first use."""
        if optimizer not in self._by_optimizer:
            budget = copy(self._unused)
            if self._restored:
                budget.load_state_dict(self._restored.pop(0))
            self._by_optimizer[optimizer] = budget
        return self._by_optimizer[optimizer]

    def state_dict(self) -> list[Mapping[str, int]]:
        """Return the state of each `OverheadBudget`, in the order in which they were first used."""
        return [*(budget.state_dict() for budget in self._by_optimizer.values()), *self._restored]

    def load_state_dict(self, state: Sequence[Mapping[str, int]]) -> None:
        """Restore the `OverheadBudget` of each optimizer from a result of `state_dict`.

        The first optimizer used from now on gets the first saved budget, and so on.

        Raises:
            TypeError: An entry of a budget is not an int.
            ValueError: An entry of a budget is missing or out of range.
        """
        for each in state:
            copy(self._unused).load_state_dict(each)  # raises here, not in a later step
        self._by_optimizer.clear()
        self._restored = [*state]
