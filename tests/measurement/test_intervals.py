"""Intervals from a figure and its standard error, against SciPy and exact probabilities."""

import math

import pytest
from hypothesis import example, given, strategies as st
from scipy import stats

from altgrad.measurement.intervals import WIDTH, find_interval, find_share_error


def find_wilson(count: int, elements: int) -> tuple[float, float]:
    interval = stats.binomtest(count, elements).proportion_ci(0.95, method="wilson")
    return interval.low, interval.high


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_of_a_share_is_wilsons(drawn: tuple[int, int]) -> None:
    count, elements = drawn
    low, high = find_wilson(count, elements)
    found = find_interval("stall_frac", count / elements, (high - low) / 2 / WIDTH)
    # Where fewer than 3 elements are of a kind, the interval reaches to that end.
    expected = (0.0 if count < 3 else low, 1.0 if elements - count < 3 else high)
    assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("count", [2, 3])
def test_an_interval_reaches_to_an_end_with_fewer_than_3_elements_whatever_is_rounded(
    count: int,
) -> None:
    for elements in range(6, 400):
        low, high = find_wilson(count, elements)
        error = (high - low) / 2 / WIDTH
        low, high = (low, high) if count == 3 else (0.0, high)
        found = find_interval("stall_frac", count / elements, error)
        assert found == pytest.approx((low, high), abs=1e-9)
        mirrored = find_interval("stall_frac", 1 - count / elements, error)
        assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-9)


@pytest.mark.parametrize("elements", [1, 2, 5, 41, 256, 4096])
def test_nine_of_ten_intervals_contain_the_share_whatever_it_is(elements: int) -> None:
    """The probability of each count is exact; the worst share is searched next to all ends."""
    ends = []
    for count in range(elements + 1):
        low, high = find_wilson(count, elements)
        error = (high - low) / 2 / WIDTH
        ends.append(find_interval("stall_frac", count / elements, error))
    edges = sorted({x for pair in ends for x in pair if 0 < x < 1})[:300]
    for share in [0.0, 1e-9, *(x + side * 1e-12 for x in edges for side in (-1, 1))]:
        inside = [k for k, (low, high) in enumerate(ends) if low <= share <= high]
        covered = stats.binom.pmf(inside, elements, share).sum()
        assert covered > 0.895, share


def test_an_interval_has_a_width_at_0_and_1() -> None:
    low, high = find_wilson(41, 41)
    found = find_interval("never_moved_frac", 1.0, (high - low) / 2 / WIDTH)
    assert found == pytest.approx((low, 1.0))
    assert found[0] < 0.92
    assert find_interval("never_moved_frac", 0.0, 0.02)[1] > 0.03


def test_the_interval_of_a_ratio_is_symmetric_and_may_leave_0_and_1() -> None:
    expected = stats.norm.interval(0.95, 0.99, 0.01)
    assert find_interval("kept_update_ratio", 0.99, 0.01) == pytest.approx(expected)


@pytest.mark.parametrize("metric", ["kept_update_ratio", "stall_frac"])
def test_figures_without_an_error_or_a_value_have_no_interval(metric: str) -> None:
    assert find_interval(metric, 0.3, 0.0) == (0.3, 0.3)
    assert all(map(math.isnan, find_interval(metric, 0.3, math.nan)))
    assert all(map(math.isnan, find_interval(metric, math.nan, 0.1)))


@pytest.mark.parametrize(("count", "elements"), [(0, 5), (7, 256), (41, 41)])
def test_the_error_of_a_share_is_half_of_wilsons_interval(count: int, elements: int) -> None:
    low, high = find_wilson(count, elements)
    assert find_share_error(count / elements, elements) == pytest.approx((high - low) / 2 / WIDTH)


def test_a_share_of_no_element_can_be_anything() -> None:
    assert find_interval("stall_frac", 0.5, 1.0) == (0.0, 1.0)


@given(share=st.floats(0, 1), error=st.floats(0, 1e300))
@example(share=0.0, error=5e-324)
def test_any_share_and_error_have_an_interval_from_0_to_1_around_the_share(
    share: float, error: float
) -> None:
    low, high = find_interval("stall_frac", share, error)
    assert 0 <= low <= share <= high <= 1


def test_unknown_metrics_are_errors() -> None:
    with pytest.raises(ValueError, match="unknown metric 'stall'"):
        find_interval("stall", 0.5, 0.1)
