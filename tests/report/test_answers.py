"""The answer of a report: heading, table of recipes, how the run is stored, what to do."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from altgrad.report import Advice, Assessment, LayerInfo, RecipeInfo, Run, RunAdvice, Verdict
from altgrad.report.answers import (
    INTERVAL,
    NOTHING_TO_JUDGE,
    describe_frozen_now,
    has_intervals,
    is_low,
    list_actions,
    list_rows,
    write_answer,
    write_evidence,
    write_storage,
    write_visible,
)
from tests.report.runs import make_run
from tests.report.twin_runs import make_recipe, make_run_advice

NAN = math.nan
MANY = ": 75 % of the weights have never moved"
USE = "Use bf16-sr, which keeps 1."


def by_name(*runs: RunAdvice) -> dict[str, RunAdvice]:
    return {each.recipe: each for each in runs}


FINE = make_run_advice("bf16-sr", Verdict.STORES_FINE, 1.0, to_do="Nothing is lost that matters.")
WATCH = make_run_advice("bf16", Verdict.WATCH, 0.9375)
REMEDY = make_run_advice("e5m2", Verdict.NEEDS_REMEDY, 0.125, frozen=("gain",), frozen_share=0.25)
NOW = make_run_advice("now", Verdict.NEEDS_REMEDY, 0.25, frozen_frac=0.75, frozen=("gain", "bias"))
UNJUDGED = make_run_advice("fp16", Verdict.NOT_JUDGED, NAN, interval=(NAN, NAN), to_do="")


# --- the table


def test_a_row_has_word_share_interval_layers_and_evidence() -> None:
    rows = list_rows(by_name(NOW, REMEDY, UNJUDGED))
    assert [row.recipe for row in rows] == ["now", "e5m2", "fp16"]
    now, remedy, unjudged = rows
    assert (now.word, now.never) == ("loses 0.75 now", "75 %")
    texts = (remedy.word, remedy.kept, remedy.never, remedy.frozen, remedy.evidence)
    assert texts == ("remedy", "0.12 (0.00 to 0.25)", "0 %", "1 (25 %)", "8 of 66")
    assert (unjudged.kept, unjudged.frozen, unjudged.evidence) == ("–", "0", "–")


def test_a_row_without_a_twin_is_marked() -> None:
    single = REMEDY._replace(has_twin=False, frozen_frac=NAN)
    (row,) = list_rows(by_name(single))
    assert row.is_step_by_step
    assert (row.kept, row.never) == ("0.12* (0.00 to 0.25)", "–")
    (unknown,) = list_rows(by_name(UNJUDGED._replace(has_twin=False)))
    assert not unknown.is_step_by_step


def test_a_row_of_a_recipe_that_leaves_weights_far_off_says_so() -> None:
    (row,) = list_rows(by_name(WATCH._replace(kept=1.0, weight_error=0.125)))
    assert row.word == "watch (noisy)"
    (row,) = list_rows(by_name(WATCH._replace(kept=1.0, behind_share=0.5)))
    assert row.word == "watch (behind)"


def test_the_ends_of_an_interval_have_the_digits_of_the_share() -> None:
    (row,) = list_rows(by_name(WATCH._replace(kept=0.9796, interval=(0.8, 0.8999))))
    assert row.kept == "0.97 (0.80 to 0.89)"
    (exact,) = list_rows(by_name(WATCH._replace(kept=0.95, interval=(0.95, 0.95))))
    assert exact.kept == "0.95"


def test_an_interval_is_explained_where_twins_have_one() -> None:
    assert has_intervals(list_rows(by_name(WATCH)))
    assert not has_intervals(list_rows(by_name(WATCH._replace(has_twin=False), UNJUDGED)))
    assert "80 % of those real runs" in INTERVAL
    assert "need not lie in it" in INTERVAL


def test_evidence_is_a_sentence_where_the_table_has_no_room() -> None:
    untested = make_run_advice("mine", Verdict.WATCH, outcome=None)
    rows = list_rows(by_name(WATCH, untested, UNJUDGED))
    assert write_evidence(rows) == (
        "Such runs that lost over 10 %: 8 of 66 (bf16); none tested (mine); – (fp16)."
    )


# --- the heading


@pytest.mark.parametrize(
    ("runs", "answer"),
    [
        ([], NOTHING_TO_JUDGE),
        ([WATCH, FINE, REMEDY], "Fine: bf16-sr. Watch: bf16. Not fine: e5m2."),
        ([UNJUDGED, FINE], "Fine: bf16-sr. Not judged: fp16."),
        (
            [NOW, FINE],
            f"This run loses 0.75 of its progress now{MANY}. Fine: bf16-sr.",
        ),
        ([NOW._replace(verdict=Verdict.STORES_FINE)], "This run loses nothing now that matters."),
        (
            [NOW._replace(verdict=Verdict.FROZEN, kept=0.0, frozen_frac=0.999)],
            "This run is frozen now: >99 % of the weights have never moved.",
        ),
        (
            [NOW._replace(verdict=Verdict.WATCH, kept=1.0, weight_error=0.125)],
            "Weights of this run are off by 0.12 of their size now.",
        ),
        (
            [NOW._replace(verdict=Verdict.WATCH, kept=0.9796, frozen_frac=0.0)],
            "This run loses 0.03 of its progress now.",  # fine begins at 0.98
        ),
        (
            [NOW._replace(verdict=Verdict.WATCH, kept=1.0, weight_error=0.0501)],
            "Weights of this run are off by 0.06 of their size now.",  # fine ends at 0.05
        ),
        (
            [NOW._replace(kept=NAN)],
            f"Some layers of this run are frozen now{MANY}.",
        ),
        (
            [NOW._replace(kept=1.0, behind_share=0.9)],
            "Layers with 90 % of this run's weights keep less than half of their progress now.",
        ),
        (
            [NOW._replace(verdict=Verdict.UNCERTAIN), WATCH._replace(verdict=Verdict.UNCERTAIN)],
            "What this run loses now is unsure: the sample is too small. Unsure: bf16.",
        ),
        (
            [NOW._replace(verdict=Verdict.BREAKS, kept=NAN)],
            "This run breaks now: weights are NaN or inf.",
        ),
        ([NOW._replace(verdict=Verdict.NOT_JUDGED, kept=NAN), WATCH], "Watch: bf16."),
    ],
)
def test_the_heading_answers_which_recipes_are_fine(runs: list[RunAdvice], answer: str) -> None:
    assert write_answer(by_name(*runs)) == answer


def test_a_heading_names_at_most_eight_recipes_of_a_kind() -> None:
    many = [WATCH._replace(recipe=f"r{k}") for k in range(100)]
    assert write_answer(by_name(*many)) == "Watch: r0, r1, r2, r3, r4, r5, r6, r7 and 92 more."


# --- how the run is stored


MASTERS = ": nothing is lost now, also under autocast or FSDP. Recipes are what-ifs."


def make_stored(*dtypes: str, now: RecipeInfo | None = None) -> Run:
    """Make a run without an observed step, whose layers have these dtypes."""
    layers = {f"l{k}": LayerInfo((8,), dtype, 8, ("bf16",)) for k, dtype in enumerate(dtypes)}
    return replace(make_run([], layers=layers), now=now)


@pytest.mark.parametrize(
    ("dtypes", "runs", "begins", "low"),
    [
        (
            ["float32"] * 2,
            [WATCH],
            f"Weights are float32{MASTERS}",
            False,
        ),
        (
            ["float64"],
            [WATCH],
            f"Weights are float64{MASTERS}",
            False,
        ),
        (["bfloat16"] * 2, [NOW], "Weights are bfloat16. “now” is what the run", True),
        (
            ["bfloat16", "float32", "bfloat16"],
            [NOW],
            "Weights are bfloat16 (2 layers) and float32 (1 layer). “now” is",
            True,
        ),
        (["float16"], [WATCH], "Weights are float16. What that loses is unknown", True),
        (
            ["float32"],
            [NOW],
            "Weights are float32, and weights or optimizer states are rounded after",
            True,
        ),
        ([], [], "", False),
    ],
)
def test_one_sentence_says_how_the_run_is_stored(
    dtypes: list[str], runs: list[RunAdvice], begins: str, low: bool
) -> None:
    run = make_stored(*dtypes)
    assert write_storage(run, by_name(*runs)).startswith(begins)
    assert is_low(run.layers, by_name(*runs)) is low


@pytest.mark.parametrize(
    ("fields", "rounded"),
    [
        ({"weights": "e4m3fn"}, "weights to e4m3fn"),
        ({"states": {"exp_avg_sq": "e5m2"}}, "exp_avg_sq to e5m2"),
        ({"states": {"*": "bf16"}}, "the optimizer states to bf16"),
        (
            {"weights": "bf16", "states": {"exp_avg": "bf16", "exp_avg_sq": "e5m2"}},
            "weights to bf16, exp_avg to bf16, exp_avg_sq to e5m2",
        ),
    ],
)
def test_a_run_that_rounds_is_told_what_is_rounded(fields: Mapping[str, Any], rounded: str) -> None:
    run = make_stored("float32", now=make_recipe("now", **fields))
    assert write_storage(run, by_name(NOW)).startswith(
        f"Weights are float32; rounded after each step: {rounded}. “now” is"
    )


def test_a_run_without_twins_is_told_to_pass_recipes() -> None:
    text = write_storage(make_stored("bfloat16"), {})
    assert text.endswith("moved_since_start_frac/now, or pass recipes=['bf16-sr'] to the monitor.")


def test_a_run_without_a_verdict_is_not_told_that_nothing_is_lost() -> None:
    nothing = make_run_advice("bf16", Verdict.NOT_JUDGED, math.nan)
    assert write_storage(make_stored("float32"), by_name(nothing)) == "Weights are float32."


def test_a_run_in_float32_is_told_that_its_weights_are_the_master_weights() -> None:
    assert "also under autocast or FSDP" in write_storage(make_stored("float32"), {})


# --- what to do


def test_recipes_with_the_same_remedy_share_a_line() -> None:
    other = REMEDY._replace(recipe="e4m3fn")
    lines = list_actions(by_name(NOW, REMEDY, WATCH, other, FINE, UNJUDGED))
    assert lines == [
        f"now: gain, bias stand still. {USE}",
        f"e5m2, bf16, e4m3fn: {USE}",  # of e5m2 the run is lost, and not its gain alone
    ]
    alone = NOW._replace(frozen=("gain",))
    assert list_actions(by_name(alone)) == [f"now: gain stands still. {USE}"]


def test_a_fine_recipe_with_a_frozen_layer_is_among_them() -> None:
    kept_apart = FINE._replace(frozen=("gain",), to_do="Keep it in float32.")
    assert list_actions(by_name(kept_apart)) == ["bf16-sr: gain would freeze. Keep it in float32."]


def test_there_are_at_most_five_lines_and_one_that_counts_the_rest() -> None:
    many = [WATCH._replace(recipe=f"r{k}", to_do=f"Do {k}.") for k in range(8)]
    lines = list_actions(by_name(*many))
    assert lines[:5] == [f"r{k}: Do {k}." for k in range(5)]
    assert lines[5:] == ["… and 3 more, in --json"]


# --- frozen now


def assess(advice: Mapping[str, Verdict], *runs: RunAdvice) -> Assessment:
    each = [Advice(layer, "now", verdict, {}, {}, "") for layer, verdict in advice.items()]
    return Assessment(by_name(*runs), each, {}, "")


def test_frozen_layers_are_named_with_their_share_and_a_remedy() -> None:
    found = assess({"gain": Verdict.FROZEN, "bias": Verdict.STUCK}, NOW._replace(frozen_share=0.25))
    assert describe_frozen_now(found) == (
        "frozen layers: gain, bias (25 % of the weights). float32 would move their weights, and as "
        f"they are stored they stand still. {USE}"
    )


@pytest.mark.parametrize("verdict", [Verdict.STUCK, Verdict.NEEDS_REMEDY, Verdict.STORES_FINE])
def test_without_a_frozen_layer_there_is_no_notice(verdict: Verdict) -> None:
    assert describe_frozen_now(assess({"gain": verdict}, NOW)) == ""


def test_a_layer_that_would_freeze_in_a_recipe_is_no_frozen_layer_of_the_run() -> None:
    advice = [Advice("gain", "bf16", Verdict.FROZEN, {}, {}, "")]
    assert describe_frozen_now(Assessment(by_name(WATCH), advice, {}, "")) == ""


# --- what else matters


def test_visible_shares_are_listed_where_they_have_a_value() -> None:
    text = write_visible({"bf16": 0.25, "e5m2": NAN, "e4m3fn": 0.996})
    assert "sees this share of a step's updates (visible_frac): bf16 0.25, e4m3fn 0.99." in text
    assert "The rest is not lost" in text
    assert write_visible({"bf16": NAN}) == ""
