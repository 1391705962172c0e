"""Shares in two decimals that stand beside verdicts, and never on the other side of a threshold."""

import itertools
import math
from fractions import Fraction

import pytest

from altgrad.report.judging.calibration import calibration
from altgrad.report.judging.decimals import (
    format_difference,
    format_error,
    format_figure,
    format_interval,
    format_kept,
    format_lost,
)

TWINS, STEPS = calibration().thresholds, calibration().step_thresholds
BEGINNINGS = (
    *(TWINS.stores_fine, TWINS.needs_remedy, TWINS.frozen_kept),
    *(STEPS.stores_fine, STEPS.needs_remedy),
)


@pytest.mark.parametrize(
    ("kept", "text"),
    [
        *((1.0, "1.00"), (0.9999, "0.99"), (0.996, "0.99"), (0.494, "0.49"), (0.9796, "0.97")),
        *((0.001, "0.01"), (0.0, "0.00"), (-0.3, "-0.30"), (1.44, "1.44"), (math.nan, "")),
        *((-0.001, "-0.01"), (1.1, "1.10"), (1.1000001, "1.11"), (1.0999, "1.10")),
        *((-999.0, "-999.00"), (5432.1, "5e+03"), (-1e300, "-1e+300"), (math.inf, "inf")),
    ],
)
def test_a_share_that_is_kept_has_two_decimals(kept: float, text: str) -> None:
    assert format_kept(kept) == text


@pytest.mark.parametrize("limit", BEGINNINGS)
def test_a_share_below_a_threshold_is_not_rounded_up_to_it(limit: float) -> None:
    below = math.nextafter(limit, 0)
    assert float(format_kept(limit)) == pytest.approx(limit, abs=0.005)
    assert float(format_kept(below)) < limit


def test_the_text_of_a_share_is_near_it_and_on_its_side_of_each_threshold() -> None:
    for kept in (k / 4000 for k in range(-1000, 5001)):
        text = format_kept(kept)
        shown = Fraction(text)
        assert abs(shown - Fraction(kept)) <= Fraction(1, 100)
        for limit in (0, 1, *BEGINNINGS):
            assert (shown >= Fraction(str(limit))) == (kept >= limit), (text, limit)
        assert (shown > Fraction(str(TWINS.overshoots))) == (kept > TWINS.overshoots), text
        assert (shown == 0) == (kept == 0), text
        assert len(text.lstrip("-")) == 4


def test_what_is_kept_and_what_is_lost_are_one_together() -> None:
    for kept in (0.9796, 0.97999, 0.89996, 0.49999, 0.0004, 0.0, -0.2):
        assert Fraction(format_kept(kept)) + Fraction(format_lost(kept)) == 1
    assert format_lost(0.9796) == "0.03"
    assert format_lost(math.nan) == ""


def test_an_interval_has_the_style_of_the_share_and_is_left_out_without_a_width() -> None:
    assert format_interval(0.5499, 0.9796) == "0.55 to 0.97"
    assert format_interval(0.9, 1.0) == "0.90 to 1.00"
    for low, high in itertools.product((0.251, 0.254), repeat=2):
        assert format_interval(low, high) == ""
    assert format_interval(math.nan, math.nan) == ""


@pytest.mark.parametrize(
    ("figure", "limit", "text"),
    [
        *((0.0, 1, "0.00"), (1.0, 1, "1.00"), (0.125, 1, "0.12"), (-0.5, 1, "-0.50")),
        *((1e-9, 1, "0.01"), (0.9999, 1, "0.99"), (1.0001, 1, "1.00"), (math.nan, 1, "–")),
        *((0.9899, 0.99, "0.98"), (0.99, 0.99, "0.99"), (0.9899, 0.5, "0.99")),
        *((12345.6, 1, "1e+04"), (math.inf, 1, "inf"), (-math.inf, 1, "-inf")),
    ],
)
def test_a_figure_is_rounded_on_its_side_of_0_of_1_and_of_a_limit(
    figure: float, limit: float, text: str
) -> None:
    assert format_figure(figure, limit) == text


@pytest.mark.parametrize(
    ("difference", "text"), [(0.0, "0.00"), (0.004, "0.00"), (0.996, "1.00"), (math.nan, "–")]
)
def test_a_difference_is_rounded_to_nearest(difference: float, text: str) -> None:
    assert format_difference(difference) == text


def test_an_error_of_weights_above_its_limit_is_not_rounded_down_to_it() -> None:
    limit = TWINS.weight_error
    assert Fraction(format_error(math.nextafter(limit, 1))) > Fraction(str(limit))
    assert format_error(limit) == f"{limit:.2f}"
    assert format_error(0.126) == "0.13"
