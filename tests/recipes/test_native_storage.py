"""The native rounding gives the bits that `store_` gives with tensors, or leaves the work to it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from altgrad.measurement.native_code import CHOICE
from altgrad.quantization import FloatFormat, get_format
from altgrad.recipes import native_storage
from altgrad.recipes.native_storage import store_natively
from altgrad.recipes.rounding import store_
from tests import oracles
from tests.strategies import formats as any_formats, thorough

pytestmark = pytest.mark.usefixtures("native_kernel")

BF16, E4M3 = get_format("bf16"), get_format("e4m3fn")


def draw_weights(seed: int) -> Tensor:
    """Draw bit patterns, numbers near 1 and ties; NaN, ±inf and ±0 are among them."""
    generator = torch.Generator().manual_seed(seed)
    near_one = torch.randn(700, generator=generator)
    ties = near_one.to(torch.bfloat16).float() * (1 + 2.0**-8)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, 1e-45, -1e-45])
    return torch.cat([oracles.random_bit_patterns(500, torch.float32), near_one, ties, special])


def draw_scale(kind: str, shape: torch.Size, seed: int) -> Tensor | None:
    generator = torch.Generator().manual_seed(seed)
    if kind == "none":
        return None
    powers = torch.randint(-12, 12, shape, generator=generator).float().exp2()
    any_number = powers * (1 + torch.rand(shape, generator=generator))
    scales = {"powers": powers, "any": any_number, "one": any_number[:1], "scalar": any_number[0]}
    return scales[kind]


def store_both_ways(
    x: Tensor, element: FloatFormat, scale: Tensor | None, monkeypatch: pytest.MonkeyPatch, **how
) -> None:
    """Compare weights and kept errors, bit for bit but for the bits of NaN."""
    found = []
    for kernel in ("eager", "native"):
        monkeypatch.setenv(CHOICE, kernel)
        weights, lost = x.clone(), how.get("lost")
        options = dict(how)
        if how.get("rounding") == "stochastic":
            options["generator"] = torch.Generator().manual_seed(3)
        if lost is not None:
            options["lost"] = lost = lost.clone()
        store_(weights, element, scale, **options)
        found.append((weights, lost))
    (eager, eager_lost), (native, native_lost) = found
    same = (eager.view(torch.int32) == native.view(torch.int32)) | (eager.isnan() & native.isnan())
    assert same.all(), (x[~same][:5], eager[~same][:5], native[~same][:5])
    if eager_lost is not None:
        assert torch.equal(eager_lost.view(torch.int16), native_lost.view(torch.int16))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Note each result of `store_natively`."""
    results: list[bool] = []

    def note(*arguments, **options) -> bool:
        results.append(store_natively(*arguments, **options))
        return results[-1]

    monkeypatch.setattr("altgrad.recipes.rounding.store_natively", note)
    return results


@pytest.mark.parametrize("name", ["bf16", "fp16", "e4m3fn", "e5m2", "e2m1", "e4m3fnuz", "e3m2"])
@pytest.mark.parametrize("scale", ["none", "powers", "any", "one", "scalar"])
@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_all_bits_are_those_of_tensors(name, scale, rounding, monkeypatch, counted) -> None:
    for seed in range(3):
        x = draw_weights(seed)
        scales = draw_scale(scale, x.shape, seed)
        store_both_ways(x, get_format(name), scales, monkeypatch, rounding=rounding)
    assert counted == [False, True] * 3


@pytest.mark.parametrize("name", ["bf16", "fp16", "e4m3fn", "e5m2", "e2m1"])
def test_errors_of_kahan_summation_are_those_of_tensors(name, monkeypatch, counted) -> None:
    for seed in range(3):
        x = draw_weights(seed)
        lost = (draw_weights(seed + 9) * 2.0**-9).nan_to_num(0.0).bfloat16()
        store_both_ways(x, get_format(name), None, monkeypatch, lost=lost)
    assert counted == [False, True] * 3


def test_a_quotient_beyond_float32_is_no_overflow(monkeypatch, counted) -> None:
    """Scales of bf16 are divided by in float64, in which such a quotient has a value."""
    x, scale = torch.tensor([6.6882e36, 1e38]), torch.tensor([0.0119, 0.5])
    wide = FloatFormat("wide", exponent_bits=8, mantissa_bits=1, bias=120)
    store_both_ways(x, wide, scale, monkeypatch)
    assert counted == [False, True]


@thorough
@given(format=any_formats(), seed=st.integers(0, 999), is_stochastic=st.booleans())
def test_any_format_has_the_same_bits(format, seed, is_stochastic) -> None:
    rounding = "stochastic" if is_stochastic else "nearest_even"
    x = draw_weights(seed)
    with pytest.MonkeyPatch.context() as patch:
        for scale in ("none", "any"):
            scales = draw_scale(scale, x.shape, seed)
            store_both_ways(x, format, scales, patch, rounding=rounding)


def leave(weights: Tensor, element: FloatFormat = BF16, scale=None, lost=None) -> None:
    before = weights.clone()
    assert not store_natively(
        weights, element, scale, is_stochastic=False, generator=None, lost=lost
    )
    assert torch.equal(weights, before)


def test_what_it_cannot_round_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(8, 8)
    leave(x.double())
    leave(x.bfloat16(), E4M3)
    leave(x.t())
    leave(torch.empty(0))
    leave(x, FloatFormat("m0", exponent_bits=5, mantissa_bits=0, bias=15))
    leave(x, FloatFormat("ns", exponent_bits=4, mantissa_bits=3, bias=7, has_subnormals=False))
    leave(x, E4M3, scale=2.0)
    leave(x, E4M3, scale=torch.ones(8, 8, dtype=torch.float64))
    leave(x, E4M3, scale=torch.ones(8, 8), lost=torch.zeros(8, 8, dtype=torch.bfloat16))
    leave(x, lost=torch.zeros(8, 8))
    monkeypatch.setattr(native_storage, "MOST_ELEMENTS", 63)
    leave(x)


def test_each_write_is_counted() -> None:
    """AltGrad's own search for writes, and autograd, rely on these numbers."""
    weights, lost = torch.randn(8), torch.zeros(8, dtype=torch.bfloat16)
    before = weights._version, lost._version  # torch has no public name
    assert store_natively(weights, BF16, None, is_stochastic=False, generator=None, lost=lost)
    assert weights._version > before[0]
    assert lost._version > before[1]


def test_a_parameter_is_rounded() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.001, 2.0]))
    store_(weight, BF16, None)
    assert weight.tolist() == [1.0, 2.0]
