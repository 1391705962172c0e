"""What observing costs beside training, and how a share of the time bounds it."""

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

_MOST_MULTIPLES = 1_000_000
_NEVER = -1


class _Mark(NamedTuple):
    """The end of an observed step of one optimizer."""

    step: int
    end: float
    own: float  # all that was spent on observing until then
    own_of_step: float  # of that, since the mark before


class Clock:
    """A clock of the host: seconds spent on observing, and seconds of training between."""

    def __init__(self) -> None:
        self._own = 0.0
        self._marks: WeakKeyDictionary[Optimizer, _Mark] = WeakKeyDictionary()

    def add(self, seconds: float) -> None:
        """Add seconds that were spent on observing."""
        self._own += seconds

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Count what is done within."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._own += time.perf_counter() - start

    def seconds(self, optimizer: Optimizer, index: int) -> tuple[float, float]:
        """Return what the last observed step cost, and how long a step of training takes.

        Args:
            optimizer: The optimizer.
            index: Index of the step that is being observed.

        Returns:
            Seconds of observing, of all optimizers, up to the last observed step of this one; and
            the mean seconds of a step of training since then. NaN where they are not known.
        """
        mark = self._marks.get(optimizer)
        if mark is None or index <= mark.step:  # counted anew
            return math.nan, math.nan
        training = time.perf_counter() - mark.end - (self._own - mark.own)
        return mark.own_of_step, max(training, 0.0) / (index - mark.step)

    def tick(self, optimizer: Optimizer, index: int) -> None:
        """Note the end of an observed step.

        Args:
            optimizer: The optimizer.
            index: Index of the step.
        """
        mark = self._marks.get(optimizer)
        # The first does what no other has to do: it tells nothing.
        own_of_step = math.nan if mark is None else self._own - mark.own
        self._marks[optimizer] = _Mark(index, time.perf_counter(), self._own, own_of_step)


class OverheadBudget:
    """A limit on the time that observing costs, kept by observing less often.

    Each observed step is followed by as many steps as pay for it. All decisions follow from the
    numbers passed in and nothing else: ranks that pass equal numbers decide equally.

    Args:
        share: The share of the whole time, training and observing, that observing may take;
            between 0 and 1, both excluded.
        every_n_steps: The smallest interval, of which every interval is a multiple, in steps; at
            least 1.

    Attributes:
        interval: Steps from the last observed step to the next.

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
        """Set the smallest interval with ``own / (own + interval · training) <= share``.

        - It is a multiple of every_n_steps, at least that itself, at most 1,000,000 times that.
        - An own_seconds of 0 or below, within the noise of the clock, is no cost.
        - Where a number is NaN or infinite, or training_seconds is 0 or below, nothing is known,
          and the interval stays as it is.

        Args:
            own_seconds: What the last observed step cost beside training, in seconds.
            training_seconds: The mean time of a training step without that, in seconds.
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
        """Return the smallest allowed interval of at least these steps, or the largest allowed."""
        multiples = -(-steps // self.every_n_steps)
        return self.every_n_steps * min(max(multiples, 1), _MOST_MULTIPLES)

    def is_due(self, step: int) -> bool:
        """Return whether the steps since the last observed one have paid for it.

        True before the first observed step, and at steps before the last observed one: there the
        count of steps began anew.
        """
        last = self._last_observed_step
        return last == _NEVER or step < last or step >= last + self.interval

    def observed(self, step: int) -> None:
        """Note that this step, counted from 0, was observed."""
        self._last_observed_step = step

    def state_dict(self) -> dict[str, int]:
        """Return the interval and the last observed step; -1 if no step was observed."""
        return {"interval": self.interval, "last_observed_step": self._last_observed_step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore what `state_dict` returned.

        Under another every_n_steps, the interval becomes the next larger one that is allowed.

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
    """A budget for each optimizer, in the order in which they are first asked for.

    Args:
        share: The share of the whole time that observing may take.
        every_n_steps: The smallest interval, in steps.

    Attributes:
        share: The `share` argument.
    """

    def __init__(self, share: float, every_n_steps: int) -> None:
        self.share = share
        self._unused = OverheadBudget(share, every_n_steps)
        self._of: WeakKeyDictionary[Optimizer, OverheadBudget] = WeakKeyDictionary()
        self._restored: list[Mapping[str, int]] = []

    def of(self, optimizer: Optimizer) -> OverheadBudget:
        """Return the budget of an optimizer, creating it on first use."""
        if optimizer not in self._of:
            budget = copy(self._unused)
            if self._restored:
                budget.load_state_dict(self._restored.pop(0))
            self._of[optimizer] = budget
        return self._of[optimizer]

    def state_dict(self) -> list[Mapping[str, int]]:
        """Return the state of each budget, in their order."""
        return [*(budget.state_dict() for budget in self._of.values()), *self._restored]

    def load_state_dict(self, state: Sequence[Mapping[str, int]]) -> None:
        """Restore budgets, for the optimizers that are asked for from now on."""
        self._of.clear()
        self._restored = [*state]
