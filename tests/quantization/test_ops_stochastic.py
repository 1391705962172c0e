"""Stochastic rounding is unbiased, stays on the grid, and does not use the global generator."""

import math
from fractions import Fraction
from unittest import mock

import pytest
import torch
from hypothesis import given, strategies as st

from altgrad.quantization import BF16, E4M3, E5M2, quantize
from tests import oracles, strategies
from tests.oracles import assert_same_values
from tests.quantization.matrix import EVERY_FORMAT


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def round_stochastically(x, format, scale=1.0, seed=0, **options):
    return quantize(x, format, scale, rounding="stochastic", generator=seeded(seed), **options)


def test_a_generator_of_another_device_is_refused_where_it_would_draw():
    x, other = torch.zeros(2), mock.Mock(device=torch.device("mps", 0))
    with pytest.raises(ValueError, match=r"on mps:0; expected a generator on cpu, .*Generator"):
        quantize(x, "e4m3fn", rounding="stochastic", generator=other)
    assert quantize(x, "e4m3fn", generator=other).tolist() == [0, 0]
    drawn = quantize(x.to("meta"), "e4m3fn", rounding="stochastic", generator=torch.Generator())
    assert drawn.shape == (2,)


def test_a_missing_generator_is_refused():
    with pytest.raises(ValueError, match=r"generator=torch\.Generator\(device=x\.device\)"):
        quantize(torch.ones(3), E4M3, rounding="stochastic")


def test_the_seed_determines_the_result():
    x = torch.randn(1000, generator=seeded())
    assert_same_values(round_stochastically(x, E4M3), round_stochastically(x, E4M3))
    assert not torch.equal(round_stochastically(x, E4M3), round_stochastically(x, E4M3, seed=1))


def test_a_generator_advances_with_each_call():
    x, generator = torch.randn(1000, generator=seeded()), seeded()
    first, second = (
        quantize(x, E4M3, rounding="stochastic", generator=generator) for _ in range(2)
    )
    assert not torch.equal(first, second)


def test_the_global_generator_is_neither_used_nor_advanced():
    x = torch.randn(1000, generator=seeded())
    torch.manual_seed(1)
    first, state = round_stochastically(x, E4M3), torch.get_rng_state()
    torch.manual_seed(2)
    assert_same_values(round_stochastically(x, E4M3), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


# In smallest subnormals of e4m3: of every size, of both signs, tiny shares above a grid value.
UNBIASED_AT = [0.25, 0.5, 1 + 2**-10, -1.75, 2.999, 8.1, 15.9, -17.0, 1000.3, 2e5, -229370.0]


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float16, 1.0), (torch.float32, 1.0), (torch.float32, 2.0**-30), (torch.float64, 1.0)],
    ids=str,
)
def test_the_mean_is_unbiased(dtype, scale):
    """The mean lies within 5 standard errors; mean and error are computed from exact fractions."""
    draws = 40_000
    x = (torch.tensor(UNBIASED_AT, dtype=torch.float64) * 2.0**-9 * scale).to(dtype)
    rounded = round_stochastically(x[:, None].expand(-1, draws), E4M3, scale).double()
    for value, row in zip(x.tolist(), rounded, strict=True):
        low, high = oracles.neighbours(value, E4M3, scale)
        assert set(row.tolist()) <= {float(low), float(high)}
        up = (Fraction(value) - low) / (high - low) if high > low else Fraction(1)
        standard_error = math.sqrt(up * (1 - up) / draws)
        share = (row == float(high)).double().mean().item()
        assert share == pytest.approx(float(up), abs=5 * standard_error, rel=0)


def test_the_direction_is_right_for_every_share():
    """At k/256 of the way to the next value, a share of k/256 moves up."""
    share = torch.arange(0, 256, dtype=torch.float64) / 256
    x = 1 + share / 8
    moved_up = round_stochastically(x[:, None].expand(-1, 10_000), E4M3) == 1.125
    error = (moved_up.double().mean(1) - share).abs()
    assert (error <= 5 * (share * (1 - share) / 10_000).sqrt()).all()


@pytest.mark.parametrize("format", EVERY_FORMAT)
@pytest.mark.parametrize("scale", [1.0, 2.0**-20, 2.0**20], ids=["1", "2^-20", "2^20"])
def test_grid_values_do_not_move(scale, format):
    """floor(t + rand) would move some values, because the sum may round up to the next integer."""
    grid = format.values() * scale
    draws = max(8, 500_000 // len(grid))
    x = grid.expand(draws, -1)
    assert_same_values(round_stochastically(x, format, scale), x)
    x = x[: draws // 2].float()
    assert_same_values(round_stochastically(x, format, scale), x)


@strategies.thorough
@given(st.data(), strategies.formats(max_bits=9), strategies.power_of_two_scales())
def test_only_the_two_neighbours_appear(data, format, scale):
    x = data.draw(strategies.tensors(format, scale)).clamp(-format.max * scale, format.max * scale)
    seed = data.draw(st.integers(0, 2**32))
    rounded = round_stochastically(x, format, scale, seed)
    for value, result in zip(x.tolist(), rounded.tolist(), strict=True):
        low, high = oracles.neighbours(value, format, scale)
        assert result in {float(low), float(high)}


def test_the_sign_of_zero_is_kept():
    x = torch.tensor([-0.0, 0.0, -(2.0**-12), 2.0**-12]).repeat(1000)
    rounded = round_stochastically(x, E4M3)
    assert torch.equal(rounded.signbit(), x.signbit())
    assert not round_stochastically(x, "e4m3fnuz")[rounded == 0].signbit().all()


@pytest.mark.parametrize("saturate", [True, False])
def test_values_beyond_the_top_saturate_or_overflow(saturate):
    x = torch.tensor([math.inf, -math.inf, 1e30, -1e30, math.nan])
    top = torch.tensor(E5M2.max if saturate else math.inf)
    expected = torch.stack([top, -top, top, -top, torch.tensor(math.nan)])
    assert_same_values(round_stochastically(x, E5M2, saturate=saturate), expected)


def test_overflow_just_beyond_max_is_as_likely_as_the_next_value_would_be():
    x = torch.full((40_000,), 448 + 8.0)  # a quarter of the way to 480
    assert (round_stochastically(x, E4M3) == 448).all()
    rounded = round_stochastically(x, E4M3, saturate=False)
    assert rounded.nan_to_num(448).eq(448).all()
    share = rounded.isnan().double().mean().item()
    assert share == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / 40_000), rel=0)


def test_bf16_keeps_the_mean_of_tiny_remainders():
    """Rounding to nearest loses 2**-16 of a spacing; stochastic rounding keeps its mean."""
    draws = 2**22
    x = torch.full((draws,), 1 + 2.0**-23)
    moved = (round_stochastically(x, BF16) > 1).sum().item()
    assert abs(moved - draws * 2**-16) <= 5 * math.sqrt(draws * 2**-16)
