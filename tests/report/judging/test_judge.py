"""`Judge`: whole runs, several optimizers, layers without twins, checkpoints, and large models."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from altgrad import UpdateMonitor
from altgrad.observation.rules import TWIN_ELEMENTS
from altgrad.quantization import get_formats
from altgrad.report import (
    Assessment,
    FormatInfo,
    Judge,
    LayerInfo,
    Run,
    RunFile,
    Verdict,
    judge_run,
    read,
)
from altgrad.report.judging import judge as judging
from altgrad.report.judging.calibration import calibration
from altgrad.report.judging.judge import MOST_TWIN_ELEMENTS, find_smallest
from tests.golden import replay
from tests.report import runs
from tests.report.twin_runs import (
    NAN,
    draw_gradients,
    figures,
    make_layers,
    make_recipe,
    push_gradients,
    record,
)

LIMITS = calibration().thresholds
STEPS = calibration().step_thresholds
WATCHED = (STEPS.stores_fine + STEPS.needs_remedy) / 2
FORMATS = {
    format.name: FormatInfo.from_format(format, "tensor")
    for format in get_formats(["fp16", "bf16", "e5m2"])
}


def assert_same(one: Assessment, other: Assessment) -> None:
    """Compare two assessments, of which NaN equals NaN."""
    assert repr(one.advice) == repr(other.advice)
    assert repr(one.runs) == repr(other.runs)
    assert (one.suggestions, one.summary) == (other.suggestions, other.summary)


# --- formats, from single steps


def judge_steps(**layers: dict[str, float]) -> Judge:
    judge = Judge(FORMATS)
    for name, each in layers.items():
        judge.add(0, name, each, {})
    return judge


def test_the_suggestion_is_the_smallest_format_that_stores_fine() -> None:
    watched = runs.figures("e5m2", kept_update_ratio=WATCHED)
    judge = judge_steps(
        all=runs.figures("fp16") | runs.figures("bf16") | runs.figures("e5m2"),
        two=runs.figures("fp16") | runs.figures("bf16") | watched,
        one=runs.figures("bf16") | watched,
        none=runs.figures("bf16", kept_update_ratio=WATCHED),
    )
    expected = {"all": "e5m2", "two": "fp16", "one": "bf16", "none": None}
    assert judge.assessment().suggestions == expected
    assert "fp16" not in judge.assessment().by_layer["one"]
    assert judge.assessment().by_layer["one"]["bf16"].verdict is Verdict.STORES_FINE
    assert find_smallest([], FORMATS) is None


def test_the_size_of_a_sample_is_that_of_the_monitor() -> None:
    assert MOST_TWIN_ELEMENTS == TWIN_ELEMENTS


def test_a_format_that_only_a_recipe_has_is_suggested_too() -> None:
    recipes = {name: make_recipe(name) for name in ("bf16", "e5m2")}
    judge = Judge({}, recipes=recipes | {"mine": make_recipe("mine", weights="e4m3fn")})
    errors = {f"progress_kept/{name}": 0.0 for name in ("bf16", "e5m2", "mine")}
    judge.add(
        0, "a", figures("bf16") | figures("e5m2", progress_kept=0.5) | figures("mine"), errors
    )
    judge.add(0, "b", figures("bf16", progress_kept=0.5), errors)
    assert judge.assessment().suggestions == {"a": "bf16", "b": None}


def test_no_step_and_nothing_to_lose_are_said() -> None:
    assert "No step was observed" in Judge(FORMATS).assessment().summary
    judge = judge_steps(layer=runs.figures(kept_update_ratio=NAN))
    assert judge.assessment().runs["bf16"].verdict is Verdict.NOT_JUDGED
    assert judge.assessment().summary.startswith("bf16: not judged")


@pytest.mark.parametrize("missing", runs.figures())
def test_a_format_with_a_missing_figure_is_not_judged(missing: str) -> None:
    rest = runs.figures() | runs.figures("e5m2")
    del rest[missing]
    assert [each.recipe for each in judge_steps(layer=rest).assessment().advice] == ["e5m2"]


def test_advice_has_the_interval_of_each_figure_it_rests_on() -> None:
    judge = Judge(FORMATS)
    errors = {"kept_update_ratio/bf16": 0.02, "never_moved_frac/bf16": 0.001}
    judge.add(0, "layer", runs.figures(kept_update_ratio=0.8), errors)
    (advice,) = judge.assessment().advice
    assert advice.interval("kept_update_ratio") == pytest.approx((0.7608, 0.8392), abs=1e-4)
    low, high = advice.interval("never_moved_frac")
    assert low == 0 < high < 0.005
    assert advice.interval("stall_frac") == (0, 0)  # without an error, all elements are measured


def test_a_format_without_a_twin_is_judged_from_steps(tmp_path: Path) -> None:
    """Weights of N(0, 0.02) have 7 % zeros in 4 bits by nature, which no other scale helps."""
    torch.manual_seed(0)
    net = make_layers(weights=torch.randn(128, 64) * 0.02)
    optimizer = torch.optim.SGD(net.parameters(), 2e-3)
    formats = ["nvfp4", "mxfp4"]
    run = record(
        tmp_path, net, optimizer, prepare=draw_gradients, formats=formats, recipes=["mxfp4"]
    )
    found = judge_run(run).by_layer["weights"]
    assert [found[name].has_twin for name in formats] == [False, True]
    assert found["nvfp4"].figures["underflow_frac"] > STEPS.underflow
    assert found["nvfp4"].kept < STEPS.stores_fine
    for name in formats:
        assert found[name].verdict not in (Verdict.RANGE, Verdict.NOT_JUDGED), found[name]
    without = record(tmp_path / "none", net, optimizer, 10, every=1, formats=formats, recipes=())
    assert [each.has_twin for each in judge_run(without).advice] == [False, False]


def test_a_sample_without_the_words_that_are_used_does_not_show_a_frozen_layer(
    tmp_path: Path,
) -> None:
    """Of 8,000 words 40 are used; the rest of an embedding only decays."""
    torch.manual_seed(0)
    found = []
    for first in range(0, 1600, 400):
        net = make_layers(words=torch.randn(8000, 8))
        optimizer = torch.optim.AdamW(net.parameters(), 1e-2, weight_decay=0.01)

        def use_some(net: torch.nn.Module, step: int, first: int = first) -> None:
            push_gradients(net, step)
            for layer in net.parameters():
                is_used = torch.zeros(len(layer), 1, dtype=torch.bool)
                is_used[first : first + 40] = True
                layer.grad = torch.where(is_used, layer.grad, 0)

        run = record(
            tmp_path / str(first),
            net,
            optimizer,
            30,
            prepare=use_some,
            formats=["bf16"],
            recipes=["bf16", "bf16-true"],
        )
        found += judge_run(run).advice
    of_none = [each for each in found if each.figures["frozen_frac"] == 1]
    assert of_none
    for each in of_none:
        assert each.verdict is Verdict.UNCERTAIN
        assert each.reason.endswith("step by step, in the sample of all figures")
    assert Verdict.FROZEN not in {each.verdict for each in found}


@pytest.mark.parametrize("recipes", [["e4m3fn"], ()])
def test_weights_out_of_range_need_a_scale(tmp_path: Path, recipes: list[str]) -> None:
    for scaling, verdict in ((None, True), ("tensor", False)):
        torch.manual_seed(0)
        net = make_layers(weights=torch.randn(4096) * 0.01)
        optimizer = torch.optim.SGD(net.parameters(), 1e-3)
        run = record(
            tmp_path / str(scaling),
            net,
            optimizer,
            prepare=draw_gradients,
            formats=["e4m3fn"],
            recipes=recipes,
            scaling=scaling,
            twin_elements=4096,
        )
        (found,) = judge_run(run).advice
        assert (found.verdict is Verdict.RANGE) is verdict, found
        assert ("of the weights are stored as 0" in found.reason) is verdict


# --- runs


def step_in_turn(folder: Path) -> Run:
    """Train two layers with an optimizer each, in turn, and a third from the middle on."""
    net = make_layers(torch.bfloat16, one=torch.ones(64), two=torch.full((256,), 0.5))
    optimizers = [torch.optim.AdamW([each], 1e-4) for each in net.parameters()]
    monitor = UpdateMonitor(
        net, every_n_steps=1, formats=["e4m3fn"], recipes=["bf16-sr"], warn=lambda notice: None
    )
    seen = None
    with (
        RunFile.create(folder, monitor.run_header()) as file,
        monitor.attach(*optimizers),
    ):
        for step in range(40):
            if step == 20:
                net["late"] = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
                optimizers[1].add_param_group({"params": [net["late"]]})
            push_gradients(net, step)
            optimizers[step % 2].step()
            if monitor.latest is not None and monitor.latest is not seen:
                seen = monitor.latest
                file.append(step, seen, skipped={}, weights=None)
    return read(file.path)


def test_each_optimizer_has_layers_of_its_own(tmp_path: Path) -> None:
    run = step_in_turn(tmp_path)
    assert len({frozenset(r.layer for r in run.rows if r.step == s) for s in run.steps}) > 1
    found = judge_run(run)
    assert {"one", "two"} <= {*found.by_layer}
    assert found.runs["now"].layers == len([a for a in found.advice if a.recipe == "now"])
    assert [*found.runs][:2] == ["now", "bf16-sr"]
    assert found.by_layer["one"]["now"].verdict is Verdict.FROZEN
    assert found.runs["now"].frozen[0] == "one"


def test_a_layer_that_appears_in_mid_run_counts_by_its_size() -> None:
    judge = Judge({}, {"first": LayerInfo((100,), "float32", 100, ())}, {"bf16": make_recipe()})
    judge.add(0, "first", figures(progress_kept=1.0), {})
    judge.add(1, "first", figures(progress_kept=1.0), {})
    judge.add(1, "late", figures(progress_kept=0.0), {})
    assert judge.assessment().runs["bf16"].kept == pytest.approx(100 / 101)
    judge.add_layers({"late": LayerInfo((30, 10), "float32", 300, ())})
    assert judge.assessment().runs["bf16"].kept == pytest.approx(0.25)
    assert judge.assessment().runs["bf16"].layers == 2


def test_what_a_run_loses_now_counts_beside_layers_in_float32(tmp_path: Path) -> None:
    """One gain in bf16 that is frozen does not freeze a run of which it is a tenth."""
    net = make_layers(gain=torch.ones(64), matrix=torch.full((64, 9), 0.5))
    net["gain"] = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4)
    run = record(tmp_path, net, optimizer, 20, formats=["e4m3fn"], recipes=["bf16-sr"])
    now = judge_run(run).runs["now"]
    assert (now.frozen, now.layers) == (["gain"], 2)
    assert now.frozen_share == now.frozen_frac == pytest.approx(0.1)
    energy = {"gain": 64.0, "matrix": 64.0 * 9}  # all weights move alike
    assert now.kept == pytest.approx(energy["matrix"] / sum(energy.values()), rel=1e-2)
    assert now.verdict is not Verdict.FROZEN


@pytest.mark.parametrize("states", [{}, {"exp_avg_sq": "e5m2"}], ids=["weights", "states too"])
@pytest.mark.parametrize("name", ["mine", "now"])
def test_no_recipe_that_rounds_stochastically_is_frozen(name: str, states: dict[str, str]) -> None:
    mine = make_recipe(name, weights="bf16", rounding="stochastic", states=states)
    now = mine if name == "now" else None
    judge = Judge({}, recipes={"bf16": make_recipe()} | ({} if now else {name: mine}), now=now)
    still = {"progress_kept": 0.0, "frozen_frac": 1.0, "still_frac": 1.0, "drift": 1.0}
    errors = {f"{metric}/{each}": 0.0 for metric in still for each in ("bf16", name)}
    judge.add(0, "gain", figures(**still) | figures(name, **still), errors)
    found = judge.assessment()
    assert found.by_layer["gain"]["bf16"].verdict is Verdict.FROZEN
    assert found.by_layer["gain"][name].verdict is Verdict.UNCERTAIN
    assert (found.runs["bf16"].verdict, found.runs[name].frozen) == (Verdict.FROZEN, [])
    assert found.runs[name].verdict is Verdict.UNCERTAIN  # as the one layer that it has


def test_a_run_file_of_version_0_1_0_is_judged() -> None:
    run = read(replay.RUN_FILE)
    assert not run.recipes
    found = judge_run(run)
    assert [*found.runs] == [name for name in run.formats if name in found.runs]
    assert not any(each.has_twin for each in [*found.advice, *found.runs.values()])
    assert {each.verdict for each in found.advice} > {Verdict.NOT_JUDGED}
    assert "nan" not in found.summary


def test_a_layer_whose_optimizer_has_no_copy_is_judged_from_steps() -> None:
    """Its twin has no value, but the format of the same name has."""
    judge = Judge(FORMATS, recipes={"bf16": make_recipe()})
    alone = figures(progress_kept=NAN, frozen_frac=NAN, still_frac=NAN, moved_rms=NAN, drift=NAN)
    judge.add(0, "a", alone | runs.figures(kept_update_ratio=WATCHED), {})
    (advice,) = judge.assessment().advice
    assert (advice.has_twin, advice.verdict) == (False, Verdict.WATCH)
    judge.add(
        0,
        "b",
        figures(progress_kept=1.0) | runs.figures(kept_update_ratio=0.1),
        {"progress_kept/bf16": 0.0},
    )
    found = judge.assessment()
    assert [each.has_twin for each in found.advice] == [False, True]
    assert found.runs["bf16"].kept == 1


def test_evidence_on_a_layer_is_that_of_its_family(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"layers": 2131, "frozen": 0, "kept": [0.991, 0.995, 1.0]}
    outcomes = {"nearest-16": {"STORES_FINE": counts}}
    monkeypatch.setitem(vars(calibration()), "layers", outcomes)
    judge = Judge({}, recipes={"bf16": make_recipe(), "e5m2": make_recipe("e5m2")})
    exact = {"progress_kept/bf16": 0.0, "progress_kept/e5m2": 0.0}
    judge.add(0, "a", figures() | figures("e5m2"), exact)
    assert [each.evidence for each in judge.assessment().advice] == [
        "the middle half of 2,131 such layers kept 0.99 to 1 of their progress in real runs",
        "no layer had this verdict",
    ]


# --- NaN


def test_a_run_that_becomes_nan_is_judged_by_the_steps_before(tmp_path: Path) -> None:
    def break_all(net: torch.nn.Module, step: int) -> None:
        push_gradients(net, step)
        for layer in net.parameters():
            assert layer.grad is not None
            layer.grad.fill_(NAN if step >= 20 else 1.0)

    def judge_until(steps: int) -> Assessment:
        net = make_layers(matrix=torch.full((64,), 0.5))
        optimizer = torch.optim.AdamW(net.parameters(), 1e-4)
        folder = tmp_path / str(steps)
        settings: dict[str, Any] = {"formats": ["bf16"], "recipes": ["bf16", "bf16-kahan"]}
        return judge_run(record(folder, net, optimizer, steps, prepare=break_all, **settings))

    before, after = judge_until(20), judge_until(40)
    assert before.runs["bf16"].verdict is Verdict.FROZEN
    for name, run in before.runs.items():
        found = after.runs[name]
        assert (found.verdict, found.kept, found.has_twin) == (run.verdict, run.kept, True)
    (advice, *_) = after.advice
    assert advice.reason.startswith("the layer became NaN or inf; until step 19, 100 % of the")
    assert advice.nonfinite == 1
    assert after.summary.startswith("This run became NaN or inf, and its verdicts are on the steps")


def test_nan_in_the_run_itself_is_held_against_no_recipe(tmp_path: Path) -> None:
    net = make_layers(broken=torch.full((8, 8), 0.5), whole=torch.full((8,), 0.5))

    def break_one(net: torch.nn.Module, step: int) -> None:
        push_gradients(net, step)
        if step >= 20:
            net["broken"].grad[0, 0] = NAN  # type: ignore[index,operator]

    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    recipes = ["bf16", "bf16-kahan"]
    found = judge_run(
        record(tmp_path, net, optimizer, prepare=break_one, formats=["bf16"], recipes=recipes)
    )
    for recipe in recipes:
        broken, whole = (found.by_layer[name][recipe] for name in ("broken", "whole"))
        assert broken.verdict is not Verdict.BREAKS
        assert broken.reason.startswith(
            "2 % of the elements were NaN or inf in a step, which no figure counts"
        )
        assert (broken.nonfinite, whole.nonfinite) == (1 / 64, 0)
        assert "NaN" not in whole.reason
    assert "which no figure counts: broken (2 %)." in found.summary
    assert found.nonfinite == {"broken": 1 / 64}


def test_a_layer_with_elements_that_are_not_finite_is_marked_in_words() -> None:
    judge = Judge({"bf16": FORMATS["bf16"]})
    kept = STEPS.needs_remedy - 0.1
    for share in (0.0, 0.5, 0.25, NAN):
        step = runs.figures(kept_update_ratio=kept) | {"nonfinite_frac": share}
        judge.add(0, "broken", step, {})
    judge.add(0, "whole", runs.figures() | {"nonfinite_frac": 0.0}, {})
    restored = Judge({"bf16": FORMATS["bf16"]})
    restored.load_state_dict(judge.state_dict())
    for assessment in (judge.assessment(), restored.assessment()):
        broken, whole = (assessment.by_layer[name]["bf16"] for name in ("broken", "whole"))
        assert (broken.nonfinite, whole.nonfinite) == (0.5, 0.0)
        assert broken.verdict is Verdict.NEEDS_REMEDY  # the verdict is on the other half
        assert broken.reason.startswith(
            "50 % of the elements were NaN or inf in a step, which no figure counts"
        )
        assert "NaN" not in whole.reason


def test_a_layer_whose_elements_are_all_not_finite_is_marked_where_it_is_not_judged() -> None:
    nothing = runs.figures(kept_update_ratio=NAN, stall_frac=NAN, never_moved_frac=NAN)
    assessment = judge_steps(a=nothing | {"nonfinite_frac": 1.0}).assessment()
    (advice,) = assessment.advice
    assert advice.verdict is Verdict.NOT_JUDGED
    assert (
        advice.reason == "100 % of the elements were NaN or inf in a step, which no figure counts"
    )
    assert "a (100 %)" in assessment.summary


# --- checkpoints


def test_a_judge_that_is_restored_in_the_middle_goes_on(tmp_path: Path) -> None:
    """A layer whose learning rate falls is stuck since the same step; the others are judged."""
    net = make_layers(falls=torch.full((64,), 2.0), gain=torch.ones(16), moves=torch.ones(16))
    rates = {"falls": 2**-4, "gain": 1e-4, "moves": 2**-6}
    groups = [{"params": [net[name]], "lr": rate} for name, rate in rates.items()]
    optimizer = torch.optim.SGD(groups)

    def decay(net: torch.nn.Module, step: int) -> None:
        for layer in net.parameters():
            layer.grad = torch.ones_like(layer)
        optimizer.param_groups[0]["lr"] = rates["falls"] if step < 20 else 1e-3

    run = record(
        tmp_path, net, optimizer, 300, prepare=decay, formats=["bf16", "nvfp4"], recipes=["bf16"]
    )
    rows = [row for row in run.rows if row.layer is not None]
    expected = judge_run(run)
    assert expected.by_layer["falls"]["bf16"].reason.startswith("stuck since step 19: ")
    assert expected.by_layer["gain"]["bf16"].verdict is Verdict.FROZEN
    for stop in (1, 6, 8, len(rows) // 2, len(rows)):
        judge = Judge(run.formats, run.layers, run.recipes)
        for number, row in enumerate(rows):
            if number == stop:
                state = json.loads(json.dumps(judge.state_dict()))
                judge = Judge(run.formats, run.layers, run.recipes)
                judge.load_state_dict(state)
            judge.add(row.step, str(row.layer), row.figures, row.errors)
        assert_same(judge.assessment(), expected)
    state = json.loads(json.dumps(judge.state_dict()))
    judge = Judge(run.formats, run.layers, run.recipes)
    judge.load_state_dict(state)
    assert_same(judge.assessment(), expected)


def test_a_judge_reads_a_checkpoint_of_version_0_1_0() -> None:
    sums = {"kept_update_ratio": 2 * WATCHED, "stall_frac": 0.2}
    counts = {"kept_update_ratio": 2, "stall_frac": 2}
    errors = {f"error of {metric}": 0.0 for metric in sums}
    old = {
        "sums": sums | {"underflow_frac": 0.0, "saturated_frac": 0.0} | errors,
        "counts": counts | {"underflow_frac": 2, "saturated_frac": 2} | dict.fromkeys(errors, 2),
        "never_moved": 0.25,
        "never_moved_error": 0.0,
    }
    judge = Judge(FORMATS, recipes={"bf16": make_recipe()})
    judge.load_state_dict({"a": {"bf16": old}, "b": {}})
    (advice,) = judge.assessment().advice
    assert (advice.verdict, advice.kept) == (Verdict.WATCH, pytest.approx(WATCHED))
    assert advice.figures["never_moved_frac"] == 0.25
    judge.add(5, "a", figures(progress_kept=1.0) | runs.figures(), {"progress_kept/bf16": 0.0})
    (advice,) = judge.assessment().advice
    assert advice.has_twin
    judge.load_state_dict({})
    assert judge.assessment().advice == []


# --- large models


def count_calls(layers: int) -> dict[str, int]:
    """Judge a model with some layers in 8 recipes, and count calls by function."""
    recipes = [f"recipe{number}" for number in range(8)]
    judge = Judge(
        {},
        {f"layers.{n}": LayerInfo((64, 64), "float32", 64, ()) for n in range(layers)},
        {name: make_recipe(name, weights="bf16") for name in recipes},
    )
    own: dict[str, float] = {}
    for name in recipes:
        own |= figures(name)
    errors = {f"progress_kept/{name}": 0.0 for name in recipes}
    for layer in range(layers):
        judge.add(0, f"layers.{layer}", own, errors)
    with (
        mock.patch.object(judging, "judge_twin", wraps=judging.judge_twin) as twins,
        mock.patch.object(judging, "judge_recipe", wraps=judging.judge_recipe) as whole,
        mock.patch.object(judging, "find_family", wraps=judging.find_family) as families,
    ):
        found = judge.assessment()
    assert len(found.advice) == 8 * layers
    assert len(found.summary) < 4000
    return {
        "twins": twins.call_count,
        "recipes": whole.call_count,
        "families": families.call_count,
    }


@pytest.mark.parametrize("layers", [20, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_large_model_is_judged_once_per_layer_and_recipe(layers: int) -> None:
    calls = count_calls(layers)
    assert calls == {"twins": 8 * layers, "recipes": 8, "families": count_calls(2)["families"]}
