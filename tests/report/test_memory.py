"""The memory that recipes take, against the bytes of real tensors and by hand."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import altgrad
from altgrad import Recipe
from altgrad.monitor.header import describe_recipe
from altgrad.recipes import get_recipes
from altgrad.report import Header, LayerInfo, RecipeInfo, Run, read
from altgrad.report.memory import (
    Bytes,
    Memory,
    count_scales,
    describe_saved,
    format_bytes,
    format_saved,
    measure_fp32,
    measure_layer,
    measure_memory,
)
from altgrad.report.records.schema import FormatSize, RecipeSizes, StateSize

NAN = math.nan
SHAPES = [(64, 256), (129, 65), (4097,), (63,), (7, 3, 11), (1,), ()]
"""Shapes of layers, some odd; those of 256 · 64 elements are packed in 8 bits."""


def make_net(dtype: torch.dtype = torch.float32) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(torch.full(shape, 0.5, dtype=dtype)) for shape in SHAPES)


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 0.25)
    optimizer.step()


def record(
    folder: Path, optimizer: Callable[..., Any], *recipes: str | Recipe, **options: Any
) -> Run:
    """Return the run of two steps of a net with odd shapes, which tried some recipes."""
    net = make_net()
    made = optimizer(net.parameters(), lr=1e-3, **options)
    with altgrad.watch(net, made, folder, every_n_steps=1, recipes=recipes):
        step(net, made)
        step(net, made)
    return read(folder)


def count_tensors(tensors: Iterable[Any], seen: set[int]) -> int:
    """Count the bytes of tensors, and of those that tensors of other classes consist of, once."""
    total = 0
    for each in tensors:
        if hasattr(each, "__tensor_flatten__"):
            total += count_tensors((getattr(each, n) for n in each.__tensor_flatten__()[0]), seen)
        elif isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in seen:
            seen.add(each.untyped_storage().data_ptr())
            total += each.untyped_storage().nbytes()
    return total


def count_real(net: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Count the bytes of the real weights, and of the real states after a step."""
    with torch.compiler.set_stance("force_eager"):
        step(net, optimizer)
    states = [value for state in optimizer.state.values() for value in state.values()]
    return count_tensors(net.parameters(), set()), count_tensors(states, set())


def make_real(library: str, name: str, dtype: torch.dtype, **options: Any) -> tuple[int, int]:
    net = make_net(dtype)
    kind = getattr(importlib.import_module(library), name)
    return count_real(net, kind(net.parameters(), lr=1e-3, **options))


@pytest.mark.parametrize(
    ("recipe", "library", "name", "dtype", "options"),
    [
        ("fp32", "torch.optim", "AdamW", torch.float32, {}),
        ("bf16-true", "torch.optim", "AdamW", torch.bfloat16, {}),
        ("torchao-8bit", "torchao.optim", "AdamW8bit", torch.float32, {}),
        ("torchao-fp8", "torchao.optim", "AdamWFp8", torch.float32, {}),
        ("torchao-sr", "torchao.optim", "_AdamW", torch.bfloat16, {"bf16_stochastic_round": True}),
        ("bnb-8bit", "bitsandbytes.optim", "AdamW8bit", torch.float32, {}),
        ("optimi-kahan", "optimi", "AdamW", torch.bfloat16, {"kahan_sum": True}),
    ],
)
def test_a_recipe_takes_what_the_tensors_of_its_library_take(
    recipe: str, library: str, name: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    pytest.importorskip(library)
    weights, states = make_real(library, name, dtype, **options)
    layers = describe_layers()
    described = describe_recipe(get_recipes(recipe)[0], "tensor")
    header = Header.from_json(
        {"formats": {}, "scaling": None, "layers": {}, "recipes": {recipe: described}}
    )
    parts = [measure_layer(each, header.recipes[recipe]) for each in layers]
    assert sum(each.weights for each in parts) == weights
    # Counters of 4 bytes for each layer are those of the run's optimizer, and bitsandbytes has one
    # table of 1 kB for each of the two moments of the whole model.
    kept = sum(each.states + each.compensation for each in parts)
    assert kept == pytest.approx(states - (2048 if recipe == "bnb-8bit" else 0), rel=0.01)
    if recipe == "optimi-kahan":
        assert sum(each.compensation for each in parts) == weights


def describe_layers() -> list[LayerInfo]:
    """Return the layers of the net with odd shapes, with the states of AdamW in float32."""
    return [make_layer(shape) for shape in SHAPES]


def make_layer(
    shape: tuple[int, ...], dtype: str = "float32", **states: tuple[int, int]
) -> LayerInfo:
    """Make a layer with states by name, elements and bytes; those of AdamW in float32 without."""
    count = math.prod(shape)
    moment = (count, 4 * count)
    known = states or {"step": (0, 4), "exp_avg": moment, "exp_avg_sq": moment}
    sizes = {name: StateSize(*each) for name, each in known.items()}
    return LayerInfo(shape, dtype, 1 if count else 0, (), 1, sizes)


def make_recipe(
    weights: FormatSize | None = None,
    states: dict[str, FormatSize] | None = None,
    dtype: str | None = None,
    compensation: str | None = None,
) -> RecipeInfo:
    sizes = RecipeSizes(weights, states or {}, None)
    known = (None, "nearest_even", compensation, {}, dtype, None, False, NAN)
    return RecipeInfo("mine", *known, sizes=sizes)


@pytest.mark.parametrize(
    ("shape", "scaling", "scales"),
    [
        ((3, 70), None, 0),
        ((3, 70), "tensor", 1),
        ((3, 70), "channel", 3),
        ((3, 70), ("block", 32), 9),
        ((2, 3, 64), ("block", 32), 12),
        ((5,), ("block", 32), 1),
        ((), "channel", 1),
        ((), ("block", 32), 1),
        ((0, 3), "channel", 0),
    ],
)
def test_scales_are_counted(shape: tuple[int, ...], scaling: Any, scales: int) -> None:
    assert count_scales(shape, scaling) == scales
    found = measure_layer(make_layer(shape), make_recipe(FormatSize(8, scaling)))
    assert found.weights == math.prod(shape) + scales


def test_formats_of_states_rounding_errors_and_dtypes_count() -> None:
    layer, e5m2 = make_layer((10,)), FormatSize(8, "tensor")
    both = make_recipe(FormatSize(16, None), {"exp_avg_sq": e5m2}, compensation="kahan")
    assert measure_layer(layer, both) == Bytes(20, 4 + 40 + 11, 20)
    assert measure_layer(layer, make_recipe(states={"*": e5m2})) == Bytes(40, 4 + 11 + 11)
    assert measure_layer(layer, make_recipe(dtype="bfloat16")) == Bytes(20, 4 + 20 + 20)
    assert measure_fp32(layer) == Bytes(40, 84)
    double = make_layer((10,), "float64", exp_avg=(10, 80))
    assert measure_fp32(double) == Bytes(80, 80)
    assert measure_layer(double, make_recipe()) == Bytes(80, 80)


def test_factored_states_have_no_format_and_follow_the_dtype() -> None:
    layer = make_layer((5, 7), step=(0, 4), row_var=(5, 20), col_var=(7, 28))
    states = {"*": FormatSize(8, None)}
    assert measure_layer(layer, make_recipe(states=states)).states == 52
    assert measure_layer(layer, make_recipe(dtype="bfloat16")).states == 28


def test_states_that_the_run_itself_packs_stay_and_are_compared_with_float32() -> None:
    layer = make_layer((256,), state1=(256, 256), absmax1=(0, 40), qmap1=(0, 1024))
    assert measure_layer(layer, make_recipe(dtype="bfloat16")) == Bytes(512, 1320)
    assert measure_fp32(layer) == Bytes(1024, 1024)


def test_rounding_errors_and_master_copies_stand_beside_weights_of_few_bits() -> None:
    layer = make_layer((10,), "bfloat16", kahan_comp=(10, 20), master_param=(10, 40))
    assert measure_layer(layer, make_recipe(dtype="bfloat16")) == Bytes(20, 0, 20, 40)
    assert measure_layer(layer, make_recipe()) == Bytes(40)
    assert measure_fp32(layer) == Bytes(40)


def test_the_memory_of_a_run_has_its_recipes_and_the_run_itself(tmp_path: Path) -> None:
    run = record(tmp_path, torch.optim.SGD, "bf16", "bf16-true", momentum=0.9)
    found = measure_memory(run.layers, run.recipes)
    count = sum(math.prod(shape) for shape in SHAPES)
    assert {name: each.saved_share for name, each in found.items()} == {
        "bf16": 0.25,
        "bf16-true": 0.5,
    }
    assert found["bf16"].fp32 == 8 * count
    assert found["bf16"].per_parameter == Bytes(2.0, 4.0)
    low = replace(run, layers={n: replace(e, dtype="bfloat16") for n, e in run.layers.items()})
    assert [*measure_memory(low.layers, low.recipes)] == ["now", "bf16", "bf16-true"]
    assert measure_memory(low.layers, low.recipes)["now"].bytes == Bytes(2.0 * count, 4.0 * count)


def test_what_is_unknown_is_nan_and_says_so(tmp_path: Path) -> None:
    run = record(tmp_path, torch.optim.AdamW, Recipe("own", optimizer=make_sgd), "bf16")
    own, bf16 = measure_memory(run.layers, run.recipes).values()
    assert math.isnan(own.saved_share)
    assert bf16.saved_share == pytest.approx(1 / 6, rel=1e-2)
    assert (format_saved(own.saved_share), describe_saved(own)) == ("unknown", "memory unknown")
    older = replace(run, layers={n: replace(e, states=None) for n, e in run.layers.items()})
    found = measure_memory(older.layers, older.recipes)["bf16"]
    assert found.bytes.weights == 2 * found.parameters
    assert math.isnan(found.bytes.states)
    assert math.isnan(found.fp32)


def test_layers_without_a_step_are_not_counted(tmp_path: Path) -> None:
    run = record(tmp_path, torch.optim.AdamW, "bf16")
    unused = {"0": replace(run.layers["0"], states=None)}
    (memory,) = measure_memory(run.layers | unused, run.recipes).values()
    assert memory.layers == len(SHAPES) - 1
    assert memory.parameters == sum(math.prod(shape) for shape in SHAPES[1:])
    assert math.isfinite(memory.fp32)


def make_sgd(parameters: list[nn.Parameter], group: dict[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=group["lr"])


def test_savings_are_said_shortly() -> None:
    memory = Memory("a", 1000, 2, Bytes(2e6, 0.8e6), 7.7e6)
    assert memory.saved_share == pytest.approx(4.9 / 7.7)
    assert format_saved(memory.saved_share) == "64 %"
    assert describe_saved(memory) == "saves 4.90 MB of 7.70 MB (64 %)"
    more = replace(memory, bytes=Bytes(8.47e6))
    assert (format_saved(more.saved_share), describe_saved(more)) == (
        "−10 %",
        "takes 770 kB more than the 7.70 MB of float32",
    )
    sizes = {12.0: "12 B", 98_304.0: "98.3 kB", 393_216.0: "393 kB", 2.5e12: "2,500 GB"}
    assert {size: format_bytes(size) for size in sizes} == sizes
    assert format_bytes(NAN) == "unknown"
