"""Texts and colours of verdicts in tables."""

import math

from rich.style import Style

from altgrad.report import Advice, Assessment, Verdict
from altgrad.report.cells import (
    COLOURS,
    MEANINGS,
    STEP_MEANINGS,
    cell_text,
    find_mark,
    list_legend,
    list_marks,
    list_meanings,
    write_short_cell,
    write_short_legend,
)
from altgrad.report.judging.calibration import calibration
from tests.report.twin_runs import make_run_advice

LIMITS, STEP_LIMITS = calibration().thresholds, calibration().step_thresholds
FINE, REMEDY = LIMITS.stores_fine, LIMITS.needs_remedy


def make_advice(verdict: Verdict, kept: float, metric: str = "progress_kept") -> Advice:
    return Advice("a", "bf16", verdict, {metric: kept}, {}, "")


def test_a_cell_has_the_verdict_in_one_word_and_the_share() -> None:
    assert cell_text(make_advice(Verdict.STORES_FINE, 1.0)) == "fine 1.00"
    assert cell_text(make_advice(Verdict.NEEDS_REMEDY, 0.25, "kept_update_ratio")) == "remedy 0.25*"
    assert cell_text(make_advice(Verdict.NOT_JUDGED, math.nan)) == "–"
    assert cell_text(None) == ""


def test_a_cell_is_marked_if_elements_are_not_finite_and_the_word_does_not_say_so() -> None:
    advice = make_advice(Verdict.NEEDS_REMEDY, 0.375)
    assert cell_text(advice._replace(nonfinite=0.5)) == "remedy 0.38 NaN"
    unjudged = advice._replace(verdict=Verdict.NOT_JUDGED, figures={}, nonfinite=1.0)
    assert cell_text(unjudged) == "all NaN"
    assert cell_text(unjudged._replace(nonfinite=0.5)) == "– NaN"
    broken = advice._replace(verdict=Verdict.BREAKS, figures={}, nonfinite=1.0)
    assert cell_text(broken) == "breaks"


def test_a_short_cell_has_a_word_only_for_what_stands_still_or_is_nan() -> None:
    kept = make_advice(Verdict.WATCH, 0.95)
    single = make_advice(Verdict.WATCH, 0.95, "kept_update_ratio")
    cells = {
        "0.95": kept,
        "0.95*": single,
        "0.95?": kept._replace(verdict=Verdict.UNCERTAIN),
        "0.95!": kept._replace(nonfinite=0.5),
        "1.00~": make_advice(Verdict.WATCH, 1.0),
        "frozen": make_advice(Verdict.FROZEN, 0.0),
        "stuck": make_advice(Verdict.STUCK, 0.25),
        "breaks": make_advice(Verdict.BREAKS, math.nan),
        "–": make_advice(Verdict.NOT_JUDGED, math.nan),
        "all NaN": make_advice(Verdict.NOT_JUDGED, math.nan)._replace(nonfinite=1.0),
    }
    assert [write_short_cell(each) for each in cells.values()] == [*cells]
    assert write_short_cell(None) == ""
    assert write_short_legend([single]) == "Share kept (* of single updates)"
    assert write_short_legend([*cells.values()]) == (
        "Share kept by a sample (* of single updates, ? unsure, ~ noisy, ! some NaN)"
    )


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


def test_a_cell_says_why_a_layer_that_keeps_its_progress_is_not_fine() -> None:
    """Rounding at random keeps the progress on average, and leaves weights far off."""
    far = make_advice(Verdict.WATCH, 1.06)
    assert cell_text(far) == "watch 1.06 noisy"
    assert cell_text(far._replace(figures={"progress_kept": 0.95})) == "watch 0.95"
    run = make_run_advice("bf16-sr", Verdict.WATCH, 1.0, weight_error=0.125)
    assert find_mark(run) == "noisy"
    assert find_mark(run._replace(weight_error=0.0)) == ""
    single = make_run_advice("bf16", Verdict.WATCH, 0.985)._replace(has_twin=False)
    assert find_mark(single) == ""
    (mark,) = list_marks([far])
    assert mark.word == "noisy"
    assert f"more than {100 * LIMITS.weight_error:g} %" in mark.text


def test_a_run_whose_progress_is_that_of_few_layers_says_so() -> None:
    hidden = make_run_advice("bf16", Verdict.NEEDS_REMEDY, 1.0, behind_share=0.9)
    assert find_mark(hidden) == "behind"
    assert find_mark(hidden._replace(behind_share=LIMITS.left_behind)) == ""
    assert find_mark(hidden._replace(kept=0.25)) == ""  # the share says it
    (mark,) = list_marks([hidden])
    assert f"more than {100 * LIMITS.left_behind:g} % of the weights" in mark.text


def test_the_legend_of_verdicts_on_single_steps_states_their_own_thresholds() -> None:
    assert f"{STEP_LIMITS.stores_fine:g} " in STEP_MEANINGS[Verdict.STORES_FINE]
    assert STEP_MEANINGS[Verdict.WATCH].startswith(
        f"{STEP_LIMITS.needs_remedy:g} to {STEP_LIMITS.stores_fine:g} "
    )
    assert f"below {STEP_LIMITS.needs_remedy:g} " in STEP_MEANINGS[Verdict.NEEDS_REMEDY]
    assert f"{100 * STEP_LIMITS.frozen:g} %" in STEP_MEANINGS[Verdict.FROZEN]


def test_the_legend_tells_verdicts_of_twins_from_those_of_single_steps() -> None:
    twin = make_advice(Verdict.WATCH, 0.95)
    step = make_advice(Verdict.WATCH, 0.95, "kept_update_ratio")
    other = make_advice(Verdict.UNCERTAIN, 0.95, "kept_update_ratio")
    assert [(each.word, each.verdict) for each in list_meanings([twin, step, other])] == [
        ("watch", Verdict.WATCH),
        ("unsure", Verdict.UNCERTAIN),
        ("watch*", Verdict.WATCH),
    ]
    assert [each.word for each in list_meanings([step])] == ["watch*"]


def test_the_legend_has_each_word_of_runs_and_layers_once() -> None:
    runs = {"bf16": make_run_advice("bf16", Verdict.NEEDS_REMEDY)}
    advice = [make_advice(Verdict.FROZEN, 0.0), make_advice(Verdict.NEEDS_REMEDY, 0.5)]
    advice += [advice[0]._replace(nonfinite=0.5)]
    words = [each.word for each in list_legend(Assessment(runs, advice, {}, ""))]
    assert words == ["remedy", "frozen", "NaN"]
