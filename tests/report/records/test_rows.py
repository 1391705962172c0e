"""`Row`: which keys belong to twins, and the intervals of figures."""

import math

import pytest

from altgrad.report import Row
from altgrad.report.records.rows import is_twin_key


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        *(("update_rms", False), ("stall_frac/bf16", False), ("frozen_frac/bf16", True)),
        *(("exp_avg_sq_ratio/bf16", True), ("of_a_newer_version/bf16", True), ("new", False)),
    ],
)
def test_the_metric_tells_twins_from_formats(key: str, expected: bool) -> None:
    assert is_twin_key(key) is expected


def test_a_figure_without_an_error_is_exact_unless_it_is_of_a_twin() -> None:
    figures = {"stall_frac/bf16": 0.5, "frozen_frac/bf16": 0.25}
    row = Row(0, "a", figures, {})
    assert row.interval("stall_frac/bf16") == (0.5, 0.5)
    assert all(map(math.isnan, row.interval("frozen_frac/bf16")))
    assert row.twins == {"bf16": {"frozen_frac": 0.25}}
