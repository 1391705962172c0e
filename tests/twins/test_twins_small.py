"""Layers of fewer than 64 elements, whose shape decides how torch rounds them in 16 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from altgrad import Recipe
from altgrad.twins.layer_plan import MOST_BUCKETS
from altgrad.twins.self_check import Check
from tests.counting import Operations
from tests.twins.twinning import Watched, assert_equal, make_net, one_thread, train

on_one_thread = one_thread()
pytestmark = pytest.mark.default_twins


class Layers:
    """Layers of given sizes, each with a monitor's twins."""

    def __init__(
        self, sizes: list[int], dtype: torch.dtype, flags: dict[str, bool], **settings: Any
    ) -> None:
        torch.manual_seed(0)
        self.layers = nn.ParameterList(torch.randn(size).to(dtype) for size in sizes)
        self.optimizer = torch.optim.AdamW(self.layers.parameters(), 1e-3, **flags)
        settings = {"formats": ["e4m3fn"], **settings}
        self.watched = Watched(self.layers, self.optimizer, **settings)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            for layer in self.layers:
                layer.grad = torch.randn_like(layer)
            self.optimizer.step()


ROUNDED_BY_SHAPE = pytest.mark.parametrize(
    ("dtype", "flags"),
    [(torch.bfloat16, {}), (torch.float16, {"foreach": True}), (torch.float32, {"fused": True})],
    ids=str,
)


@ROUNDED_BY_SHAPE
@pytest.mark.parametrize("most", [5, 256])
def test_small_layers_equal_the_run_whatever_the_size_of_samples(
    dtype: torch.dtype, flags: dict[str, bool], most: int
) -> None:
    recipes = ["mxfp4", "mxfp8_e5m2", "e4m3fn"]
    layers = Layers([1, 10, 33, 63, 127], dtype, flags, recipes=recipes, twin_elements=most)
    layers.train(8)
    assert layers.watched.notices == []
    assert {*layers.watched.monitor.twins.checks.values()} == {Check.EQUAL}
    figures = layers.watched.records[-1].layers
    assert {*figures["3"].recipes} - {"now"} == {*recipes}
    assert figures["3"].moved_elements == 63


def test_states_of_a_layer_without_dimensions_have_figures_and_formats() -> None:
    recipe = Recipe("low-v", dtype="bfloat16", states={"exp_avg_sq": "e5m2"})
    figures = []
    for shape in ((), (1,)):
        layer = nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))
        optimizer = torch.optim.AdamW([layer], 1e-2)
        watched = Watched(nn.ParameterList([layer]), optimizer, recipes=[recipe])
        for step in range(7):
            layer.grad = torch.full_like(layer, 0.1 + 0.1 * step)
            optimizer.step()
        record = watched.records[-1].layers["0"]
        figures.append([record[f"{name}_ratio/low-v"] for name in ("exp_avg", "exp_avg_sq")])
    assert figures[0] == figures[1]
    assert abs(figures[0][0] - 1) < 0.02 < abs(figures[0][1] - 1)  # e5m2 is coarser than bf16


def count_step(layers: Layers) -> int:
    layers.train(3)
    counter = Operations()
    with counter.counting():
        layers.train(1)
    return counter.counts.total()


def count_small(dtype: torch.dtype, flags: dict[str, bool], recipes: list[str]) -> float:
    """Count the operations that twins add for each further small layer."""
    added = []
    for count in (10, 20):
        with_and_without = [
            count_step(Layers([10] * count, dtype, flags, recipes=each, every_n_steps=1000))
            for each in (recipes, [])
        ]
        added.append(with_and_without[0] - with_and_without[1])
    return (added[1] - added[0]) / 10


def test_a_small_layer_costs_as_much_as_a_group_of_its_own_in_16_bits() -> None:
    recipes = ["e4m3fn", "e4m3fn-sr", "bf16-true"]
    twins = len(recipes) + 2  # the reference, and the one in float32
    one_take_and = count_small(torch.bfloat16, {}, recipes)
    assert one_take_and <= 1 + 10 * twins


@pytest.mark.parametrize(
    ("dtype", "flags"), [(torch.float32, {}), (torch.bfloat16, {"fused": True})], ids=str
)
def test_a_small_layer_costs_one_operation_where_all_step_at_once(
    dtype: torch.dtype, flags: dict[str, bool]
) -> None:
    assert count_small(dtype, flags, ["e4m3fn", "e4m3fn-sr"]) <= 1


def test_the_smallest_layers_beyond_a_limit_are_left_out_in_16_bits() -> None:
    sizes = [10] * MOST_BUCKETS + [5] * 4 + [20, 64]
    layers = Layers(sizes, torch.bfloat16, {})
    layers.train(8)
    [notice] = layers.watched.notices
    assert "fewer than 64 elements" in notice
    assert str(MOST_BUCKETS) in notice
    figures = layers.watched.records[-1].layers
    have_twins = [name for name in figures if figures[name].recipes]
    names = [str(k) for k in range(len(sizes))]
    assert have_twins == names[: MOST_BUCKETS - 1] + names[-2:]


@pytest.mark.parametrize(
    ("dtype", "flags"), [(torch.float32, {}), (torch.bfloat16, {"fused": True})], ids=str
)
def test_there_is_no_such_limit_where_all_step_at_once(
    dtype: torch.dtype, flags: dict[str, bool]
) -> None:
    layers = Layers([10] * (MOST_BUCKETS + 4), dtype, flags)
    layers.train(2)
    assert layers.watched.notices == []
    assert len(layers.watched.monitor.twins.checks) == MOST_BUCKETS + 4


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_twin_in_16_bits_of_a_run_in_float32_is_near_a_run_in_16_bits(kind: Any) -> None:
    """It steps small layers in a flat tensor, where torch rounds them as it does large ones."""

    def step(optimizer: torch.optim.Optimizer, layer: nn.Parameter, index: int) -> None:
        random = torch.Generator().manual_seed(index)
        gradient = torch.randn(10, generator=random) * 0.1 + 0.05
        layer.grad = gradient.to(layer.dtype)
        optimizer.step()

    for seed in range(3):
        start = torch.randn(10, generator=torch.Generator().manual_seed(seed)) * 0.1
        start = start.bfloat16().float()
        run, real = nn.ParameterList([start.clone()]), nn.ParameterList([start.bfloat16()])
        optimizers = [kind(each.parameters(), lr=1e-3) for each in (run, real)]
        watched = Watched(run, optimizers[0], recipes=["bf16-true"], every_n_steps=100)
        for index in range(100):
            step(optimizers[0], run[0], index)
            step(optimizers[1], real[0], index)
        moved, moved32 = (each[0].detach().double() - start for each in (real, run))
        expected = (moved @ moved32 / (moved32 @ moved32)).item()
        found = watched.records[-1].layers["0"]["progress_kept/bf16-true"]
        assert found == pytest.approx(expected, abs=0.05)


def test_a_layer_without_elements_that_appears_later_changes_nothing() -> None:
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    watched = Watched(net, optimizer, recipes=["e4m3fn"], every_n_steps=1)
    train(net, optimizer, 2)
    net.late = nn.Parameter(torch.zeros(0))
    optimizer.add_param_group({"params": [net.late]})

    def set_gradient(_: int) -> None:
        net.late.grad = torch.zeros(0)

    train(net, optimizer, 2, first=2, before_step=set_gradient)
    watched.monitor.twins.scales_changed()
    train(net, optimizer, 2, first=4, before_step=set_gradient)
    assert_equal(watched)
