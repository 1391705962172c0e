"""Means of figures of which some have no value."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, strategies as st

from altgrad.report.means import average_finite


@pytest.mark.parametrize("values", [[], [math.nan], [math.inf, math.nan, -math.inf]])
def test_the_mean_of_no_finite_value_is_nan(values: list[float]) -> None:
    assert math.isnan(average_finite(values))


@given(st.lists(st.floats(min_value=1e-200, max_value=1e200), min_size=1, max_size=20))
def test_values_without_a_number_are_left_out_of_the_mean(values: list[float]) -> None:
    exact = sum(map(Fraction, values)) / len(values)
    assert average_finite([math.nan, *values, math.inf]) == pytest.approx(float(exact), rel=1e-15)


@given(st.lists(st.sampled_from([1.7976931348623157e308, -1e308, 0.0]), min_size=1, max_size=9))
def test_a_mean_of_the_largest_floats_does_not_overflow(values: list[float]) -> None:
    exact = sum(map(Fraction, values)) / len(values)
    assert average_finite(values) == pytest.approx(float(exact), rel=1e-15)
