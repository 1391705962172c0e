"""`TwinMessage` carries the sums of twins over ranks; here messages are reduced by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from altgrad.distributed.twin_message import MOST_STATES, TwinMessage, TwinPlan
from altgrad.measurement.ratio_bins import count_ratios
from altgrad.measurement.twin_figures import TwinValues, split_twins
from altgrad.measurement.twin_parts import TwinPart, TwinShare
from altgrad.measurement.twin_sums import TwinStack, find_state_ratios, measure_twins
from tests.measurement.twins import RECIPES, STATES, make_stacks

LAYERS = ("a", "b")
PLAN = TwinPlan(RECIPES, 256)
ROWS = {"a": 0, "other": 1, "b": 2}


def pick(stack: TwinStack, columns: Tensor) -> TwinStack:
    *weights, states = stack
    picked = (each[:, columns] for each in weights)
    return TwinStack(*picked, {name: each[:, columns] for name, each in states.items()})


def measure(high: TwinStack, twins: Sequence[TwinStack], states=STATES, **changes) -> TwinPart:
    layers, width = high.now.shape
    mask = torch.ones((layers, width), dtype=torch.bool)
    part = TwinPart(
        LAYERS[:layers],
        RECIPES,
        states,
        measure_twins(mask, high, twins, states).numpy(),
        [width] * layers,
        [1000] * layers,
        [0] * layers,
        count_ratios(find_state_ratios(mask, high, twins, states), PLAN.most_elements).numpy(),
    )
    return part._replace(**changes)


def reduce(shares: Sequence[TwinShare], plan: TwinPlan = PLAN) -> TwinShare:
    """Return what all ranks read after a step in which they had these shares."""
    arrays = []
    for share in shares:
        sums = np.zeros((5, plan.sum_count))
        maxima = np.full((5, plan.max_count), -math.inf)
        names = np.full(plan.name_count, -math.inf)
        TwinMessage(plan, sums, maxima, names).pack(share, ROWS)
        arrays.append((sums, maxima, names))
    sums, maxima, names = zip(*arrays, strict=True)
    reduced = TwinMessage(plan, np.sum(sums, 0), np.max(maxima, 0), np.max(names, 0))
    return reduced.unpack(ROWS, dict.fromkeys(ROWS, 1000))


def list_figures(parts: Sequence[TwinPart]) -> dict[str, dict[str, float]]:
    layers, model = split_twins(TwinValues.read_parts(parts), LAYERS)
    return {name: dict(each) for name, each in layers.items()} | {"model": dict(model)}


@pytest.mark.parametrize("ends", [(100, 200, 256), (0, 256, 256), (256,)])
def test_ranks_with_parts_of_a_sample_have_the_figures_of_the_whole_sample(ends) -> None:
    high, twins = make_stacks(2, 256, 7)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    shares = []
    for start, end in zip((0, *ends), ends, strict=False):
        own = order[start:end]
        part = measure(pick(high, own), [pick(each, own) for each in twins])
        shares.append(TwinShare([part] if len(own) else []))
    found, truth = list_figures(reduce(shares).parts), list_figures([measure(high, twins)])
    assert found.keys() == truth.keys()
    for layer, figures in truth.items():
        assert found[layer].keys() == figures.keys()
        for key, value in figures.items():
            near = 0.04 if "_ratio/" in key else 1e-12
            assert found[layer][key] == pytest.approx(value, rel=near, nan_ok=True), key


def test_a_layer_that_a_rank_misses_has_no_figures_under_that_recipe() -> None:
    high, twins = make_stacks(2, 64, 3)
    shares = [TwinShare([measure(high, twins)]), TwinShare((), {RECIPES[0]: ["a", "gone"]})]
    merged = reduce(shares)
    assert merged.missing == {recipe: ["a"] * (recipe == RECIPES[0]) for recipe in RECIPES}
    layers, _ = split_twins(TwinValues.read_parts(merged.parts), LAYERS)
    assert layers["a"].recipes == RECIPES[1:]
    assert layers["b"].recipes == RECIPES


def test_the_worst_self_check_of_each_layer_counts() -> None:
    each = [TwinShare((), {}, {"a": 0, "gone": 3}), TwinShare((), {}, {"a": 2, "b": 1})]
    assert reduce(each).checks == {"a": 2, "b": 1}
    assert reduce([TwinShare()]).checks == {}


def test_ranks_with_states_of_different_names_have_no_figures() -> None:
    high, twins = make_stacks(2, 64, 3)
    renamed = [each._replace(states={"v": each.states[STATES[0]]}) for each in (high, *twins)]
    shares = [
        TwinShare([measure(high, twins, STATES[:1])]),
        TwinShare([measure(renamed[0], renamed[1:], ("v",))]),
    ]
    assert reduce(shares).parts == []
    assert reduce([shares[1], TwinShare()]).parts[0].states == ["v"]


def test_of_many_states_and_long_names_the_first_short_ones_are_compared() -> None:
    high, twins = make_stacks(2, 64, 3)
    names = ("é", "a name that has more letters than it should", "one", "two", "three", "four")
    first = high.states[STATES[0]]
    many = [each._replace(states=dict.fromkeys(names, first)) for each in (high, *twins)]
    merged = reduce([TwinShare([measure(many[0], many[1:], names)])])
    assert merged.parts[0].states == ["one", "two", "three"]
    assert len(merged.parts[0].states) == MOST_STATES


def test_without_recipes_a_message_has_no_numbers() -> None:
    plan = TwinPlan((), 256)
    assert plan.sum_count == plan.max_count == plan.name_count == 0
    assert reduce([TwinShare(), TwinShare()], plan) == TwinShare()
