"""The verdicts on whole runs: progress of all layers together, its error, and what to do."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from altgrad import StepRecord
from altgrad.report import Judge, RunAdvice, Verdict, judge_run
from altgrad.report.judging.calibration import calibration
from altgrad.report.judging.judge import StandardErrors
from altgrad.report.judging.run_rules import (
    LayerShare,
    add_remedies,
    find_kept_interval,
    judge_recipe,
)
from altgrad.report.judging.verdicts import Advice
from altgrad.report.records.schema import RecipeInfo
from tests.report.twin_runs import NAN, make_layers, make_recipe, make_share, push_gradients, record

LIMITS = calibration().thresholds
STEPS = calibration().step_thresholds
LITTLE = 1e-4
BAD = LIMITS.needs_remedy / 2
GOOD = (LIMITS.stores_fine + LIMITS.overshoots) / 2


def judge(*layers: LayerShare, name: str = "bf16") -> RunAdvice:
    return judge_recipe(name, "nearest-16", layers)


def of_steps(kept: float, **about: Any) -> LayerShare:
    """Make a layer that is judged from single steps."""
    errors = {"kept_update_ratio": 0.0}
    advice = Advice(
        "steps", "bf16", Verdict.WATCH, {"kept_update_ratio": kept}, errors, "", **about
    )
    return LayerShare(advice, 1000, 1e-4)


# --- the progress of all layers


def test_the_progress_of_a_run_is_that_of_the_last_record(tmp_path: Path) -> None:
    """The record adds up the sums of all layers, the verdicts the figures of each."""
    torch.manual_seed(0)
    net = make_layers(wide=torch.randn(90, 100), gain=torch.ones(300), small=torch.randn(7) / 50)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-4)
    recipes = ["bf16", "bf16-sr", "bf16-true", "e4m3fn"]
    records: list[StepRecord] = []
    run = record(
        tmp_path,
        net,
        optimizer,
        on_record=records.append,
        formats=["bf16"],
        recipes=recipes,
        twin_elements=64,
    )
    judge = Judge(run.formats, run.layers, run.recipes)
    for each in records:
        for layer, figures in each.layers.items():
            judge.add(each.index, layer, figures, StandardErrors(figures))
    found, read_again = judge.assessment().runs, judge_run(run).runs
    for recipe in recipes:
        kept = records[-1].model[f"progress_kept/{recipe}"]
        assert found[recipe].kept == pytest.approx(kept, rel=1e-9)
        assert read_again[recipe].kept == pytest.approx(kept, rel=1e-7)  # a file has 8 digits
        of_layers = {each[f"progress_kept/{recipe}"] for each in records[-1].layers.values()}
        assert len(of_layers) > 1


def draw(layers: list[tuple[torch.Tensor, torch.Tensor]], sample: int, seed: int) -> RunAdvice:
    """Judge a run of layers with these movements in float32 and in a recipe, from a sample."""
    random = torch.Generator().manual_seed(seed)
    shares = []
    for high, low in layers:
        chosen = torch.randperm(len(high), generator=random)[:sample]
        a, b = (low * high)[chosen], high.square()[chosen]
        kept = float(a.sum() / b.sum())
        rest = (a - kept * b).square().sum() * (1 - len(b) / len(high)) * len(b) / (len(b) - 1)
        shares.append(
            make_share(
                kept,
                size=len(high),
                moved=float(b.mean().sqrt()),
                error=float(rest.clamp_min(0).sqrt() / b.sum()),
            )
        )
    return judge(*shares)


def find_half(run: RunAdvice) -> float:
    """Return half of the width of the interval that the error of the sample adds."""
    low, high = calibration().find_offsets(run.kept)
    return (run.interval[1] - run.interval[0] - (high - low)) / 2


def test_a_sample_of_each_layer_stands_for_all_of_it() -> None:
    """Of 600 samples about 80 % are as near to the truth as their error says."""
    random = torch.Generator().manual_seed(0)
    layers = []
    for size, scale in ((20_000, 1.0), (8000, 1.5), (3000, 2.5), (50, 4.0)):
        high = torch.randn(size, generator=random, dtype=torch.float64) * scale
        layers.append((high, high * torch.randn(size, generator=random) * 0.5 + 0.6 * high))
    truth = sum(float(low @ high) for high, low in layers)
    truth /= sum(float(high @ high) for high, _ in layers)
    runs = [draw(layers, 128, seed) for seed in range(600)]
    kept = torch.tensor([run.kept for run in runs])
    half = torch.tensor([find_half(run) for run in runs])
    assert float(kept.mean()) == pytest.approx(truth, abs=0.01)
    assert float(half.mean() / 1.2816) == pytest.approx(float(kept.std()), rel=0.15)
    assert 0.75 < float(((kept - truth).abs() < half).double().mean()) < 0.85
    whole = draw(layers, 20_000, 0)
    assert (whole.kept, find_half(whole)) == (pytest.approx(truth), pytest.approx(0, abs=1e-6))


def test_a_layer_counts_by_its_size_and_the_square_of_its_movement() -> None:
    shares = [make_share(0.5, size=100, moved=2.0), make_share(1.0, size=300, moved=1.0)]
    assert judge(*shares).kept == pytest.approx((400 * 0.5 + 300) / 700)
    still = [make_share(NAN, moved=NAN), make_share(0.0, moved=0.0)]
    assert judge(*shares, *still).kept == judge(*shares).kept
    assert math.isnan(judge(*still).kept)


def test_a_sample_that_is_too_small_may_be_all_wrong() -> None:
    low, high = judge(make_share(GOOD, error=NAN)).interval
    assert low < GOOD - 1
    assert high > GOOD + 1


def test_single_steps_do_not_count_beside_twins() -> None:
    run = judge(make_share(0.5, moved=1e-6), of_steps(1.0))
    assert (run.kept, run.has_twin, run.layers) == (0.5, True, 2)
    alone = judge(of_steps(STEPS.stores_fine + LITTLE))
    assert (alone.verdict, alone.has_twin) == (Verdict.STORES_FINE, False)
    assert alone.interval == (alone.kept, alone.kept)  # no real run says how far they are off
    assert alone.evidence == ""
    assert judge(of_steps(STEPS.needs_remedy + LITTLE)).verdict is Verdict.WATCH
    assert judge(of_steps(STEPS.needs_remedy - LITTLE)).verdict is Verdict.NEEDS_REMEDY


# --- verdicts


@pytest.mark.parametrize(
    ("kept", "verdict"),
    [
        (LIMITS.stores_fine, Verdict.STORES_FINE),
        (LIMITS.stores_fine - LITTLE, Verdict.WATCH),
        (LIMITS.needs_remedy, Verdict.WATCH),
        (LIMITS.needs_remedy - LITTLE, Verdict.NEEDS_REMEDY),
        (LIMITS.overshoots + LITTLE, Verdict.OVERSHOOTS),
        (NAN, Verdict.NOT_JUDGED),
    ],
)
def test_each_verdict_begins_at_its_threshold(kept: float, verdict: Verdict) -> None:
    assert judge(make_share(kept)).verdict is verdict


def test_a_run_is_frozen_if_much_of_it_stands_still_and_little_is_kept() -> None:
    half = LIMITS.run_frozen * 1000
    frozen = make_share(0.0, size=half, verdict=Verdict.FROZEN, name="frozen")
    stuck = make_share(0.0, size=half, verdict=Verdict.STUCK, name="stuck")
    rest = make_share(0.1, size=1000 - half, moved=1.0)
    for standing in (frozen, stuck):
        run = judge(standing, rest)
        assert run.verdict is Verdict.FROZEN
        assert run.frozen_share == pytest.approx(LIMITS.run_frozen)
        assert run.frozen == [standing.advice.layer]
    smaller = make_share(0.0, size=half - 1, verdict=Verdict.FROZEN)
    assert judge(smaller, make_share(0.1, size=1001 - half)).verdict is Verdict.NEEDS_REMEDY
    kept = make_share(1.0, size=1000 - half, moved=10.0)
    assert judge(frozen, kept).verdict is not Verdict.FROZEN


def test_one_layer_that_breaks_breaks_the_run() -> None:
    run = judge(make_share(GOOD), make_share(NAN, verdict=Verdict.BREAKS))
    assert run.verdict is Verdict.BREAKS


def test_weights_that_are_far_off_are_not_stored_fine() -> None:
    """Against the distance of all weights together."""
    torch.manual_seed(0)
    layers = [(torch.randn(300) * size, torch.randn(300) * off) for size, off in ((1, 0.3), (5, 1))]
    shares = [
        LayerShare(
            make_share(1.0).advice,
            300,
            1.0,
            float(weights.square().mean().sqrt()),
            float(apart.norm() / weights.norm()),
        )
        for weights, apart in layers
    ]
    weights, apart = (torch.cat(each) for each in zip(*layers, strict=True))
    run = judge(*shares)
    assert run.weight_error == pytest.approx(float(apart.norm() / weights.norm()), rel=1e-5)
    assert run.verdict is Verdict.WATCH


def test_evidence_is_that_of_the_family(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"nearest-16": {"STORES_FINE": {"runs": 66, "lost_10_percent": 8}}}
    monkeypatch.setitem(vars(calibration()), "runs", counts)
    assert judge(make_share(GOOD)).evidence == "8 of 66 such runs lost over 10 %"
    none = "no real run had this verdict"
    assert judge_recipe("bf16", "stochastic", [make_share(GOOD)]).evidence == none
    assert judge_recipe("bf16", None, [make_share(GOOD)]).evidence == "no such run was tested"


def test_an_interval_is_nan_without_progress() -> None:
    low, high = find_kept_interval(NAN, 0.1, has_twin=True)
    assert math.isnan(low)
    assert math.isnan(high)


# --- what to do

SR = make_recipe("bf16-sr", weights="bf16", rounding="stochastic")
KAHAN = make_recipe("bf16-kahan", weights="bf16", compensation="kahan")


def advise(name: str, *recipes: RecipeInfo, **shares: LayerShare) -> str:
    """Return what to do for a recipe, one of the run's recipes with these layers."""
    layers = {key.replace("_", "-"): [share] for key, share in shares.items()}
    runs = {key: judge_recipe(key, None, own) for key, own in layers.items()}
    return add_remedies(runs, {each.name: each for each in recipes}, layers)[name].to_do


def test_a_remedy_that_was_tried_is_named_with_what_it_keeps_and_costs() -> None:
    costly = make_share(1.004, exp_avg_sq_ratio=1.9)
    found = advise("bf16", make_recipe(), SR, bf16=make_share(BAD), bf16_sr=costly)
    assert found == (
        "Use bf16-sr, which keeps 1, but leaves exp_avg_sq at 1.9 times that of float32."
    )
    both = {"bf16_sr": make_share(0.99), "bf16_kahan": make_share(1.001)}
    assert advise("bf16", make_recipe(), SR, KAHAN, bf16=make_share(BAD), **both) == (
        "Use bf16-kahan, which keeps 1."
    )
    now = make_share(BAD, name="now")
    assert advise("now", SR, now=now, bf16_sr=make_share(1.0)) == "Use bf16-sr, which keeps 1."


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
        "Add the recipes bf16-sr and bf16-kahan to see what these remedies would keep."
    )
    tried = {"bf16": make_share(BAD), "bf16_sr": make_share(BAD)}
    for name in ("bf16", "bf16-sr"):
        assert advise(name, make_recipe(), SR, **tried) == (
            "Add the recipe bf16-kahan to see what this remedy would keep."
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


def test_states_that_are_too_small_are_named() -> None:
    over, low = make_share(10.0), make_share(BAD)
    states = {"exp_avg": "e5m2", "exp_avg_sq": "e5m2"}
    for share in (over, low):
        named = make_recipe("v8", states=states)
        assert advise("v8", named, v8=share) == "Store exp_avg and exp_avg_sq in more bits."
        every = make_recipe("v8", states={"*": "e5m2"})
        assert advise("v8", every, v8=share) == "Store the optimizer states in more bits."
    assert advise("now", now=over) == "Store the optimizer states in more bits."
    true = make_recipe("bf16-true", dtype="bfloat16")
    assert "optimizer states" in advise("bf16-true", true, bf16_true=over)
    assert "Add the recipes" in advise("e5m2", make_recipe("e5m2"), e5m2=over)  # by its weights


def test_what_breaks_gets_numbers_that_are_large_enough() -> None:
    broken = make_share(NAN, verdict=Verdict.BREAKS)
    fp16 = make_recipe("fp16-true", dtype="float16")
    expected = "Use bf16 in place of fp16, or keep the optimizer states in float32."
    assert advise("fp16-true", fp16, fp16_true=broken) == expected
    assert advise("now", now=broken) == expected
    states = make_recipe("v8", states={"exp_avg_sq": "e5m2"})
    assert advise("v8", states, v8=broken) == "Keep the optimizer states in float32."
    assert advise("e5m2", make_recipe("e5m2"), e5m2=broken) == "Use a format with larger numbers."


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
    assert "Add the recipes" in find()  # a third stands still, though most progress is kept
    layers["bf16"] = [make_share(GOOD)]
    assert find() == "Nothing is lost that matters."
    layers["bf16"] = [make_share(NAN)]
    assert find() == ""


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
