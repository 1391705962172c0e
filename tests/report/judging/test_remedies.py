"""What to do about the verdict on a run: remedies that were tried, and those to try."""

import dataclasses
from pathlib import Path

import torch
from torch import nn

from altgrad.report import Verdict, judge_run
from altgrad.report.judging.calibration import calibration
from altgrad.report.judging.remedies import add_remedies
from altgrad.report.judging.run_rules import LayerShare, judge_recipe
from altgrad.report.records.schema import RecipeInfo
from tests.report.twin_runs import NAN, make_layers, make_recipe, make_share, push_gradients, record

LIMITS = calibration().thresholds
BAD = LIMITS.needs_remedy / 2
GOOD = (LIMITS.stores_fine + LIMITS.overshoots) / 2

SR = make_recipe("bf16-sr", weights="bf16", rounding="stochastic")
KAHAN = make_recipe("bf16-kahan", weights="bf16", compensation="kahan")
FINE = make_share(1.0)


def advise(name: str, *recipes: RecipeInfo, **shares: LayerShare) -> str:
    """Return what to do for a recipe, one of the run's recipes with these layers."""
    layers = {key.replace("_", "-"): [share] for key, share in shares.items()}
    runs = {key: judge_recipe(key, None, own) for key, own in layers.items()}
    return add_remedies(runs, {each.name: each for each in recipes}, layers)[name].to_do


def test_a_remedy_that_was_tried_is_named_with_what_it_keeps_and_costs() -> None:
    costly = make_share(1.004, exp_avg_sq_ratio=1.9)
    found = advise("bf16", make_recipe(), SR, bf16=make_share(BAD), bf16_sr=costly)
    assert found == (
        "Use bf16-sr, which keeps 1.00, but leaves exp_avg_sq at 1.9 times that of float32."
    )
    both = {"bf16_sr": make_share(0.99), "bf16_kahan": make_share(1.001)}
    assert advise("bf16", make_recipe(), SR, KAHAN, bf16=make_share(BAD), **both) == (
        "Use bf16-kahan, which keeps 1.00."
    )
    now = make_share(BAD, name="now")
    assert advise("now", SR, now=now, bf16_sr=make_share(1.0)) == "Use bf16-sr, which keeps 1.00."


def test_a_remedy_in_the_same_format_is_preferred() -> None:
    small = make_recipe("e5m2-sr", weights="e5m2", rounding="stochastic")
    shares = {
        "e5m2": make_share(BAD),
        "bf16_sr": make_share(1.0),
        "e5m2_sr": make_share(LIMITS.stores_fine),
    }
    assert "Use e5m2-sr" in advise("e5m2", make_recipe("e5m2"), SR, small, **shares)
    shares["bf16"] = make_share(BAD)
    recipes = make_recipe("e5m2"), make_recipe(), SR, small
    assert "Use bf16-sr" in advise("bf16", *recipes, **shares)


def test_remedies_that_were_not_tried_are_proposed() -> None:
    assert advise("bf16", make_recipe(), bf16=make_share(BAD)) == (
        "Pass bf16-sr and bf16-kahan in recipes, too: they may keep more."
    )
    tried = {"bf16": make_share(BAD), "bf16_sr": make_share(BAD)}
    for name in ("bf16", "bf16-sr"):
        assert advise(name, make_recipe(), SR, **tried) == (
            "Pass bf16-kahan in recipes, too: it may keep more."
        )
    assert advise("bf16-sr", SR, bf16_sr=make_share(BAD)) == (
        "Pass bf16-kahan in recipes, too: it may keep more."
    )
    assert "e5m2-sr and e5m2-kahan" in advise("e5m2", make_recipe("e5m2"), e5m2=make_share(BAD))
    small = make_recipe("e5m2-sr", weights="e5m2", rounding="stochastic")
    middle = make_share(LIMITS.needs_remedy)
    shares = {"e5m2": make_share(BAD), "e5m2_sr": middle}
    found = advise("e5m2", make_recipe("e5m2"), small, **shares)
    assert found.startswith("Use e5m2-sr, which keeps ")
    assert "(watch)" in found
    tried["bf16_kahan"] = make_share(BAD)
    assert advise("bf16", make_recipe(), SR, KAHAN, **tried) == (
        "No remedy that was tried stores it fine: keep the weights in float32."
    )


def test_a_recipe_is_no_remedy_for_itself() -> None:
    frozen = make_share(0.0, size=10, verdict=Verdict.FROZEN, name="gain")
    layers = {"bf16-kahan": [make_share(GOOD, size=1000), frozen]}
    runs = {"bf16-kahan": judge_recipe("bf16-kahan", None, layers["bf16-kahan"])}
    assert add_remedies(runs, {"bf16-kahan": KAHAN}, layers)["bf16-kahan"].to_do == (
        "Keep it in float32."
    )
    assert "bf16-sr" in advise("bf16-kahan", KAHAN, SR, bf16_kahan=make_share(BAD), bf16_sr=FINE)


def test_a_remedy_in_another_format_is_better_than_one_that_does_not_help() -> None:
    small = make_recipe("e5m2-sr", weights="e5m2", rounding="stochastic")
    shares = {"e5m2": make_share(BAD), "e5m2_sr": make_share(LIMITS.needs_remedy), "bf16_sr": FINE}
    for name in ("e5m2", "e5m2-sr"):
        assert advise(name, make_recipe("e5m2"), small, SR, **shares) == (
            "Use bf16-sr, which keeps 1.00."
        )


def test_remedies_without_a_figure_are_not_proposed_again() -> None:
    """The run has the recipes, but no twin can follow its optimizer."""
    single = make_share(BAD).advice._replace(figures={"kept_update_ratio": BAD}, errors={})
    layers = {"e4m3fn": [LayerShare(single._replace(errors={"kept_update_ratio": 0.0}), 10, 1.0)]}
    runs = {"e4m3fn": judge_recipe("e4m3fn", None, layers["e4m3fn"])}
    recipes = {each.name: each for each in (SR, KAHAN)}
    assert add_remedies(runs, recipes, layers)["e4m3fn"].to_do == (
        "Round stochastically or with Kahan summation, or keep the weights in float32."
    )


def test_a_remedy_to_watch_that_none_betters_is_said_to_be_one() -> None:
    middle = make_share(LIMITS.needs_remedy)
    assert advise("bf16-sr", SR, KAHAN, bf16_sr=middle, bf16_kahan=make_share(BAD)) == (
        "No remedy that was tried keeps more: watch the loss, or use float32."
    )


def test_layers_that_keep_little_are_named_where_the_run_as_a_whole_keeps_much() -> None:
    slow = make_share(0.02, size=20, moved=0.1, name="slow")

    def find(*layers: LayerShare, recipe: RecipeInfo | None = None) -> str:
        own = {"bf16": [make_share(GOOD, size=1000), *layers]}
        runs = {"bf16": judge_recipe("bf16", None, own["bf16"])}
        return add_remedies(runs, {"bf16": recipe or make_recipe()}, own)["bf16"].to_do

    assert find(slow) == ("slow keeps less than half of its progress. Keep it in float32.")
    frozen = make_share(0.0, size=10, moved=0.1, verdict=Verdict.FROZEN, name="gain")
    assert find(slow, frozen) == (
        "slow keeps less than half of its progress. Keep those in float32."
    )
    large = make_share(0.02, size=200, moved=0.1, name="large")
    assert find(slow, large).startswith("slow, large keep less than half of their progress. Pass ")
    assert find(make_share(0.02, size=200, moved=0.0)) == "Nothing is lost that matters."


def test_a_fine_recipe_with_slow_layers_is_not_called_unfit() -> None:
    large = make_share(0.02, size=200, moved=0.1, name="large")
    layers = {"bf16-kahan": [make_share(GOOD, size=1000), large], "bf16-sr": [make_share(BAD)]}
    runs = {name: judge_recipe(name, None, own) for name, own in layers.items()}
    assert runs["bf16-kahan"].verdict is Verdict.STORES_FINE
    recipes = {"bf16-kahan": KAHAN, "bf16-sr": SR}
    assert add_remedies(runs, recipes, layers)["bf16-kahan"].to_do == (
        "large keeps less than half of its progress. "
        "No other remedy that was tried is fine: keep these layers in float32."
    )


def test_what_is_left_open_is_measured_longer() -> None:
    open_wide = make_share(GOOD, error=1.0)
    assert advise("bf16", make_recipe(), bf16=open_wide) == (
        "Observe more steps, or raise twin_elements."
    )


def test_why_there_is_no_verdict_is_said() -> None:
    silent = make_share(NAN, verdict=Verdict.NOT_JUDGED)
    assert advise("bf16", make_recipe(), bf16=silent) == ""
    moved = make_share(NAN, verdict=Verdict.NOT_JUDGED, moved_since_start_frac=0.5)
    assert advise("now", now=moved) == (
        "No twin can follow the optimizer, so that what is lost is unknown."
    )
    broken = dataclasses.replace(silent, advice=silent.advice._replace(nonfinite=1.0))
    assert advise("bf16", make_recipe(), bf16=broken) == "All weights are NaN or inf."


def test_states_that_are_too_small_are_named() -> None:
    over, low = make_share(10.0), make_share(BAD)
    states = {"exp_avg": "e5m2", "exp_avg_sq": "e5m2"}
    for share in (over, low):
        named = make_recipe("v8", states=states)
        assert advise("v8", named, v8=share) == "Store exp_avg and exp_avg_sq in more bits."
        every = make_recipe("v8", states={"*": "e5m2"})
        assert advise("v8", every, v8=share) == "Store the optimizer states in more bits."
    assert advise("now", now=over) == "Store the optimizer states in more bits."
    for stored in (make_recipe("now", dtype="bfloat16"), make_recipe("now", states=states)):
        assert advise("now", stored, now=over).startswith("Store ")
    weights = make_recipe("now", weights="e4m3fn", rounding="stochastic")
    assert advise("now", weights, now=over) == (
        "Pass e4m3fn-kahan in recipes, too: it may keep more."
    )
    true = make_recipe("bf16-true", dtype="bfloat16")
    assert "optimizer states" in advise("bf16-true", true, bf16_true=over)
    assert "in recipes, too: they" in advise(
        "e5m2", make_recipe("e5m2"), e5m2=over
    )  # by its weights


def test_what_breaks_gets_numbers_that_are_large_enough() -> None:
    broken = make_share(NAN, verdict=Verdict.BREAKS)
    fp16 = make_recipe("fp16-true", dtype="float16")
    expected = "Use bf16 in place of fp16, or keep the optimizer states in float32."
    assert advise("fp16-true", fp16, fp16_true=broken) == expected
    states = make_recipe("v8", states={"exp_avg_sq": "e5m2"})
    assert advise("v8", states, v8=broken) == "Keep the optimizer states in float32."
    assert advise("e5m2", make_recipe("e5m2"), e5m2=broken) == "Use a format with larger numbers."
    assert advise("bf16", make_recipe(), bf16=broken).startswith("Look for the cause in the loss")


def test_a_run_that_is_nan_by_itself_is_not_told_to_store_otherwise() -> None:
    """The numbers of bf16 are as large as those of float32."""
    broken = make_share(NAN, verdict=Verdict.BREAKS)
    cause = "Look for the cause in the loss, the data or the learning rate."
    assert advise("now", now=broken) == cause
    assert advise("now", make_recipe("now", dtype="bfloat16"), now=broken) == cause
    for about in ({"dtype": "float16"}, {"states": {"exp_avg_sq": "e5m2"}}):
        found = advise("now", make_recipe("now", **about), now=broken)
        assert "the optimizer states in float32" in found
    weights = make_recipe("now", weights="e4m3fn")
    assert advise("now", weights, now=broken) == "Use a format with larger numbers."


def test_few_weights_that_stand_still_can_stay_in_float32() -> None:
    frozen = make_share(0.0, size=10, verdict=Verdict.FROZEN, name="gain")
    layers = {"bf16": [make_share(GOOD, size=1000), frozen]}
    recipes = {"bf16": make_recipe()}

    def find() -> str:
        runs = {"bf16": judge_recipe("bf16", None, layers["bf16"])}
        return add_remedies(runs, recipes, layers)["bf16"].to_do

    assert find() == "Keep it in float32."
    layers["bf16"].append(frozen)
    assert find() == "Keep those in float32."
    layers["bf16"].append(make_share(0.0, size=500, moved=0.01, verdict=Verdict.FROZEN))
    assert "in recipes, too: they" in find()  # a third stands still, though most progress is kept
    layers["bf16"] = [make_share(GOOD)]
    assert find() == "Nothing is lost that matters."
    layers["bf16"] = [make_share(NAN)]
    assert find() == ""


def test_layers_stay_in_float32_only_if_that_makes_the_run_fine() -> None:
    """Of a run to watch, the few weights that stand still may not be what it loses."""
    frozen = make_share(0.0, size=10, verdict=Verdict.FROZEN, name="gain", moved=1.0)
    watched = (LIMITS.stores_fine + LIMITS.needs_remedy) / 2

    def find(rest: float) -> tuple[Verdict, str]:
        layers = {"bf16": [make_share(rest, size=300), frozen], "bf16-sr": [FINE]}
        runs = {key: judge_recipe(key, None, own) for key, own in layers.items()}
        found = add_remedies(runs, {"bf16": make_recipe(), "bf16-sr": SR}, layers)["bf16"]
        return found.verdict, found.to_do

    both = "Keep it in float32, or use bf16-sr, which keeps 1.00."
    assert find(1.0) == (Verdict.WATCH, both)
    assert find(watched) == (Verdict.WATCH, "Use bf16-sr, which keeps 1.00.")
    assert find(GOOD) == (Verdict.STORES_FINE, both)


def test_a_run_of_which_many_weights_are_out_of_range_needs_a_scale() -> None:
    recipe = make_recipe("e4m3fn")
    small = make_recipe("e4m3fn-sr", weights="e4m3fn", rounding="stochastic")
    out = make_share(BAD, verdict=Verdict.RANGE)
    scale = "Weights are out of the range of e4m3fn: give it a scale, as scaling='tensor' does."
    assert advise("e4m3fn", recipe, e4m3fn=out) == scale
    assert advise("e4m3fn", e4m3fn=out) == scale  # judged from single steps
    assert advise("e4m3fn-sr", recipe, small, e4m3fn=out, e4m3fn_sr=out) == scale
    assert advise("e4m3fn", recipe, SR, e4m3fn=out, bf16_sr=FINE).startswith("Use bf16-sr")
    assert advise("e4m3fn", recipe, e4m3fn=make_share(BAD)).endswith(
        "in recipes, too: they may keep more."
    )


def test_a_run_in_bf16_is_told_what_its_recipes_would_keep(tmp_path: Path) -> None:
    net = make_layers(torch.bfloat16, gain=torch.ones(256))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)

    def push(net: nn.Module, step: int) -> None:
        push_gradients(net, step)

    run = record(
        tmp_path, net, optimizer, 60, prepare=push, formats=["e4m3fn"], recipes=["bf16-kahan"]
    )
    runs = judge_run(run).runs
    assert next(iter(runs)) == "now"
    assert runs["now"].verdict is Verdict.FROZEN
    assert runs["now"].frozen == ["gain"]
    assert runs["bf16-kahan"].verdict in (Verdict.STORES_FINE, Verdict.WATCH)
