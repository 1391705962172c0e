"""The sentences on a run: proper English, few names, and no NaN."""

import itertools
import math

import pytest

from altgrad.report import RunAdvice, Verdict, write_sentence
from altgrad.report.judging.calibration import Outcome, calibration
from altgrad.report.judging.summaries import summarize, write_kept, write_nonfinite, write_word
from altgrad.report.judging.verdicts import Advice
from tests.report.runs import MARKUP, SCRIPT
from tests.report.twin_runs import NAN

LIMITS = calibration().thresholds


def advise(**changes: object) -> RunAdvice:
    fine: dict[str, object] = {
        "recipe": "bf16",
        "verdict": Verdict.STORES_FINE,
        "kept": 0.995,
        "interval": (0.97, 1.02),
        "weight_error": 0.0,
        "frozen_frac": 0.0,
        "frozen": [],
        "frozen_share": 0.0,
        "behind_share": 0.0,
        "layers": 12,
        "outcome": Outcome(66, 8),
        "to_do": "Nothing is lost that matters.",
        "has_twin": True,
    }
    return RunAdvice(**fine | changes)  # type: ignore[arg-type]


def test_a_sentence_has_word_progress_evidence_and_what_to_do() -> None:
    assert write_sentence(advise()) == (
        "bf16: fine. 0.99 of the progress is kept by twins, 0.97 to 1.02 by 80 % of real runs; 8 "
        "of 66 such runs lost over 10 %. Nothing is lost that matters."
    )


def test_an_interval_that_does_not_hold_the_share_is_told_from_it() -> None:
    """The interval is of real runs, of which calibration runs kept less than their twins."""
    assert write_kept(advise(kept=1.01, interval=(0.9, 0.9796))) == (
        "1.01 of the progress is kept by twins, 0.90 to 0.97 by 80 % of real runs"
    )
    assert write_kept(advise(recipe="now", kept=0.9)) == (
        "0.90 of the progress is kept, 0.97 to 1.02 by 80 % of real runs"
    )


@pytest.mark.parametrize("kept", [0.9796, 0.89996, 0.49999, 0.00004])
def test_no_share_in_a_sentence_is_rounded_to_a_threshold(kept: float) -> None:
    sentence = write_sentence(advise(kept=kept, interval=(NAN, NAN)))
    shown = float(sentence.partition(". ")[2].split()[0])
    limits = (LIMITS.stores_fine, LIMITS.needs_remedy, LIMITS.frozen_kept)
    assert [shown >= limit for limit in limits] == [kept >= limit for limit in limits]
    assert shown > 0


def test_layers_that_stand_still_are_named_with_their_share() -> None:
    to_do = "Keep those in float32."
    gains = [f"blocks.{number}.norm.weight" for number in range(7)]
    frozen = advise(verdict=Verdict.WATCH, frozen=gains, frozen_share=0.0014, to_do=to_do)
    assert write_sentence(frozen).endswith(
        "Would freeze: 7 layers (<1 % of the weights: blocks.0.norm.weight, "
        "blocks.1.norm.weight, blocks.2.norm.weight and 4 more). Keep those in float32."
    )
    one = advise(frozen=gains[:1], frozen_share=0.2, to_do="")
    assert write_sentence(one).endswith(f"Would freeze: 1 layer (20 % of the weights: {gains[0]}).")
    now = one._replace(recipe="now")
    assert write_sentence(now).endswith(f"Frozen now: 1 layer (20 % of the weights: {gains[0]}).")


def test_names_are_unchanged() -> None:
    sentence = write_sentence(advise(frozen=[SCRIPT, MARKUP], frozen_share=0.5))
    assert f": {SCRIPT}, {MARKUP})" in sentence


@pytest.mark.parametrize(
    ("recipe", "verdict", "kept", "word"),
    [
        ("bf16", Verdict.WATCH, 0.95, "watch"),
        ("bf16", Verdict.OVERSHOOTS, 1.5, "over"),
        ("now", Verdict.STORES_FINE, 1.0, "fine now"),
        ("now", Verdict.WATCH, 0.95, "loses 0.05 now"),
        ("now", Verdict.WATCH, 1.05, "watch now"),
        ("now", Verdict.NEEDS_REMEDY, 0.03, "loses 0.97 now"),
        ("now", Verdict.NEEDS_REMEDY, NAN, "partly frozen now"),
        ("now", Verdict.FROZEN, 0.0, "frozen now"),
        ("now", Verdict.BREAKS, NAN, "breaks now"),
    ],
)
def test_a_word_says_what_a_run_loses_now(
    recipe: str, verdict: Verdict, kept: float, word: str
) -> None:
    assert write_word(advise(recipe=recipe, verdict=verdict, kept=kept)) == word


def test_an_interval_without_a_value_is_left_out() -> None:
    for ends in ((NAN, NAN), (0.995, 0.995)):
        assert write_kept(advise(interval=ends)) == "0.99 of the progress is kept by twins"


def test_single_steps_are_told_from_progress() -> None:
    steps = advise(has_twin=False, to_do="")
    assert write_sentence(steps) == (
        "bf16: fine. 0.99 (0.97 to 1.02) of the update is kept, step by step."
    )


def test_weights_that_are_far_off_are_mentioned() -> None:
    far = advise(weight_error=2 * LIMITS.weight_error, kept=1.0)
    assert f", and weights are off by {2 * LIMITS.weight_error:.2f} of their size; 8 of" in (
        write_sentence(far)
    )
    assert "off by" not in write_sentence(advise(weight_error=LIMITS.weight_error))


def test_layers_that_another_one_hides_are_mentioned() -> None:
    hidden = advise(behind_share=0.934, kept=1.0, verdict=Verdict.NEEDS_REMEDY)
    assert "real runs, but layers with 93 % of the weights keep less than half of theirs; 8" in (
        write_sentence(hidden)
    )
    for seen in ({"kept": 0.1}, {"behind_share": LIMITS.left_behind}):
        assert "of theirs" not in write_sentence(hidden._replace(**seen))


@pytest.mark.parametrize("recipe", ["bf16", "now"])
def test_no_sentence_has_a_nan_or_an_empty_part(recipe: str) -> None:
    cases = itertools.product(
        Verdict, (0.5, 1.0, NAN), ([], ["gain"]), (None, Outcome(0, 0), Outcome(2, 1)), ("", "Do.")
    )
    for verdict, kept, frozen, outcome, to_do in cases:
        sentence = write_sentence(
            advise(
                recipe=recipe,
                verdict=verdict,
                kept=kept,
                interval=(kept, kept),
                weight_error=NAN,
                frozen_frac=NAN,
                frozen=frozen,
                frozen_share=NAN if math.isnan(kept) else 0.5,
                outcome=outcome,
                to_do=to_do,
            )
        )
        assert "nan" not in sentence.lower().replace("nan or inf", "")
        assert sentence.endswith(".")
        for wrong in ("..", "  ", " .", "; .", "()", ": .", ";."):
            assert wrong not in sentence, sentence


def test_a_run_that_is_not_judged_says_so() -> None:
    for recipe in ("bf16", "now"):
        nothing = advise(recipe=recipe, verdict=Verdict.NOT_JUDGED, kept=NAN, to_do="")
        assert write_sentence(nothing) == (
            f"{recipe}: not judged. No step has moved a layer that it could lose."
        )
        why = nothing._replace(to_do="All weights are NaN or inf.")
        assert write_sentence(why) == f"{recipe}: not judged. All weights are NaN or inf."


def test_the_summary_has_a_sentence_for_each_recipe() -> None:
    runs = {name: advise(recipe=name) for name in ("now", "bf16", "e5m2")}
    layer = Advice("a", "bf16", Verdict.STORES_FINE, {}, {}, "")
    summary = summarize(runs, [layer])
    assert summary == " ".join(map(write_sentence, runs.values()))
    assert summarize({}, []).startswith("No step was observed, or the monitor has neither formats")


def test_the_summary_names_layers_that_are_not_finite_once() -> None:
    broken = [
        Advice("b", recipe, Verdict.WATCH, {"progress_kept": 0.5}, {}, "", nonfinite=0.5)
        for recipe in ("bf16", "e5m2")
    ]
    fine = Advice("a", "bf16", Verdict.STORES_FINE, {}, {}, "")
    assert summarize({}, [fine, *broken]).endswith(
        "NaN or inf in elements (nonfinite_frac), which no figure counts: b (50 %)."
    )
    many = [broken[0]._replace(layer=f"b.{number}") for number in range(2000)]
    assert summarize({}, many).endswith("b.0 (50 %), b.1 (50 %), b.2 (50 %) and 1,997 more.")


def test_layers_with_nan_are_named_with_their_share() -> None:
    assert write_nonfinite({}, []) == ""
    counted = "NaN or inf in elements (nonfinite_frac), which no figure counts: a (50 %), b (<1 %)."
    assert write_nonfinite({"a": 0.5, "b": 1e-4}, []) == counted
    lost = Advice("a", "bf16", Verdict.WATCH, {}, {}, "", is_lost=True)
    assert write_nonfinite({"a": 0.5, "b": 1e-4}, [lost]) == (
        f"This run became NaN or inf, and its verdicts are on the steps before. {counted}"
    )
    never = lost._replace(verdict=Verdict.NOT_JUDGED)
    assert write_nonfinite({"a": 0.5, "b": 1e-4}, [never]) == (
        f"This run became NaN or inf before it could be judged. {counted}"
    )
