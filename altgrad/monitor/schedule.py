"""`StepSchedule`: which steps are observed, by their number alone."""

from __future__ import annotations

from dataclasses import dataclass

from altgrad._messages import check_int, check_type


@dataclass(frozen=True)
class StepSchedule:
    """A schedule of steps at a fixed distance, or ever further apart.

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
        """Return whether to observe this step, counted from 0."""
        if (step + 1) % self.every_n_steps or step < self.from_step:
            return False
        if self.until_step is not None and step >= self.until_step:
            return False
        if not self.log_spaced:
            return True
        count = step - self.from_step + 1
        # The last one wished for was not yet due every_n_steps ago.
        return _last_of_1_2_5(count) > count - self.every_n_steps


def _round_up(number: int, multiple: int) -> int:
    """Return the smallest multiple that is not below the number."""
    return number + -number % multiple


def _last_of_1_2_5(count: int) -> int:
    """Return the largest of 1, 2, 5, 10, 20, 50, … up to count, which is at least 1."""
    decade = 1
    while 10 * decade <= count:
        decade *= 10
    return next(factor * decade for factor in (5, 2, 1) if factor * decade <= count)
