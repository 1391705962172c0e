"""`Twin`: weights of a sample stored as a recipe says, and changes of the run taken over."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from altgrad import quantize
from altgrad.recipes.recipe import Recipe
from altgrad.twins.element_scales import ElementScales
from altgrad.twins.layout import Bucket, Layout
from altgrad.twins.sample import Sampled
from altgrad.twins.twin import Arrangement, Twin, UpdateTwin

LAYOUT = Layout((Bucket(0, {"w": 64}),))


def arrange(weights: Tensor, layout: Layout = LAYOUT) -> Arrangement:
    parameter = nn.Parameter(weights.clone())
    optimizer = torch.optim.SGD([parameter], 1.0)
    layers = {"w": Sampled(parameter, parameter.shape, torch.arange(64))}
    return Arrangement(optimizer, layout, weights, layers)


def make(recipe: Recipe, weights: Tensor, kind: type[Twin] = UpdateTwin) -> Twin:
    scales = ElementScales("tensor", lambda _name, _indices: weights.abs().amax().view(1))
    scales.read(LAYOUT, {"w": Sampled(weights, weights.shape, torch.arange(64))}, weights.device)
    twin = kind(recipe, weights.dtype, scales, 0)
    twin.rearrange(arrange(weights))
    return twin


def draw(seed: int = 0) -> Tensor:
    return torch.randn(64, generator=torch.Generator().manual_seed(seed))


def test_a_twin_starts_at_the_stored_weights_of_the_run() -> None:
    weights = draw()
    twin = make(Recipe("bf16", weights="bf16"), weights)
    assert torch.equal(twin.tensors.weights, quantize(weights, "bf16"))
    assert torch.equal(twin.tensors.start, twin.tensors.weights)
    assert not twin.tensors.moved.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_recipe_without_a_dtype_computes_in_float32(dtype: torch.dtype) -> None:
    assert make(Recipe("fp32"), draw().to(dtype)).dtype == torch.float32
    assert make(Recipe("true", dtype=dtype), draw()).dtype == dtype


def test_a_run_in_float64_has_twins_in_float64() -> None:
    assert make(Recipe("bf16", weights="bf16"), draw().double()).dtype == torch.float64


def test_kahan_summation_keeps_small_updates() -> None:
    weights = torch.ones(64)
    plain = make(Recipe("bf16", weights="bf16"), weights)
    kahan = make(Recipe("bf16-kahan", weights="bf16", compensation="kahan"), weights)
    for twin in (plain, kahan):
        assert isinstance(twin, UpdateTwin)
        for _ in range(32):
            twin.take_update(torch.full((64,), 1e-3))
    assert torch.equal(plain.tensors.weights, weights)
    assert torch.allclose(kahan.tensors.weights, weights + 0.032, atol=8e-3)


def test_recipes_round_by_random_numbers_of_their_own() -> None:
    weights = draw()
    one, same, other = (
        make(Recipe(name, weights="bf16", rounding="stochastic"), weights)
        for name in ("one", "one", "other")
    )
    for twin in (one, same, other):
        assert isinstance(twin, UpdateTwin)
        twin.take_update(torch.full((64,), 1e-3))
    assert torch.equal(one.tensors.weights, same.tensors.weights)
    assert not torch.equal(one.tensors.weights, other.tensors.weights)


def test_weights_that_others_change_are_stored_and_do_not_count_as_moved() -> None:
    weights = draw()
    twin = make(Recipe("bf16", weights="bf16"), weights)
    outside = torch.arange(64) < 3
    changed = torch.where(outside, weights * 3, weights)
    twin.replace_weights(outside, changed)
    assert torch.equal(twin.tensors.weights, quantize(changed, "bf16"))
    assert torch.equal(twin.tensors.weights, twin.tensors.start)


def test_scales_of_blocks_never_shrink() -> None:
    weights = torch.full((64,), 256.0)
    twin = make(Recipe("mx", weights="mxfp8_e4m3"), weights)
    assert isinstance(twin, UpdateTwin)
    twin.take_update(torch.full((64,), -256.0 + 2**-9))
    # Under the scale of 256 the smallest magnitude is 2**-9; under a new one it would be smaller.
    twin.take_update(torch.full((64,), 2**-12))
    assert torch.equal(twin.tensors.weights, torch.full((64,), 2.0**-9))


def test_scales_of_layers_are_those_of_the_run_again_when_its_amax_changes() -> None:
    weights = torch.full((64,), 448.0)
    twin = make(Recipe("low", weights="e4m3fn"), weights)
    assert isinstance(twin, UpdateTwin)
    twin.take_update(torch.full((64,), 448.0))
    assert torch.equal(twin.tensors.weights, torch.full((64,), 896.0))  # the scale has become 2
    small = torch.full((64,), 2.0**-9)  # the smallest magnitude under a scale of 1
    twin.take_update(small - 896)
    assert torch.equal(twin.tensors.weights, torch.zeros(64))
    twin.forget_amaxes()
    twin.take_update(small)
    assert torch.equal(twin.tensors.weights, small)


def test_a_restored_twin_continues_with_the_scales_of_the_saved_state() -> None:
    weights = torch.full((64,), 448.0)
    twin, resumed = (make(Recipe("low", weights="e4m3fn"), weights) for _ in range(2))
    assert isinstance(twin, UpdateTwin)
    assert isinstance(resumed, UpdateTwin)
    twin.take_update(torch.full((64,), 448.0))
    state = copy.deepcopy(twin.state_dict())
    live = twin.state_dict()["amaxes"]
    twin.take_update(torch.full((64,), 896.0))
    assert torch.equal(live, state["amaxes"])
    resumed.load_state_dict(LAYOUT, state, torch.device("cpu"))
    resumed.rearrange(arrange(weights))
    resumed.take_update(torch.full((64,), 1.0))  # 897 is 896 under a scale of 2 and of 4
    resumed.take_update(torch.full((64,), -896.0 + 2.0**-9))
    assert torch.equal(resumed.tensors.weights, torch.zeros(64))


def test_rows_of_a_stack_are_those_of_the_layers() -> None:
    weights = draw()
    rows, _ = LAYOUT.find_rows(["w"], [torch.arange(64)])
    stack = make(Recipe("fp32"), weights).stack(rows)
    assert torch.equal(stack.now, weights[None])
    assert stack.states == {}


def test_kahan_summation_keeps_the_rounding_error_of_weights_that_others_change() -> None:
    weights = draw()
    twin = make(Recipe("bf16-kahan", weights="bf16", compensation="kahan"), weights)
    outside = torch.arange(64) < 32
    twin.replace_weights(outside, weights * 0.3)
    kept = (twin.tensors.weights + twin.tensors.lost.float())[:32]
    # The error is kept in bfloat16, 2**-9 of 2**-9 of the weight.
    torch.testing.assert_close(kept, weights[:32] * 0.3, rtol=2.0**-16, atol=0)
