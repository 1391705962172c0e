"""Plans: budgets, what may be chosen, and progress against all possible choices."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from altgrad import Recipe
from altgrad.report import Advice, RecipeInfo, Run, Verdict, judge_run
from altgrad.report.memory import measure_fp32, measure_layer, measure_memory
from altgrad.report.planning import (
    FP32,
    Option,
    PlanError,
    can_be_stored,
    choose,
    explain_left_out,
    make_plan,
)
from tests.report.planned_runs import record

NAN = math.nan


def draw_layers(source: random.Random) -> tuple[list[list[Option]], list[float]]:
    """Draw layers of very different sizes, whose smaller options mostly keep less."""
    layers = []
    for _ in range(source.randint(1, 6)):
        size = 10 ** source.uniform(1, 4)
        options = [Option(FP32, 1.0, size)]
        for name in range(source.randint(0, 4)):
            share = source.choice([0.5, 0.6, 0.75, 0.83, 1.05])
            options.append(Option(str(name), source.uniform(0, 1.1), size * share))
        layers.append(options)
    return layers, [10 ** source.uniform(-2, 2) for _ in layers]


def find_progress(options: tuple[Option, ...] | list[Option], weights: list[float]) -> float:
    """Return how much of the progress is kept; what moves too far is off by as much."""
    return sum(w * (1 - abs(1 - o.kept)) for w, o in zip(weights, options, strict=True))


def test_a_choice_keeps_nearly_what_the_best_of_all_choices_keeps() -> None:
    source, ratios = random.Random(0), []
    for _ in range(600):
        layers, weights = draw_layers(source)
        most = source.uniform(0.5, 1) * sum(options[0].bytes for options in layers)
        possible = [
            each for each in itertools.product(*layers) if sum(o.bytes for o in each) <= most
        ]
        found = choose(layers, weights, most)
        size = sum(each.bytes for each in found)
        if not possible:
            assert size == pytest.approx(sum(min(o.bytes for o in each) for each in layers))
            continue
        assert size <= most
        best = max(find_progress(each, weights) for each in possible)
        ratios.append(find_progress(found, weights) / best if best > 0 else 1.0)
    assert len(ratios) > 300
    assert min(ratios) >= 0.95


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return record(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("budget", [0.55, 0.7, 0.8, 0.95, 1.0])
def test_a_plan_stays_within_its_budget(run: Run, budget: float) -> None:
    plan = make_plan(run, judge_run(run), budget)
    fp32 = sum(measure_fp32(each).total for each in run.layers.values())
    size = sum(
        measure_fp32(run.layers[each.layer]).total
        if each.option.recipe == FP32
        else measure_layer(run.layers[each.layer], run.recipes[each.option.recipe]).total
        for each in plan.layers
    )
    assert plan.fp32_bytes == pytest.approx(fp32)
    assert plan.bytes == pytest.approx(size)
    assert size <= budget * fp32
    assert plan.kept > 0.95
    assert plan.by_movement
    assert [each.layer for each in plan.layers] == [*run.layers]
    if budget == 1:
        assert {*plan.chosen.values()} == {FP32}


def test_layers_that_freeze_in_a_recipe_are_not_stored_so(run: Run) -> None:
    assessment = judge_run(run)
    frozen = {
        each.layer
        for each in assessment.advice
        if each.verdict is Verdict.FROZEN and each.recipe in ("bf16", "bf16-true")
    }
    assert frozen == {"blocks.0.1.weight", "blocks.1.1.weight"}
    plan = make_plan(run, assessment, 0.53)
    assert {plan.chosen[name] for name in frozen}.isdisjoint({"bf16", "bf16-true"})
    assert "bf16-true" in plan.chosen.values()


def test_the_progress_of_a_plan_of_one_recipe_is_that_of_the_model(tmp_path: Path) -> None:
    run = record(tmp_path, ["bf16-sr"], twin_elements=1000)
    (row,) = [row for row in run.rows if row.layer is None][-1:]
    memory = measure_memory(run.layers, run.recipes)["bf16-sr"]
    plan = make_plan(run, judge_run(run), memory.bytes.total / memory.fp32)
    assert {*plan.chosen.values()} == {"bf16-sr"}
    assert plan.kept == pytest.approx(row.figures["progress_kept/bf16-sr"], rel=1e-6)


def test_few_recipes_are_preferred_if_they_keep_as_much(run: Run) -> None:
    assert len(make_plan(run, judge_run(run), 0.6).recipes) <= 2


def test_a_budget_that_is_too_small_names_the_smallest_possible(run: Run) -> None:
    with pytest.raises(PlanError, match=r"budget=0\.3: expected at least 0\.\d+") as caught:
        make_plan(run, judge_run(run), 0.3)
    least = float(str(caught.value).split("at least ")[1].split(",")[0])
    assert make_plan(run, judge_run(run), least).bytes > 0
    with pytest.raises(PlanError, match="expected at least"):
        make_plan(run, judge_run(run), least - 0.002)


@pytest.mark.parametrize("budget", [0, -1, 1.01, NAN])
def test_a_budget_is_a_share(run: Run, budget: float) -> None:
    with pytest.raises(PlanError, match="expected a share above 0, at most 1"):
        make_plan(run, judge_run(run), budget)


def test_a_run_without_recipes_or_states_has_no_plan(run: Run) -> None:
    with pytest.raises(PlanError, match="expected a run with recipes"):
        make_plan(replace(run, recipes={}), judge_run(run), 0.6)
    older = {name: replace(each, states=None) for name, each in run.layers.items()}
    with pytest.raises(PlanError, match="sizes of optimizer states are unknown"):
        make_plan(replace(run, layers=older), judge_run(run), 0.6)


def test_layers_without_weights_have_no_plan(run: Run) -> None:
    empty = {name: replace(each, shape=(0,), states={}) for name, each in run.layers.items()}
    with pytest.raises(PlanError, match="expected a layer with weights"):
        make_plan(replace(run, layers=empty), judge_run(run), 1.0)


def test_layers_without_a_step_are_no_part_of_a_plan(run: Run) -> None:
    unused = {"head.bias": replace(run.layers["head.bias"], states=None)}
    plan = make_plan(replace(run, layers=run.layers | unused), judge_run(run), 0.8)
    assert [*plan.chosen] == [name for name in run.layers if name != "head.bias"]


def test_layers_count_by_their_size_if_no_movement_is_known(run: Run) -> None:
    rows = [
        replace(row, figures={k: v for k, v in row.figures.items() if "moved_rms" not in k})
        for row in run.rows
    ]
    unknown = replace(run, rows=rows)
    plan = make_plan(unknown, judge_run(unknown), 0.6)
    assert not plan.by_movement
    assert [each.weight for each in plan.layers] == [
        math.prod(layer.shape) for layer in run.layers.values()
    ]


def test_recipes_that_concern_the_whole_optimizer_are_left_out() -> None:
    def explain(**fields: object) -> str:
        known = {"weights": None, "states": {}, "dtype": None, "optimizer": None, "fused": False}
        others = {"rounding": "nearest_even", "compensation": None, "bytes_per_parameter": NAN}
        return explain_left_out(RecipeInfo("mine", **{**known, **others, **fields}))  # type: ignore[arg-type]

    assert explain(weights="bf16", states={"*": "mxfp8"}) == ""
    assert explain(dtype="bfloat16") == ""
    assert "optimizer" in explain(optimizer="make_torchao_8bit")
    assert "optimizer" in explain(dtype="bfloat16", fused=True)
    assert "float16" in explain(dtype="float16")
    assert "added up" in explain(weights="bf16", accumulate="bf16")
    assert "mine" in explain(weights="mine")
    assert "beside" in explain(dtype="bfloat16", weights="e4m3fn")


@pytest.mark.parametrize(
    ("verdict", "kept", "frozen_error", "expected"),
    [
        (Verdict.STORES_FINE, 0.99, 0.0, True),
        (Verdict.NEEDS_REMEDY, 0.5, 0.0, True),
        (Verdict.UNCERTAIN, 0.9, 0.01, True),
        (Verdict.UNCERTAIN, 0.9, 0.6, False),
        (Verdict.UNCERTAIN, 0.9, NAN, False),
        (Verdict.STORES_FINE, NAN, 0.0, False),
        *((each, 0.9, 0.0, False) for each in (Verdict.FROZEN, Verdict.STUCK, Verdict.BREAKS)),
        *((each, 0.9, 0.0, False) for each in (Verdict.RANGE, Verdict.OVERSHOOTS)),
        (Verdict.NOT_JUDGED, 0.9, 0.0, False),
    ],
)
def test_a_layer_is_stored_only_where_it_goes_on_to_move(
    verdict: Verdict, kept: float, frozen_error: float, *, expected: bool
) -> None:
    figures = {"progress_kept": kept, "frozen_frac": 0.5}
    errors = {"progress_kept": 0.0, "frozen_frac": frozen_error}
    assert can_be_stored(Advice("w", "bf16", verdict, figures, errors, "")) is expected


def test_a_verdict_on_single_steps_is_no_reason_to_store_a_layer() -> None:
    figures = {"kept_update_ratio": 1.0}
    assert not can_be_stored(Advice("w", "bf16", Verdict.STORES_FINE, figures, {}, ""))


def test_a_custom_recipe_of_float32_alone_saves_nothing(tmp_path: Path) -> None:
    run = record(tmp_path, [Recipe("mine"), "fp32"], steps=20)
    with pytest.raises(PlanError, match="expected at least 1,"):
        make_plan(run, judge_run(run), 0.9)
