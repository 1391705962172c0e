"""`TwinFigures`: reading figures of twins, joining lanes, and models of models."""

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
from scipy import stats

from altgrad.measurement.catalogue import TWIN_METRICS, twin_keys
from altgrad.measurement.twin_figures import (
    NO_TWINS,
    TwinFigures,
    TwinValues,
    merge_twins,
    split_twins,
)
from tests.measurement.twins import RECIPES, STATES, make_stacks, measure_layers, measure_sample

LAYERS = ("a", "b", "c")


def read_layers(values: TwinValues, *layers: str) -> tuple[dict[str, TwinFigures], TwinFigures]:
    figures, model = split_twins(values, layers or LAYERS)
    return dict(figures), model


def assert_equal(figures: TwinFigures, expected: TwinFigures, rel: float = 0.0) -> None:
    assert [*figures] == [*expected]
    assert dict(figures) == pytest.approx(dict(expected), rel=rel, abs=0, nan_ok=True)
    for key in expected:
        error = expected.standard_error(key)
        assert figures.standard_error(key) == pytest.approx(error, rel=rel, abs=0, nan_ok=True), key
    assert figures.moved_elements == expected.moved_elements


def test_figures_are_a_mapping_by_metric_and_recipe() -> None:
    layers, model = read_layers(measure_layers(LAYERS))
    assert [*layers] == [*LAYERS]
    for figures in (*layers.values(), model):
        assert figures.recipes == RECIPES
        assert [*figures] == [*figures.keys_in_order] == [*twin_keys(RECIPES, STATES)]
        assert len(figures) == len(dict(figures)) == 2 * (len(TWIN_METRICS) + 2 * 3)
        assert [*figures.in_order()] == pytest.approx([*figures.values()], rel=0, nan_ok=True)
        assert "progress_kept/low" in figures
        assert "exp_avg_sq_ratio/lower" in figures
        assert "progress_kept" not in figures
        assert "progress_kept/bf16" not in figures
        assert 1 not in figures
    assert len({figures["progress_kept/lower"] for figures in (*layers.values(), model)}) == 4


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("progress_kept/bf16", r"with a recipe of \('low', 'lower'\)"),
        ("progress_kept", r"with a recipe of \('low', 'lower'\)"),
        ("momentum_ratio/low", r"a state of \('exp_avg', 'exp_avg_sq'\)"),
    ],
)
def test_unknown_keys_raise_key_error(key: str, message: str) -> None:
    _, model = read_layers(measure_layers(LAYERS))
    for read in (model.__getitem__, model.standard_error, model.interval):
        with pytest.raises(KeyError, match=message):
            read(key)


def test_without_twins_there_is_no_figure() -> None:
    for figures in (NO_TWINS, merge_twins([]), merge_twins([NO_TWINS, NO_TWINS])):
        assert figures.recipes == figures.keys_in_order == ()
        assert dict(figures) == {}
        assert [*figures.in_order()] == []
        assert math.isnan(figures.moved_elements)
        with pytest.raises(KeyError, match="no twins were measured"):
            figures["progress_kept/low"]
    assert split_twins(None, LAYERS) == ({}, NO_TWINS)
    layers, model = read_layers(measure_layers(LAYERS), "d")
    assert (layers, model.recipes) == ({}, ())


def test_layers_that_are_not_asked_for_are_not_part_of_the_model() -> None:
    values = measure_layers(LAYERS)
    layers, model = read_layers(values, "c", "unknown", "a")
    assert [*layers] == ["c", "a"]
    whole, _ = read_layers(values)
    for name in ("a", "c"):
        assert_equal(layers[name], whole[name])
    assert_equal(model, merge_twins([whole["c"], whole["a"]]))
    alone, only = read_layers(values, "b")
    # A model of one layer is the layer.
    assert_equal(only, alone["b"], rel=1e-14)


def test_lanes_of_the_same_layers_are_joined() -> None:
    """One has single elements, the other blocks; both have figures of their own."""
    single = measure_layers(LAYERS)
    blocks = measure_layers(LAYERS, seed=1, recipes=("mx", "mx-sr"), block=32)
    layers, model = read_layers(TwinValues.join([single, blocks]))
    own, own_model = read_layers(single)
    others, other_model = read_layers(blocks)
    assert model.recipes == (*RECIPES, "mx", "mx-sr")
    for found, first, second in (
        *((layers[name], own[name], others[name]) for name in LAYERS),
        (model, own_model, other_model),
    ):
        assert [*found] == [*first, *second]
        assert {**first, **second} == dict(found)
        for part in (first, second):
            for key in part:
                error = part.standard_error(key)
                assert found.standard_error(key) == pytest.approx(error, rel=0, nan_ok=True)
        assert found.moved_elements == max(first.moved_elements, second.moved_elements)


def test_lanes_of_different_layers_recipes_and_states_are_joined() -> None:
    one = measure_layers(["a"], recipes=("low", "gone"), states=STATES[:1])
    other = measure_layers(["b"], seed=1, recipes=("low", "new"), states=STATES[1:])
    empty = TwinValues.read(([], [], []), np.zeros((0, 0, 41)), sizes=[], populations=[])
    layers, model = read_layers(TwinValues.join([one, empty, other]))
    assert layers["a"].recipes == ("low", "gone")
    assert layers["b"].recipes == ("low", "new")
    assert model.recipes == ("low", "gone", "new")
    assert [*layers["a"]] == [*twin_keys(("low", "gone"), STATES)]
    alone, _ = read_layers(one)
    for key, value in layers["a"].items():
        expected = math.nan if key.startswith("exp_avg_sq") else alone["a"][key]
        assert value == pytest.approx(expected, rel=0, nan_ok=True), key
    for key in ("progress_kept/new", "exp_avg_sq_ratio/new", "exp_avg_sq_ratio/low"):
        assert model[key] == pytest.approx(layers["b"][key], rel=1e-14)
    assert model["exp_avg_zero_frac/gone"] == pytest.approx(layers["a"]["exp_avg_zero_frac/gone"])


def test_layers_whose_twins_have_ended_have_no_recipes() -> None:
    ended = TwinValues.read(
        (["a", "b"], [], STATES), np.zeros((2, 0, 53)), sizes=[4, 4], populations=[4, 4]
    )
    layers, model = read_layers(TwinValues.join([ended]))
    assert model.recipes == layers["a"].recipes == ()
    both, _ = read_layers(TwinValues.join([ended, measure_layers(["b"])]))
    assert both["a"].recipes == ()
    assert both["b"].recipes == RECIPES


def test_a_model_of_models_equals_the_model_of_all_layers() -> None:
    names = ("a", "b", "c", "d")
    values = [
        measure_layers(names[:2], recipes=("low", "gone"), states=STATES[:1]),
        measure_layers(names[2:], seed=1, block=32),
    ]
    layers, model = read_layers(TwinValues.join(values), *names)
    apart = [merge_twins([*read_layers(each, *names)[0].values()]) for each in values]
    assert_equal(merge_twins([*layers.values()]), model)
    assert_equal(merge_twins(apart), model, rel=1e-12)
    nested = merge_twins([merge_twins([layers["a"]]), merge_twins([layers["b"], layers["c"]])])
    assert_equal(merge_twins([nested, layers["d"]]), model, rel=1e-12)


def test_the_model_of_two_steps_counts_both() -> None:
    first, second = (read_layers(measure_layers(["w"], seed=k), "w")[0]["w"] for k in range(2))
    both = merge_twins([first, second])
    for key in ("frozen_frac/lower", "progress_kept/lower"):
        ends = sorted([first[key], second[key]])
        assert ends[0] < both[key] < ends[1]
        assert both.standard_error(key) < first.standard_error(key)
    assert both.moved_elements == first.moved_elements + second.moved_elements


def test_the_number_of_moved_elements_is_that_of_fp32() -> None:
    high, twins = make_stacks(2, 100, 0)
    twins[0].now[0] = math.nan  # none of its elements is left
    layers, model = read_layers(measure_sample(["a", "b"], high, twins, [1000, 1000]), "a", "b")
    counts = [int(row.sum()) for row in high.moved]
    assert [each.moved_elements for each in layers.values()] == counts
    assert model.moved_elements == sum(counts)
    assert layers["a"]["twin_nonfinite_frac/low"] == 1
    assert math.isnan(layers["a"]["frozen_frac/low"])
    # The model knows the other layer alone.
    assert model["frozen_frac/low"] == pytest.approx(layers["b"]["frozen_frac/low"])
    assert model["twin_nonfinite_frac/low"] == pytest.approx(0.5)


def test_an_empty_layer_leaves_the_model_as_it_is() -> None:
    high, twins = make_stacks(2, 64, 0)
    values = measure_sample(["a", "b"], high, twins, [640, 0], sizes=[64, 0])
    layers, model = read_layers(values, "a", "b")
    assert all(math.isnan(figure) for figure in layers["b"].values())
    assert all(math.isnan(layers["b"].standard_error(key)) for key in layers["b"])
    assert_equal(model, layers["a"], rel=1e-14)


def test_the_interval_of_a_share_is_wilsons() -> None:
    layers, _ = read_layers(measure_sample(["w"], *make_stacks(1, 256, 0), [10**9]), "w")
    figures = layers["w"]
    moved = int(figures.moved_elements)
    for key in ("frozen_frac/low", "frozen_frac/lower"):
        frozen = round(figures[key] * moved)
        wilson = stats.binomtest(frozen, moved).proportion_ci(0.95, method="wilson")
        assert figures.interval(key) == pytest.approx((wilson.low, wilson.high), rel=0.02), key
    low, high = figures.interval("progress_kept/lower")
    error = figures.standard_error("progress_kept/lower")
    assert (high - low) / error == pytest.approx(2 * 1.96, rel=1e-4)
    assert all(map(math.isnan, figures.interval("drift/lower")))
    assert all(map(math.isnan, figures.interval("exp_avg_ratio/lower")))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_figures_survive_copy_and_pickle(copied: Any) -> None:
    layers, model = read_layers(measure_layers(LAYERS))
    for figures in (*layers.values(), model, NO_TWINS):
        other = copied(figures)
        assert other == figures
        assert other.recipes == figures.recipes
        assert other.moved_elements == pytest.approx(figures.moved_elements, nan_ok=True)
