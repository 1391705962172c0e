"""`Panels`: lines of the headline over a whole run, in bounded memory."""

import math

import pytest

from altgrad.output.charts import Row
from altgrad.output.panels import Panels


def make_row(step: int, **model: float) -> Row:
    return Row(step, {key.replace("__", "/"): value for key, value in model.items()}, {}, {})


def test_a_panel_has_a_line_for_each_recipe_without_missing_values() -> None:
    panels = Panels()
    panels.add(make_row(3, progress_kept__bf16=0.5, progress_kept__e5m2=math.nan, lost_now=0.0))
    panels.add(make_row(7, progress_kept__bf16=0.25, frozen_layers__bf16=2.0, ulp_mean=1.0))
    assert panels.list_lines() == {
        "progress_kept": {"bf16": ([3, 7], [0.5, 0.25])},
        "frozen_layers": {"bf16": ([7], [2.0])},
    }


@pytest.mark.parametrize("most", [2, 5, 8])
def test_a_long_run_keeps_evenly_spaced_steps_from_the_first_on(most: int) -> None:
    panels = Panels(most)
    for step in range(100):
        panels.add(make_row(step, progress_kept__bf16=step / 100))
        steps, values = panels.list_lines()["progress_kept"]["bf16"]
        assert len(steps) <= most
        assert values == [each / 100 for each in steps]
        every = steps[1] - steps[0] if len(steps) > 1 else 1
        assert steps == [*range(0, steps[-1] + 1, every)]
        assert step - steps[-1] < 2 * every
