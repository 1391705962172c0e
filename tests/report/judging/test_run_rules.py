"""The verdicts on whole runs: progress of all layers together, its error, and what to do."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from altgrad import StepRecord
from altgrad.report import Judge, RunAdvice, StandardErrors, Verdict, judge_run
from altgrad.report.judging.calibration import calibration
from altgrad.report.judging.run_rules import (
    LayerShare,
    find_kept_interval,
    judge_recipe,
)
from altgrad.report.judging.verdicts import Advice
from tests.report.twin_runs import NAN, make_layers, make_share, record

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


def test_a_layer_that_moves_far_does_not_hide_that_the_rest_keeps_nothing() -> None:
    """One parameter at a high learning rate, and a body that is left behind."""
    far = make_share(GOOD, size=70, moved=2.0, name="scale")
    body = make_share(0.05, size=930, moved=0.01)
    run = judge(far, body)
    assert run.kept > LIMITS.stores_fine
    assert (run.behind_share, run.verdict) == (0.93, Verdict.NEEDS_REMEDY)
    little = make_share(0.05, size=930 * LIMITS.left_behind / 4, moved=0.001)
    assert judge(far, make_share(GOOD, size=930), little).verdict is Verdict.STORES_FINE
    # Float32 hardly moves the body of a fine-tuning, of which only the head is trained.
    unmoved = dataclasses.replace(body, weights=1.0, moved=LIMITS.moved)
    assert judge(far, unmoved).verdict is Verdict.STORES_FINE
    steps = [
        dataclasses.replace(of_steps(kept), moved=moved) for kept, moved in ((1.0, 1), (0, 0.01))
    ]
    assert judge(*steps).verdict is Verdict.NEEDS_REMEDY


def test_a_run_whose_sample_leaves_everything_open_is_uncertain() -> None:
    wide = 0.5 / 1.2816 + LITTLE
    for kept in (GOOD, LIMITS.needs_remedy, BAD):
        assert judge(make_share(kept, error=wide)).verdict is Verdict.UNCERTAIN
        assert judge(make_share(kept, error=wide - 2 * LITTLE)).verdict is not Verdict.UNCERTAIN
    assert judge(make_share(50.0, error=10.0)).verdict is Verdict.OVERSHOOTS
    assert judge(make_share(GOOD, error=wide)).evidence == ""


@pytest.mark.parametrize(
    ("kept", "limit", "verdict"),
    [
        (0.8, LIMITS.stores_fine, Verdict.NEEDS_REMEDY),
        (1.3, LIMITS.overshoots, Verdict.OVERSHOOTS),
    ],
)
def test_harm_by_stochastic_rounding_has_to_be_more_than_chance(
    kept: float, limit: float, verdict: Verdict
) -> None:
    """Of tiny layers, the draws of the twin decide how much is kept."""
    edge = abs(limit - kept) / 1.2816
    wide, narrow = ([make_share(kept, error=edge + each)] for each in (LITTLE, -LITTLE))
    for layers, expected in ((wide, Verdict.UNCERTAIN), (narrow, verdict)):
        found = judge_recipe("e5m2-sr", "stochastic", layers, is_stochastic=True)
        assert found.verdict is expected
    assert judge_recipe("e5m2", "nearest-8", wide).verdict is verdict


def test_a_run_of_which_only_is_known_what_stands_still_is_judged_by_that() -> None:
    """No twin can follow its optimizer, such as Adafactor."""
    rest = make_share(NAN, moved=NAN, size=900, verdict=Verdict.NOT_JUDGED)
    frozen = make_share(NAN, moved=NAN, size=100, verdict=Verdict.FROZEN, name="gain")
    assert judge(rest).verdict is Verdict.NOT_JUDGED
    some = judge(rest, frozen)
    assert (some.verdict, some.frozen, some.frozen_share) == (Verdict.NEEDS_REMEDY, ["gain"], 0.1)
    assert judge(frozen).verdict is Verdict.FROZEN
    assert judge(frozen).evidence == some.evidence == "no such run was tested"


def test_layers_count_by_their_size_if_no_movement_is_known() -> None:
    """A checkpoint of version 0.1.0 has no sizes of updates."""
    shares = [of_steps(1.0), of_steps(0.2)]
    unknown = [
        dataclasses.replace(share, moved=NAN, size=size)
        for share, size in zip(shares, (300, 100), strict=True)
    ]
    assert judge(*unknown).kept == pytest.approx(0.8)
    assert judge(unknown[1], shares[0]).kept == 1.0  # a movement that is known counts alone


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
