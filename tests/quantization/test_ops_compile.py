"""Compiled `quantize` equals eager `quantize`, bit for bit.

A graph of all formats compiles slowly, so there is only one.
"""

import shutil

import pytest
import torch

from altgrad.quantization import (
    BF16,
    E0M7,
    E4M3,
    E4M3FNUZ,
    E5M2,
    E7M0,
    FORMATS,
    FloatFormat,
    compute_scale,
    quantize,
    spacing,
)
from tests import oracles
from tests.oracles import assert_same_values

needs_a_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))),
    reason="inductor needs a C++ compiler (c++, g++ or clang++) on the path",
)
FTZ = FloatFormat("ftz", 3, 2, 3, has_subnormals=False)
# One of each kind the kernel tells apart.
KINDS = {format.name: format for format in (E0M7, E4M3, E5M2, E7M0, E4M3FNUZ, BF16, FTZ)}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function, backend="aot_eager"):
    return torch.compile(function, fullgraph=True, dynamic=True, backend=backend)


def every_format_at_once(x, scale, formats=dict(FORMATS)):  # noqa: B006 - only read
    results = {}
    for name, format in formats.items():
        results[f"quantize {name}"] = quantize(x, format)
        results[f"quantize {name} scaled"] = quantize(x, format, scale)
        results[f"spacing {name}"] = spacing(x, format)
    return results


def assert_same_results(actual, expected, x):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].dtype is expected[name].dtype, name
        try:
            assert_same_values(actual[name], expected[name], x)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def inputs():
    """Yield inputs of several lengths, because the graph is dynamic."""
    yield oracles.every_value_of(torch.bfloat16).float()
    yield oracles.random_bit_patterns(100_001)
    for format in (E4M3, E5M2, E7M0):
        yield oracles.critical_inputs(format, torch.float32)


@pytest.mark.slow
@needs_a_compiler
def test_every_format_compiles_with_inductor():
    function = compiled(every_format_at_once, "inductor")
    for x in inputs():
        scale = torch.tensor(2.0**-3)
        assert_same_results(function(x, scale), every_format_at_once(x, scale), x)


def cast_and_gradient(x, half):
    loss = quantize(x, E4M3).sum() + quantize(x, E5M2, 0.5).sum()
    return {
        "bf16": quantize(x, BF16),
        "bf16 of half": quantize(half, BF16),
        "e4m3fn of half": quantize(half, E4M3),
        "ftz": quantize(x, FTZ),
        "up": quantize(x, E4M3, rounding="up"),
        "unsaturated": quantize(x, E5M2, 2.0, saturate=False),
        "spacing of half": spacing(half, BF16),
    }, loss


@needs_a_compiler
def test_inductor_rounds_to_bf16_and_passes_gradients():
    """Inductor would remove x.to(bfloat16).float(), so that nothing is rounded."""
    function = compiled(cast_and_gradient, "inductor")
    x = oracles.random_bit_patterns(50_000)
    half = oracles.every_value_of(torch.bfloat16)
    expected, _ = cast_and_gradient(x, half)
    x.requires_grad_()
    actual, loss = function(x, half)
    assert_same_results(actual, expected, x)
    rounded = actual["bf16"].detach()
    assert_same_values(rounded, oracles.round_with_gfloat(x, BF16), x)
    assert (rounded != x)[x.isfinite()].double().mean() > 0.9
    loss.backward()
    assert_same_values(x.grad, torch.full_like(x, 2.0))


def slow(value: object) -> object:
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        *(pytest.param(d, marks=pytest.mark.slow) for d in (torch.float16, torch.float64)),
    ],
    ids=str,
)
def test_every_kind_of_format_and_dtype_equals_eager(dtype):
    def function(x, scale):
        return every_format_at_once(x, scale, KINDS)

    x = oracles.random_bit_patterns(10_000).to(dtype)
    fast = compiled(function)
    for scale in (torch.tensor(2.0**-3), torch.tensor(0.3)):
        assert_same_results(fast(x, scale), function(x, scale), x)


@pytest.mark.parametrize(
    "rounding",
    [
        "toward_zero",
        *(pytest.param(r, marks=pytest.mark.slow) for r in ("nearest_even", "up", "down")),
    ],
)
def test_every_kind_of_format_and_rounding_equals_eager(rounding):
    def rounded(x):
        return {
            f"{name} {saturate}": quantize(x, format, scale, rounding=rounding, saturate=saturate)
            for name, format in KINDS.items()
            for saturate, scale in ((True, 1.0), (False, 0.5))
        }

    x = oracles.random_bit_patterns(10_000)
    assert_same_results(compiled(rounded)(x), rounded(x), x)


def test_names_of_formats_compile():
    def rounded(x):
        return {name: quantize(x, name) for name in ("bf16", "E4M3", "float8_e5m2")}

    x = oracles.random_bit_patterns(10_000)
    assert_same_results(compiled(rounded)(x), rounded(x), x)


def test_out_in_place_equals_eager():
    def rounded(x):
        return {"out": quantize(x, E4M3, 0.5, out=x)}

    x = oracles.random_bit_patterns(10_000)
    given = x.clone()
    expected = rounded(x.clone())
    assert_same_results(compiled(rounded)(x), expected, given)
    assert_same_values(x, expected["out"], given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_gradients_are_ones(dtype):
    x = torch.tensor([1.03, 1e4, -1e4, 0.0], dtype=dtype, requires_grad=True)
    q = compiled(lambda x: quantize(x, E4M3, torch.tensor(0.25)))(x)
    q.sum().backward()
    assert q.tolist() == [1, 112, -112, 0]
    assert (x.grad.tolist(), x.grad.dtype) == ([1, 1, 1, 1], dtype)


def test_stochastic_rounding_may_break_the_graph_and_equals_eager():
    def rounded(x, generator):
        return quantize(x, E4M3, rounding="stochastic", generator=generator)

    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    function = torch.compile(rounded, backend="aot_eager")
    actual = function(x, torch.Generator().manual_seed(1))
    assert_same_values(actual, rounded(x, torch.Generator().manual_seed(1)), x)


@pytest.mark.parametrize("scaling", ["tensor", "channel", ("block", 32)], ids=str)
def test_compiled_compute_scale_equals_eager(scaling):
    def scaled(x):
        return {
            str(power_of_two): compute_scale(x, E4M3, scaling=scaling, power_of_two=power_of_two)
            for power_of_two in (True, "floor", False)
        }

    x = oracles.random_bit_patterns(10_000).view(100, 100)
    assert_same_results(compiled(scaled)(x), scaled(x), None)
