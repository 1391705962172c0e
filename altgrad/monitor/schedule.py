"""`StepSchedule`: decide by the index of a step alone whether it is observed.

`policy` comes next, which also limits the cost of observing.
"""

from __future__ import annotations

from dataclasses import dataclass

from altgrad._messages import check_int, check_type


@dataclass(frozen=True)
class StepSchedule:
    """A schedule of steps at equal intervals, or at intervals that grow.

    Steps count from 0. An interval of 10 means the steps 9, 19, 29, …, as in Lightning.

    Args:
        every_n_steps: Interval in steps, at least 1: a step is due if
            ``(step + 1) % every_n_steps == 0``.
        from_step: Index of the first step that may be due.
        until_step: Index of the first step that is not due any more. None for no end.
        log_spaced: If True, only the 1st, 2nd, 5th, 10th, 20th, 50th, … step from `from_step` on
            is due, each moved to the next step that `every_n_steps` allows.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A number is out of range, or no step would be due before `until_step`.
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
        """Return True if a step, counted from 0, is to be observed."""
        if (step + 1) % self.every_n_steps or step < self.from_step:
            return False
        if self.until_step is not None and step >= self.until_step:
            return False
        if not self.log_spaced:
            return True
        count = step - self.from_step + 1
        # Each of 1, 2, 5, 10, … is due at the next multiple of every_n_steps, which is this step if
        # the largest of them so far was not yet reached every_n_steps ago.
        return _largest_1_2_5(count) > count - self.every_n_steps


def _round_up(number: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `number`."""
    return number + -number % multiple


def _largest_1_2_5(count: int) -> int:
    """Return the largest of 1, 2, 5, 10, 20, 50, … that is at most `count`, which is at least 1."""
    decade = 1
    while 10 * decade <= count:
        decade *= 10
    return next(factor * decade for factor in (5, 2, 1) if factor * decade <= count)
