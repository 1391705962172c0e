"""Texts and colours of verdicts in tables."""

import math

import pytest
from rich.style import Style

from altgrad.report import Advice, Verdict
from altgrad.report.cells import COLOURS, EVIDENCE, MEANINGS, cell_text, format_figure, format_kept


@pytest.mark.parametrize(
    ("kept", "text"),
    [
        *((1.0, "1.00"), (0.9999, ">.99"), (0.996, ">.99"), (0.99, "0.99"), (0.9899, ".989")),
        *((0.986, ".986"), (0.984, "0.98"), (0.5, "0.50"), (0.4999, ".499"), (0.494, "0.49")),
        *((0.001, "<.01"), (0.0, "0.00"), (-0.3, "-0.30"), (1.44, "1.44"), (math.nan, "")),
        *((-999.0, "-999.00"), (5432.1, "5e+03"), (-1e300, "-1e+300"), (math.inf, "inf")),
    ],
)
def test_a_kept_update_ratio_is_never_rounded_across_a_threshold(kept: float, text: str) -> None:
    assert format_kept(kept) == text


def test_four_characters_are_near_the_ratio_and_on_its_side_of_each_threshold() -> None:
    for kept in (k / 4000 for k in range(4001)):
        text = format_kept(kept)
        assert len(text) == 4
        shown = float(text.lstrip("<>"))
        assert abs(shown - kept) <= 0.01
        assert (shown >= 0.99, shown >= 0.5) == (kept >= 0.99, kept >= 0.5), text
        assert (text == "1.00", text == "0.00") == (kept == 1, kept == 0), text


def test_a_cell_has_the_verdict_in_one_word_and_the_ratio() -> None:
    def cell(verdict: Verdict, kept: float) -> str:
        return cell_text(Advice("a", "bf16", verdict, {"kept_update_ratio": kept}, {}, ""))

    assert cell(Verdict.STORES_FINE, 1.0) == "fine 1.00"
    assert cell(Verdict.NEEDS_REMEDY, 0.4999) == "remedy .499"
    assert cell(Verdict.NOT_JUDGED, math.nan) == "–"
    assert cell_text(None) == ""


def test_a_cell_is_marked_if_elements_are_not_finite() -> None:
    figures = {"kept_update_ratio": 0.38}
    advice = Advice("a", "bf16", Verdict.NEEDS_REMEDY, figures, {}, "")
    assert cell_text(advice._replace(nonfinite=0.5)) == "remedy 0.38 NaN"
    unjudged = advice._replace(verdict=Verdict.NOT_JUDGED, figures={}, nonfinite=1.0)
    assert cell_text(unjudged) == "– NaN"


def test_every_verdict_has_a_distinct_meaning_and_colour() -> None:
    for table in (MEANINGS, COLOURS):
        assert {*table} == {*Verdict}
        assert len({*table.values()}) == len(Verdict)
    for colour in COLOURS.values():
        Style.parse(colour)
    assert {*EVIDENCE} == {*Verdict}
    assert EVIDENCE[Verdict.FROZEN].endswith("frozen when the run was really done")


def test_the_meaning_of_each_verdict_states_its_thresholds() -> None:
    assert "0.99 " in MEANINGS[Verdict.STORES_FINE]
    assert MEANINGS[Verdict.WATCH].startswith("0.5 to 0.99 ")
    assert MEANINGS[Verdict.NEEDS_REMEDY].startswith("below 0.5:")
    assert MEANINGS[Verdict.FROZEN].startswith("99 % or more")


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
