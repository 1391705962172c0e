"""Properties of rounding for any format and any power-of-two scale."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, strategies as st

from altgrad.quantization import quantize, spacing
from tests import oracles, strategies
from tests.oracles import assert_same_values

ROUNDINGS = [*oracles.DETERMINISTIC, "stochastic"]


@st.composite
def cases(draw, **options):
    """Draw a format, a power-of-two scale, and numbers within the range of both."""
    format = draw(strategies.formats(**options))
    scale = draw(strategies.power_of_two_scales())
    return draw(strategies.tensors(format, scale)), format, scale


@pytest.mark.parametrize("rounding", ROUNDINGS)
@strategies.thorough
@given(case=cases(), saturate=st.booleans())
def test_rounding_is_idempotent(rounding, case, saturate):
    x, format, scale = case

    def rounded(x, seed):
        generator = torch.Generator().manual_seed(seed)
        return quantize(x, format, scale, rounding=rounding, saturate=saturate, generator=generator)

    once = rounded(x, 0)
    assert_same_values(rounded(once, 1), once, x)


@pytest.mark.parametrize("rounding", oracles.DETERMINISTIC)
@strategies.thorough
@given(case=cases())
def test_rounding_is_monotone(rounding, case):
    x, format, scale = case
    rounded = quantize(x.sort().values, format, scale, rounding=rounding)
    assert (rounded.diff() >= 0).all()


@pytest.mark.parametrize("rounding", ["nearest_even", "toward_zero"])
@strategies.thorough
@given(case=cases(), saturate=st.booleans())
def test_rounding_is_odd(rounding, case, saturate):
    x, format, scale = case
    positive = quantize(x, format, scale, rounding=rounding, saturate=saturate)
    negative = quantize(-x, format, scale, rounding=rounding, saturate=saturate)
    # Without −0 both signs give 0.
    expected = -positive if format.has_negative_zero else torch.where(positive == 0, 0.0, -positive)
    assert_same_values(negative, expected, x)


@strategies.thorough
@given(case=cases(), saturate=st.booleans())
def test_up_and_down_mirror_each_other(case, saturate):
    x, format, scale = case
    up = quantize(x, format, scale, rounding="up", saturate=saturate)
    down = quantize(-x, format, scale, rounding="down", saturate=saturate)
    expected = -up if format.has_negative_zero else torch.where(up == 0, 0.0, -up)
    assert_same_values(down, expected, x)


@strategies.thorough
@given(case=cases())
def test_rounding_up_and_down_brackets_x_within_one_spacing(case):
    x, format, scale = case
    x = x.clamp(-format.max * scale, format.max * scale)
    up = quantize(x, format, scale, rounding="up")
    down = quantize(x, format, scale, rounding="down")
    assert ((down <= x) & (x <= up)).all()
    assert (up - down <= spacing(x, format, scale)).all()
    toward_zero = quantize(x, format, scale, rounding="toward_zero")
    expected = torch.where(x.signbit(), up, down)
    assert_same_values(toward_zero.abs(), expected.abs(), x)


@strategies.thorough
@given(case=cases())
def test_nearest_errs_by_half_a_spacing_at_most(case):
    x, format, scale = case
    x = x[x.abs() <= format.max * scale]
    rounded, gap = quantize(x, format, scale), spacing(x, format, scale)
    for value, result, step in zip(x.tolist(), rounded.tolist(), gap.tolist(), strict=True):
        assert abs(Fraction(value) - Fraction(result)) <= Fraction(step) / 2


@strategies.thorough
@given(case=cases())
def test_a_power_of_two_scale_multiplies_every_grid_point(case):
    x, format, scale = case
    x = x[(x.abs() < 2.0**900) & ((x == 0) | (x.abs() > 2.0**-900))]
    assert_same_values(quantize(x, format, scale), quantize(x / scale, format) * scale, x)


@strategies.thorough
@given(case=cases(max_bits=8, subnormals=st.just(False)), data=st.data())
def test_formats_without_subnormals_equal_brute_force(case, data):
    x, format, scale = case
    rounding = data.draw(st.sampled_from(oracles.DETERMINISTIC))
    expected = [
        oracles.round_by_brute_force(value, format, rounding, scale=scale) for value in x.tolist()
    ]
    actual = quantize(x, format, scale, rounding=rounding)
    assert_same_values(actual, torch.tensor(expected, dtype=torch.float64), x)


@strategies.thorough
@given(
    data=st.data(),
    x=st.lists(st.floats(width=32), min_size=1, max_size=20),
    exponent=st.integers(-149, 127),
)
def test_any_float32_under_any_float32_scale_equals_the_definition(data, x, exponent):
    """x / scale may exceed float32."""
    format = data.draw(strategies.formats(max_bits=8))
    rounding = data.draw(st.sampled_from(oracles.DETERMINISTIC))
    scale, x = math.ldexp(1.0, exponent), torch.tensor(x)
    expected = [
        oracles.round_by_brute_force(value, format, rounding, scale=scale) for value in x.tolist()
    ]
    expected = torch.tensor(expected, dtype=torch.float64).float()
    assert_same_values(quantize(x, format, scale, rounding=rounding), expected, x)
    assert_same_values(quantize(x, format, torch.tensor(scale), rounding=rounding), expected, x)
