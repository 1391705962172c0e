"""Twins have the figures of a run that stores its weights and states by `Recipe.attach`.

Both get the same gradients. The figures are those of all elements where a sample has all of them,
and else of those that it has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from altgrad.monitor.elements import sample_elements
from altgrad.recipes.recipe import Recipe
from altgrad.twins.sample import draw_sample
from tests.combining import combine
from tests.twins.twinning import Watched, one_thread

on_one_thread = one_thread()
pytestmark = pytest.mark.default_twins

Setup = Callable[[tuple[int, ...]], Tensor]
ROWS = [(16, 32), (16, 10), (8, 40), (8, 70), (6, 4, 3, 3), (2, 3, 3, 3), (250, 1), (63,), (200,)]
"""Rows of full blocks, of short ones, of both, of convolutions, and of single elements."""


def draw_weights(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1


def draw_gradient(shape: tuple[int, ...], index: int) -> Tensor:
    random = torch.Generator().manual_seed(index + 1)
    return 0.3 * torch.randn(shape, generator=random) + 0.3


class Trained:
    """A layer that is trained by AdamW on given gradients, with its weights after each step."""

    def __init__(self, weights: Tensor, gradient_dtype: torch.dtype = torch.float32) -> None:
        self.net = nn.ParameterDict({"w": nn.Parameter(weights.clone())})
        self.optimizer = torch.optim.AdamW(self.net.parameters(), 1e-2)
        self.dtype = gradient_dtype
        self.weights: list[Tensor] = []

    def train(self, steps: int) -> None:
        weight = self.net["w"]
        self.weights.append(weight.detach().clone())
        for index in range(steps):
            gradient = draw_gradient(tuple(weight.shape), index)
            weight.grad = gradient.to(self.dtype).to(weight.dtype)
            self.optimizer.step()
            self.weights.append(weight.detach().clone())


def assert_equal_to_a_stored_run(
    recipe: Recipe,
    shape: tuple[int, ...],
    *,
    start: Setup = draw_weights,
    steps: int = 20,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> None:
    run, stored = (Trained(start(shape).to(dtype), dtype) for _ in range(2))
    settings = {"recipes": [recipe], "formats": ["e5m2"], **settings}
    watched = Watched(run.net, run.optimizer, **settings)
    run.train(steps)
    assert watched.notices == []
    figures = watched.records[-1].layers["w"]
    if dtype.itemsize == 2:  # a recipe computes in float32, and so does what it is compared with
        run, stored = (Trained(start(shape).to(dtype).float(), dtype) for _ in range(2))
        run.train(steps)
    storage = recipe.attach(
        stored.optimizer, module=stored.net, scaling=settings.get("scaling", "tensor")
    )
    stored.train(steps)
    storage.detach()
    sample = draw_sample(
        lambda *each: sample_elements(*each[:3], block=each[3]),
        *("w", shape, 256, recipe.needs_blocks or 1),
    )
    own, low = (
        torch.stack([weights.flatten()[sample] for weights in each.weights]).double()
        for each in (run, stored)
    )
    moved, moved32 = low[-1] - low[0], own[-1] - own[0]
    frozen = (low[1:] == low[:-1]).all(0) & (own[1:] != own[:-1]).any(0)
    assert figures.moved_elements == len(sample)
    name = recipe.name
    kept = (moved @ moved32 / (moved32 @ moved32)).item()
    assert figures[f"progress_kept/{name}"] == pytest.approx(kept, rel=1e-9)
    assert figures[f"frozen_frac/{name}"] == frozen.double().mean().item()
    drift = ((low[-1] - own[-1]).norm() / moved32.norm()).item()
    assert figures[f"drift/{name}"] == pytest.approx(drift, rel=1e-9)
    moved_rms = moved32.square().mean().sqrt().item()
    assert figures[f"moved_rms/{name}"] == pytest.approx(moved_rms, rel=1e-9)


@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_blocks_are_those_of_the_layer(shape: tuple[int, ...]) -> None:
    assert_equal_to_a_stored_run(Recipe("mx", weights="mxfp4"), shape, every_n_steps=20)


@pytest.mark.parametrize("shape", [(16, 10), (8, 40), (6, 4, 3, 3)], ids=str)
def test_blocks_of_states_are_those_of_the_layer(shape: tuple[int, ...]) -> None:
    recipe = Recipe("mx", states={"exp_avg": "mxfp8_e5m2"})
    assert_equal_to_a_stored_run(recipe, shape, every_n_steps=20)


@pytest.mark.parametrize(
    ("every", "scaling", "compensation"),
    combine([1, 10, 20], ["tensor", "channel", ("block", 3)], [None, "kahan"]),
)
def test_scales_rise_with_weights_that_begin_at_0(
    every: int, scaling: Any, compensation: Any
) -> None:
    recipe = Recipe("low", weights="e4m3fn", compensation=compensation)
    settings = {"scaling": scaling, "every_n_steps": every}
    assert_equal_to_a_stored_run(recipe, (16, 16), start=torch.zeros, **settings)


@pytest.mark.parametrize("format", ["mxfp4", "e4m3fn"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_scales_rise_in_a_run_of_another_dtype(format: str, dtype: torch.dtype) -> None:
    recipe = Recipe("low", weights=format)
    assert_equal_to_a_stored_run(recipe, (16, 10), start=torch.zeros, dtype=dtype, every_n_steps=10)


@pytest.mark.parametrize("scaling", ["tensor", "channel"])
@pytest.mark.parametrize("state", ["exp_avg", "exp_avg_sq", "*"])
def test_scales_rise_with_states(state: str, scaling: str) -> None:
    recipe = Recipe("low", states={state: "e5m2"})
    assert_equal_to_a_stored_run(recipe, (16, 16), scaling=scaling, every_n_steps=20)


def test_a_state_that_is_nan_leaves_the_scale_of_the_others() -> None:
    run = Trained(draw_weights((16, 16)))
    recipe = Recipe("low", states={"exp_avg_sq": "e5m2"})
    watched = Watched(run.net, run.optimizer, recipes=[recipe], every_n_steps=20)
    run.train(10)
    run.optimizer.state[run.net["w"]]["exp_avg_sq"][3, 5] = torch.nan
    run.train(20)
    figures = watched.records[-1].layers["w"]
    assert figures["twin_nonfinite_frac/low"] == 1 / 256


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("states", [{"exp_avg_sq": "e5m2"}, {"*": "mxfp8_e5m2"}], ids=str)
def test_states_have_scales_in_a_run_of_another_dtype(
    dtype: torch.dtype, states: dict[str, str]
) -> None:
    recipe = Recipe("low", states=states)
    assert_equal_to_a_stored_run(recipe, (16, 16), dtype=dtype, every_n_steps=20)
