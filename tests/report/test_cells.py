"""Texts and colours of verdicts in tables."""

import math

import pytest
from rich.style import Style

from altgrad.report import Advice, Verdict
from altgrad.report.cells import COLOURS, MEANINGS, cell_text, format_figure, format_kept
from altgrad.report.judging.calibration import calibration

LIMITS = calibration().thresholds
FINE, REMEDY = LIMITS.stores_fine, LIMITS.needs_remedy


@pytest.mark.parametrize(
    ("kept", "text"),
    [
        *((1.0, "1.00"), (0.9999, ">.99"), (0.996, ">.99"), (0.5, "0.50"), (0.494, "0.49")),
        *((0.001, "<.01"), (0.0, "0.00"), (-0.3, "-0.30"), (1.44, "1.44"), (math.nan, "")),
        *((-999.0, "-999.00"), (5432.1, "5e+03"), (-1e300, "-1e+300"), (math.inf, "inf")),
    ],
)
def test_a_share_that_is_kept_has_two_decimals(kept: float, text: str) -> None:
    assert format_kept(kept) == text


@pytest.mark.parametrize("limit", [FINE, REMEDY])
def test_a_share_below_a_threshold_is_not_rounded_up_to_it(limit: float) -> None:
    below = math.nextafter(limit, 0)
    assert float(format_kept(limit)) == pytest.approx(limit, abs=0.005)
    assert float(format_kept(below)) < limit
    assert len(format_kept(below)) == 4


def test_four_characters_are_near_the_share_and_on_its_side_of_each_threshold() -> None:
    for kept in (k / 4000 for k in range(4001)):
        text = format_kept(kept)
        assert len(text) == 4
        shown = float(text.lstrip("<>"))
        assert abs(shown - kept) <= 0.01
        if ">" not in text:
            assert (shown >= FINE, shown >= REMEDY) == (kept >= FINE, kept >= REMEDY), text
        assert (text == "1.00", text == "0.00") == (kept == 1, kept == 0), text


def make_advice(verdict: Verdict, kept: float, metric: str = "progress_kept") -> Advice:
    return Advice("a", "bf16", verdict, {metric: kept}, {}, "")


def test_a_cell_has_the_verdict_in_one_word_and_the_share() -> None:
    assert cell_text(make_advice(Verdict.STORES_FINE, 1.0)) == "fine 1.00"
    assert cell_text(make_advice(Verdict.NEEDS_REMEDY, 0.25, "kept_update_ratio")) == "remedy 0.25"
    assert cell_text(make_advice(Verdict.NOT_JUDGED, math.nan)) == "–"
    assert cell_text(None) == ""


def test_a_cell_is_marked_if_elements_are_not_finite_and_the_word_does_not_say_so() -> None:
    advice = make_advice(Verdict.NEEDS_REMEDY, 0.375)
    assert cell_text(advice._replace(nonfinite=0.5)) == "remedy 0.38 NaN"
    unjudged = advice._replace(verdict=Verdict.NOT_JUDGED, figures={}, nonfinite=1.0)
    assert cell_text(unjudged) == "– NaN"
    broken = advice._replace(verdict=Verdict.BREAKS, figures={}, nonfinite=1.0)
    assert cell_text(broken) == "breaks"


def test_every_verdict_has_a_distinct_meaning_and_a_colour() -> None:
    for table in (MEANINGS, COLOURS):
        assert {*table} == {*Verdict}
    assert len({*MEANINGS.values()}) == len(Verdict)
    for colour in COLOURS.values():
        Style.parse(colour)


def test_the_meaning_of_each_verdict_states_its_thresholds() -> None:
    assert f"{FINE:g} " in MEANINGS[Verdict.STORES_FINE]
    assert MEANINGS[Verdict.WATCH].startswith(f"{REMEDY:g} to {FINE:g} ")
    assert MEANINGS[Verdict.NEEDS_REMEDY].startswith(f"below {REMEDY:g}:")
    assert f"{100 * LIMITS.frozen:g} %" in MEANINGS[Verdict.FROZEN]
    assert f"{LIMITS.overshoots:g} times" in MEANINGS[Verdict.OVERSHOOTS]


@pytest.mark.parametrize(
    ("figure", "limit", "text"),
    [
        *((0.0, 1, "0.00"), (1.0, 1, "1.00"), (0.125, 1, "0.12"), (-0.5, 1, "-0.50")),
        *((1e-9, 1, "<.01"), (0.9999, 1, ">.99"), (1.0001, 1, "1.00"), (math.nan, 1, "–")),
        *((0.9899, 0.99, ".989"), (0.99, 0.99, "0.99"), (0.98, 0.99, "0.98")),
        *((12345.6, 1, "1e+04"), (math.inf, 1, "inf"), (-math.inf, 1, "-inf")),
    ],
)
def test_a_figure_is_rounded_on_its_side_of_0_of_1_and_of_a_limit(
    figure: float, limit: float, text: str
) -> None:
    assert format_figure(figure, limit) == text
