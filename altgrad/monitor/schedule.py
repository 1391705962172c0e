"""Which steps are observed: by a schedule, and as often as a share of the time allows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from altgrad._messages import check_int, check_type

_MOST_MULTIPLES = 1_000_000
_NEVER = -1


@dataclass(frozen=True)
class StepSchedule:
    """Steps at a fixed distance, or ever further apart, as a function of their number alone.

    Steps count from 0. As in Lightning, every 10 steps are the steps 9, 19, 29, …

    Args:
        every_n_steps: The step is due where ``(step + 1) % every_n_steps == 0``; at least 1.
        from_step: The first step that may be due.
        until_step: The first step that may not be due any more; None for no end.
        log_spaced: Of those steps, only the 1st, 2nd, 5th, 10th, 20th, 50th, … counted from
            from_step, each put off to the next that is due by every_n_steps.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A number is out of range, or no step would be due before until_step.
    """

    every_n_steps: int = 1
    from_step: int = 0
    until_step: int | None = None
    log_spaced: bool = False

    def __post_init__(self) -> None:
        check_int("every_n_steps", self.every_n_steps, 1)
        check_int("from_step", self.from_step, 0)
        check_type("log_spaced", self.log_spaced, bool)
        if self.until_step is None:
            return
        check_int("until_step", self.until_step, 0)
        first = _round_up(self.from_step + 1, self.every_n_steps) - 1
        if self.until_step <= first:
            raise ValueError(
                f"until_step={self.until_step}: expected more than {first}, the first step that "
                f"is due with every_n_steps={self.every_n_steps} and from_step={self.from_step}; "
                "raise it, or lower one of those"
            )

    def is_due(self, step: int) -> bool:
        """Whether to observe this step, counted from 0."""
        if (step + 1) % self.every_n_steps or step < self.from_step:
            return False
        if self.until_step is not None and step >= self.until_step:
            return False
        if not self.log_spaced:
            return True
        count = step - self.from_step + 1
        # The last one wished for was not yet due every_n_steps ago.
        return _last_of_1_2_5(count) > count - self.every_n_steps


class OverheadBudget:
    """Keeps the time that observing costs within a share of the whole, by observing less often.

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
        """Sets the smallest interval with ``own / (own + interval · training) <= share``.

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
        """The smallest allowed interval of at least these steps, or the largest allowed."""
        multiples = _round_up(steps, self.every_n_steps) // self.every_n_steps
        return self.every_n_steps * min(max(multiples, 1), _MOST_MULTIPLES)

    def is_due(self, step: int) -> bool:
        """Whether the steps since the last observed one have paid for it.

        Always before the first, and at steps before the last observed one: counting began anew.
        """
        last = self._last_observed_step
        return last == _NEVER or step < last or step >= last + self.interval

    def observed(self, step: int) -> None:
        """Notes that this step, counted from 0, was observed."""
        self._last_observed_step = step

    def state_dict(self) -> dict[str, int]:
        """What a run needs to go on; a last_observed_step of -1 says that there is none."""
        return {"interval": self.interval, "last_observed_step": self._last_observed_step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on from what `state_dict` returned.

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


def _round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is not below the number."""
    return number + -number % multiple


def _last_of_1_2_5(count: int) -> int:
    """The largest of 1, 2, 5, 10, 20, 50, … that is not above count, which is at least 1."""
    decade = 1
    while 10 * decade <= count:
        decade *= 10
    return next(factor * decade for factor in (5, 2, 1) if factor * decade <= count)
