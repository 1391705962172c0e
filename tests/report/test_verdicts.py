"""Each verdict at each threshold, its reason, and the summary."""

import math
from collections.abc import Mapping

import pytest

from altgrad.quantization import get_formats
from altgrad.report import Advice, FormatInfo, Judge, LayerInfo, Verdict
from tests.report.runs import figures

FORMATS = {
    format.name: FormatInfo.from_format(format, "tensor")
    for format in get_formats(["fp16", "bf16", "e5m2"])
}
NAN = math.nan


def advise(
    *steps: Mapping[str, float], errors: Mapping[str, float] | None = None, format: str = "bf16"
) -> Advice:
    judge = Judge(FORMATS)
    for step in steps:
        judge.add("layer", step, errors or {})
    (found,) = judge.assessment().advice
    assert (found.layer, found.format) == ("layer", format)
    return found


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ({}, Verdict.STORES_FINE),
        ({"kept_update_ratio": 0.99}, Verdict.STORES_FINE),
        ({"kept_update_ratio": 1.7}, Verdict.STORES_FINE),  # overshoot
        ({"kept_update_ratio": 0.9899}, Verdict.WATCH),
        ({"kept_update_ratio": 0.5}, Verdict.WATCH),
        ({"kept_update_ratio": 0.4999}, Verdict.NEEDS_REMEDY),
        ({"kept_update_ratio": -0.2}, Verdict.NEEDS_REMEDY),
        ({"kept_update_ratio": 0.0, "never_moved_frac": 0.99}, Verdict.FROZEN),
        ({"kept_update_ratio": 0.0, "never_moved_frac": 0.9899}, Verdict.NEEDS_REMEDY),
        ({"kept_update_ratio": 0.98, "underflow_frac": 0.03}, Verdict.RANGE),
        ({"kept_update_ratio": 0.98, "underflow_frac": 0.0299}, Verdict.WATCH),
        ({"kept_update_ratio": 0.98, "saturated_frac": 0.01}, Verdict.RANGE),
        ({"kept_update_ratio": 0.98, "saturated_frac": 0.0099}, Verdict.WATCH),
        ({"kept_update_ratio": 0.99, "underflow_frac": 0.5}, Verdict.STORES_FINE),
        ({"kept_update_ratio": NAN, "stall_frac": NAN}, Verdict.NOT_JUDGED),
    ],
    ids=str,
)
def test_each_verdict_begins_at_its_threshold(values: dict[str, float], verdict: Verdict) -> None:
    assert advise(figures(**values)).verdict is verdict


@pytest.mark.parametrize(
    ("kept", "error", "verdict"),
    [
        (0.75, 0.10, Verdict.WATCH),
        (0.75, 0.13, Verdict.UNCERTAIN),  # 0.75 − 1.96 × 0.13 < 0.5
        (0.97, 0.011, Verdict.UNCERTAIN),
        (0.30, 0.05, Verdict.NEEDS_REMEDY),
        (0.999, 0.001, Verdict.STORES_FINE),
        (0.999, NAN, Verdict.UNCERTAIN),  # few elements carry the update
    ],
)
def test_an_interval_that_contains_a_threshold_is_uncertain(
    kept: float, error: float, verdict: Verdict
) -> None:
    errors = {"kept_update_ratio/bf16": error, "stall_frac/bf16": 0.01}
    advice = advise(figures(kept_update_ratio=kept), errors=errors)
    assert advice.verdict is verdict
    if error > 0:
        assert f"± {1.96 * error:.1g}" in advice.reason


@pytest.mark.parametrize(
    ("never_moved", "error", "verdict"),
    [
        (0.985, 0.004, Verdict.UNCERTAIN),
        (0.995, 0.004, Verdict.UNCERTAIN),
        (0.999, 0.004, Verdict.UNCERTAIN),  # its interval begins at 0.984
        (0.999, 0.001, Verdict.FROZEN),
        (0.98, 0.004, Verdict.NEEDS_REMEDY),
        (1.0, 0.0, Verdict.FROZEN),  # all elements are measured, and none ever moved
        (1.0, 0.0002, Verdict.FROZEN),  # of 4,096 sampled elements none ever moved
        (1.0, 0.0075, Verdict.FROZEN),  # of 128 sampled blocks none ever moved
        (1.0, 0.168, Verdict.UNCERTAIN),  # of 2 sampled elements none ever moved
        (1.0, NAN, Verdict.UNCERTAIN),
        (0.5, NAN, Verdict.NEEDS_REMEDY),
    ],
)
def test_frozen_takes_the_error_of_a_sample_into_account(
    never_moved: float, error: float, verdict: Verdict
) -> None:
    """The last never_moved_frac counts, together with its error."""
    steps = [figures(kept_update_ratio=0.1, never_moved_frac=x) for x in (1.0, never_moved)]
    judge = Judge(FORMATS)
    for step, step_error in zip(steps, (0.5, error), strict=True):
        judge.add("layer", step, {"never_moved_frac/bf16": step_error})
    (advice,) = judge.assessment().advice
    assert advice.verdict is verdict
    if verdict is Verdict.UNCERTAIN and not math.isnan(error):
        assert "never have moved, which could be “frozen” or not" in advice.reason
        assert " to " in advice.reason


def test_advice_has_the_interval_of_each_figure_it_rests_on() -> None:
    errors = {"kept_update_ratio/bf16": 0.02, "never_moved_frac/bf16": 0.001}
    advice = advise(figures(kept_update_ratio=0.8, never_moved_frac=0.0), errors=errors)
    assert advice.interval("kept_update_ratio") == pytest.approx((0.7608, 0.8392), abs=1e-4)
    low, high = advice.interval("never_moved_frac")
    assert low == 0 < high < 0.005
    assert advice.interval("stall_frac") == (0, 0)  # without an error, all elements are measured


@pytest.mark.parametrize(
    ("share", "elements", "verdict"),
    [
        ("underflow_frac", 10_000, Verdict.RANGE),  # every element is measured
        ("underflow_frac", 100, Verdict.UNCERTAIN),  # 0.013 to 0.091
        ("saturated_frac", 10_000, Verdict.RANGE),
        ("saturated_frac", 100, Verdict.UNCERTAIN),
    ],
)
def test_range_takes_the_error_of_a_sample_into_account(
    share: str, elements: int, verdict: Verdict
) -> None:
    """The sample is the only one known of a file of version 0.1.0, which states no error of it."""
    layers = {"layer": LayerInfo((100, 100), "float32", elements, ("bf16",))}
    near = 0.035 if share == "underflow_frac" else 0.011
    for value, expected in ((near, verdict), (0.9, Verdict.RANGE), (0.0, Verdict.WATCH)):
        judge = Judge(FORMATS, layers)
        judge.add("layer", figures(kept_update_ratio=0.9, **{share: value}), {})
        (advice,) = judge.assessment().advice
        assert advice.verdict is expected, value
        if expected is not Verdict.WATCH:
            assert (" to " in advice.reason) == (elements == 100)


@pytest.mark.parametrize(
    ("share", "error", "verdict"),
    [
        (0.02, 0.0, Verdict.RANGE),
        (0.02, 0.002, Verdict.RANGE),
        (0.02, 0.01, Verdict.UNCERTAIN),
        (0.02, NAN, Verdict.UNCERTAIN),
        (0.002, 0.0005, Verdict.WATCH),
        (0.0, 0.01, Verdict.WATCH),  # no sampled element lies beyond the top
    ],
)
def test_range_takes_the_stated_error_into_account(
    share: float, error: float, verdict: Verdict
) -> None:
    """It counts clusters of blocks, which the number of elements does not."""
    layers = {"layer": LayerInfo((1000, 1000), "float32", 4096, ("bf16",))}
    judge = Judge(FORMATS, layers)
    errors = {"underflow_frac/bf16": 0.0, "saturated_frac/bf16": error}
    judge.add("layer", figures(kept_update_ratio=0.9, saturated_frac=share), errors)
    (advice,) = judge.assessment().advice
    assert advice.verdict is verdict


def test_figures_are_means_over_the_steps_except_the_last_never_moved_frac() -> None:
    advice = advise(
        figures(kept_update_ratio=1.0, stall_frac=0.0, never_moved_frac=1.0),
        figures(kept_update_ratio=NAN, stall_frac=NAN, never_moved_frac=NAN),
        figures(kept_update_ratio=0.5, stall_frac=0.5, never_moved_frac=0.25),
    )
    assert advice.figures["kept_update_ratio"] == 0.75
    assert advice.figures["stall_frac"] == 0.25
    assert advice.figures["never_moved_frac"] == 0.25
    assert advice.verdict is Verdict.WATCH


def test_errors_stay_the_same_over_many_steps() -> None:
    errors = {"kept_update_ratio/bf16": 0.02, "stall_frac/bf16": 0.01}
    advice = advise(*[figures(kept_update_ratio=0.8)] * 100, errors=errors)
    assert advice.errors["kept_update_ratio"] == pytest.approx(0.02)
    assert advice.errors["stall_frac"] == pytest.approx(0.01)


def test_an_error_that_is_nan_in_most_steps_makes_the_verdict_uncertain() -> None:
    judge = Judge(FORMATS)
    for error in (NAN, NAN, 0.001):
        judge.add("layer", figures(), {"kept_update_ratio/bf16": error})
    (advice,) = judge.assessment().advice
    assert advice.verdict is Verdict.UNCERTAIN


def test_the_suggestion_is_the_smallest_format_that_stores_fine() -> None:
    judge = Judge(FORMATS)
    judge.add("all", figures("fp16") | figures("bf16") | figures("e5m2"), {})
    judge.add("two", figures("fp16") | figures("bf16") | figures("e5m2", kept_update_ratio=0.9), {})
    judge.add("one", figures("bf16") | figures("e5m2", kept_update_ratio=0.9), {})
    judge.add("none", figures("bf16", kept_update_ratio=0.9), {})
    expected = {"all": "e5m2", "two": "fp16", "one": "bf16", "none": None}
    assert judge.assessment().suggestions == expected
    assert "fp16" not in judge.assessment().by_layer["one"]
    assert judge.assessment().by_layer["one"]["bf16"].verdict is Verdict.STORES_FINE


def test_the_summary_has_a_sentence_for_each_format() -> None:
    judge = Judge(FORMATS)
    gone = {"kept_update_ratio": 0.0, "stall_frac": 1.0, "never_moved_frac": 1.0}
    for number in range(2000):
        bf16 = figures(**gone) if number < 5 else figures()
        e5m2 = figures("e5m2", kept_update_ratio=0.3)
        judge.add(f"layers.{number}", figures("fp16") | bf16 | e5m2, {})
    assert judge.assessment().summary == (
        "fp16 would store every layer fine. bf16, of 2,000 layers: 1,995 fine, 5 frozen; frozen: "
        "layers.0, layers.1, layers.2 and 2 more. e5m2, of 2,000 layers: 2,000 in need of a remedy."
    )


def test_the_summary_says_that_no_step_was_observed_or_judged() -> None:
    assert "No step was observed" in Judge(FORMATS).assessment().summary
    judge = Judge(FORMATS)
    judge.add("layer", figures(kept_update_ratio=NAN), {})
    assert judge.assessment().summary == "bf16 could not be judged for any layer."


@pytest.mark.parametrize("missing", figures())
def test_a_format_with_a_missing_figure_is_not_judged(missing: str) -> None:
    judge = Judge(FORMATS)
    rest = figures() | figures("e5m2")
    del rest[missing]
    judge.add("layer", rest, {})
    assert [each.format for each in judge.assessment().advice] == ["e5m2"]


def test_a_reason_has_the_figures_it_rests_on() -> None:
    frozen = advise(figures(kept_update_ratio=0.0, never_moved_frac=0.996))
    assert frozen.reason.startswith(">99 % of the weights")
    watched = advise(figures(kept_update_ratio=0.876, stall_frac=0.004))
    assert watched.reason == "0.876 of the update is kept and <1 % of updates vanish on average"


def test_a_restored_judge_continues_with_the_saved_sums() -> None:
    first, second, whole = Judge(FORMATS), Judge(FORMATS), Judge(FORMATS)
    steps = [figures(kept_update_ratio=0.9), figures(kept_update_ratio=0.3, never_moved_frac=0.5)]
    errors = {"kept_update_ratio/bf16": 0.02, "stall_frac/bf16": 0.01}
    first.add("layer", steps[0], errors)
    second.load_state_dict(first.state_dict())
    second.add("layer", steps[1], errors)
    for step in steps:
        whole.add("layer", step, errors)
    assert second.assessment() == whole.assessment()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"kept_update_ratio": 0.7, "stall_frac": math.nan}, "an unknown share of updates vanish"),
        (
            {"kept_update_ratio": 0.7, "underflow_frac": math.nan, "saturated_frac": 0.9},
            "an unknown share of the weights are stored as 0 and 90 % lie beyond the top",
        ),
    ],
)
def test_a_share_without_a_value_is_unknown_in_the_reason(
    values: dict[str, float], reason: str
) -> None:
    judge = Judge({"bf16": FORMATS["bf16"]})
    judge.add("a", figures(**values), {})
    assert reason in judge.assessment().by_layer["a"]["bf16"].reason


def test_a_layer_with_elements_that_are_not_finite_is_marked_in_words() -> None:
    judge = Judge({"bf16": FORMATS["bf16"]})
    for share in (0.0, 0.5, 0.25, math.nan):
        judge.add("broken", figures(kept_update_ratio=0.38) | {"nonfinite_frac": share}, {})
    judge.add("whole", figures() | {"nonfinite_frac": 0.0}, {})
    restored = Judge({"bf16": FORMATS["bf16"]})
    restored.load_state_dict(judge.state_dict())
    for assessment in (judge.assessment(), restored.assessment()):
        broken, whole = (assessment.by_layer[name]["bf16"] for name in ("broken", "whole"))
        assert (broken.nonfinite, whole.nonfinite) == (0.5, 0.0)
        assert broken.verdict is Verdict.NEEDS_REMEDY  # the verdict is on the other half
        assert broken.reason.startswith("50 % of the elements are NaN or inf, and no figure counts")
        assert "NaN" not in whole.reason
        assert assessment.summary.endswith(
            "NaN or inf in some elements, which no figure counts: broken (50 %)."
        )


def test_a_layer_whose_elements_are_all_not_finite_is_marked_where_it_is_not_judged() -> None:
    judge = Judge({"bf16": FORMATS["bf16"]})
    nothing = figures(kept_update_ratio=NAN, stall_frac=NAN, never_moved_frac=NAN)
    judge.add("a", nothing | {"nonfinite_frac": 1.0}, {})
    (advice,) = judge.assessment().advice
    assert advice.verdict is Verdict.NOT_JUDGED
    assert advice.reason == "100 % of the elements are NaN or inf, and no figure counts them"
    assert "a (100 %)" in judge.assessment().summary


def test_a_judge_reads_sums_that_were_saved_without_the_share_of_non_finite_elements() -> None:
    judge = Judge({"bf16": FORMATS["bf16"]})
    judge.add("a", figures(), {})
    state = judge.state_dict()
    del state["a"]["bf16"]["nonfinite"]
    judge.load_state_dict(state)
    assert judge.assessment().advice[0].nonfinite == 0
