"""`quantize` against gfloat, ml_dtypes and a search in exact fractions, exhaustively."""

import math

import pytest
import torch
from hypothesis import given, strategies as st

from altgrad.quantization import BF16, E4M3, FORMATS, FloatFormat, quantize
from tests import oracles, strategies
from tests.oracles import assert_same_values
from tests.quantization.matrix import EVERY_FORMAT, WITH_ML_DTYPE

HALF_DTYPES = [torch.float16, torch.bfloat16]
RANDOM = oracles.random_bit_patterns(1_000_000)
rounding_modes = pytest.mark.parametrize("rounding", oracles.DETERMINISTIC)


def check_against_gfloat(x, format, rounding, *scales):
    """Check one scale in several types against an oracle."""
    scales = scales or (1.0,)
    for saturate in (True, False):
        expected = oracles.round_with_gfloat(
            x, format, rounding, saturate=saturate, scale=float(scales[0])
        )
        for scale in scales:
            actual = quantize(x, format, scale, rounding=rounding, saturate=saturate)
            # float32 does not hold the ends of every scaled grid; round the oracle, too.
            assert_same_values(actual, expected.to(actual.dtype), x)


def both_ways(scale):
    return scale, torch.tensor(scale)


# --- gfloat --------------------------------------------------------------------------------------


@rounding_modes
@pytest.mark.parametrize("format", EVERY_FORMAT)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_every_half_precision_value_equals_gfloat(dtype, format, rounding):
    check_against_gfloat(oracles.every_value_of(dtype), format, rounding)


@rounding_modes
@pytest.mark.parametrize("format", EVERY_FORMAT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_value_midpoint_and_neighbouring_float_equals_gfloat(dtype, format, rounding):
    check_against_gfloat(oracles.critical_inputs(format, dtype), format, rounding)


@pytest.mark.parametrize("format", EVERY_FORMAT)
def test_a_million_random_float32_equal_gfloat(format):
    check_against_gfloat(RANDOM, format, "nearest_even")
    for rounding in ("toward_zero", "up", "down"):
        check_against_gfloat(RANDOM[:100_000], format, rounding)


@rounding_modes
@pytest.mark.parametrize("format", EVERY_FORMAT)
def test_random_float64_equal_gfloat(format, rounding):
    x = oracles.random_bit_patterns(50_000, torch.float64)
    # Uniform bit patterns rarely lie in the range of a format, so scale as many into it.
    near = torch.ldexp(torch.frexp(x).mantissa, torch.randint_like(x, -160, 140))
    check_against_gfloat(torch.cat([x, near]), format, rounding)


SCALES = [2.0**exponent for exponent in (-140, -120, -20, -1, 1, 20, 100, 120)]


@rounding_modes
@pytest.mark.parametrize("format", EVERY_FORMAT)
@pytest.mark.parametrize("scale", SCALES, ids=lambda scale: f"2^{math.frexp(scale)[1] - 1}")
def test_power_of_two_scales_equal_gfloat(scale, format, rounding):
    near = oracles.critical_inputs(format) if format.bits <= 8 else torch.empty(0).double()
    x = torch.cat([(near * scale).float(), RANDOM[:20_000]])
    check_against_gfloat(x, format, rounding, *both_ways(scale))


@pytest.mark.parametrize("exponent", [7, 20, 100])
@rounding_modes
def test_quotients_too_small_for_float32_are_not_rounded_first(rounding, exponent):
    """x / scale lies next to midpoints of bf16's subnormals, closer than 2**-149."""
    midpoints = (2 * torch.arange(200) + 1) * 2.0 ** (exponent - 134)
    x = torch.cat([midpoints.nextafter(torch.tensor(end)) for end in (0.0, math.inf)])
    check_against_gfloat(torch.cat([x, -x]), BF16, rounding, *both_ways(2.0**exponent))


@pytest.mark.parametrize("exponent", [-1074, -200, -150, 128, 200, 1000])
@pytest.mark.parametrize("rounding", oracles.DETERMINISTIC)
def test_scales_beyond_float32_equal_brute_force(rounding, exponent):
    scale = 2.0**exponent
    near = torch.ldexp(oracles.critical_inputs(E4M3), torch.tensor(exponent))
    for x in (near, near.float(), RANDOM[:300], RANDOM[:300].double()):
        expected = [
            oracles.round_by_brute_force(value, E4M3, rounding, scale=scale) for value in x.tolist()
        ]
        actual = quantize(x, E4M3, scale, rounding=rounding)
        assert_same_values(actual, torch.tensor(expected, dtype=torch.float64).to(x.dtype), x)


# --- ml_dtypes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("format", WITH_ML_DTYPE)
@pytest.mark.parametrize("inputs", ["float16", "bfloat16", "critical", "random"])
def test_every_format_equals_ml_dtypes(inputs, format):
    x = {
        "float16": lambda: oracles.every_value_of(torch.float16),
        "bfloat16": lambda: oracles.every_value_of(torch.bfloat16),
        "critical": lambda: oracles.critical_inputs(format, torch.float32),
        "random": lambda: RANDOM,
    }[inputs]()
    x = x if format.has_nan else x[~x.isnan()]
    for saturate in (True, False):
        expected = oracles.round_with_ml_dtypes(x, format, saturate=saturate)
        assert_same_values(quantize(x, format, saturate=saturate), expected, x)


# --- exact fractions -----------------------------------------------------------------------------


@strategies.thorough
@given(st.data(), strategies.formats(max_bits=9), strategies.power_of_two_scales())
def test_any_small_format_equals_brute_force(data, format, scale):
    x = data.draw(strategies.tensors(format, scale))
    rounding = data.draw(st.sampled_from(oracles.DETERMINISTIC))
    saturate = data.draw(st.booleans())
    expected = [
        oracles.round_by_brute_force(value, format, rounding, saturate=saturate, scale=scale)
        for value in x.tolist()
    ]
    actual = quantize(x, format, scale, rounding=rounding, saturate=saturate)
    assert_same_values(actual, torch.tensor(expected, dtype=torch.float64), x)


@rounding_modes
@pytest.mark.parametrize("saturate", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "format",
    [
        pytest.param(FloatFormat("ftz", 3, 2, 3, has_subnormals=False), id="finite"),
        pytest.param(FloatFormat("ftz", 2, 0, 1, has_subnormals=False, has_inf=True), id="M=0"),
        pytest.param(
            FloatFormat("ftz", 2, 1, 5, has_subnormals=False, has_negative_zero=False), id="fnuz"
        ),
    ],
)
def test_formats_without_subnormals_equal_brute_force(format, dtype, saturate, rounding):
    x = oracles.critical_inputs(format, dtype)
    expected = [
        oracles.round_by_brute_force(value, format, rounding, saturate=saturate)
        for value in x.tolist()
    ]
    actual = quantize(x, format, rounding=rounding, saturate=saturate)
    assert_same_values(actual, torch.tensor(expected, dtype=torch.float64), x)


@pytest.mark.parametrize("format", [param for param in EVERY_FORMAT if param.values[0].bits <= 8])
def test_the_oracles_agree_with_each_other(format):
    x = oracles.critical_inputs(format)
    for rounding in oracles.DETERMINISTIC:
        for saturate in (True, False):
            brute_force = [
                oracles.round_by_brute_force(value, format, rounding, saturate=saturate)
                for value in x.tolist()
            ]
            expected = oracles.round_with_gfloat(x, format, rounding, saturate=saturate)
            assert_same_values(torch.tensor(brute_force, dtype=torch.float64), expected, x)


# --- single values -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "saturated", "otherwise"),
    [
        ("e4m3fn", 448.0, math.nan),
        ("e5m2", 57344.0, math.inf),
        ("e4m3fnuz", 240.0, math.nan),
        ("e0m7", 127 / 128, 127 / 128),
        ("e2m1", 6.0, 6.0),
        ("bf16", 2.0**128 - 2.0**120, math.inf),
    ],
)
def test_infinities_saturate_or_become_inf_or_nan(format, saturated, otherwise):
    x = torch.tensor([math.inf, -math.inf])
    for rounding in oracles.DETERMINISTIC:
        actual = quantize(x, format, rounding=rounding)
        assert_same_values(actual, torch.tensor([saturated, -saturated]), x)
        actual = quantize(x, format, rounding=rounding, saturate=False)
        assert_same_values(actual, torch.tensor([otherwise, -otherwise]), x)


@pytest.mark.parametrize("format", EVERY_FORMAT)
@pytest.mark.parametrize("saturate", [True, False])
def test_nan_stays_nan(format, saturate):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = torch.tensor([math.nan, 1.0], dtype=dtype)
        assert quantize(x, format, saturate=saturate).isnan().tolist() == [True, False]


def test_overflow_happens_only_when_rounding_away_from_zero():
    x = torch.tensor([450.0, -450.0])
    rounded = {
        rounding: quantize(x, E4M3, rounding=rounding, saturate=False).tolist()
        for rounding in oracles.DETERMINISTIC
    }
    assert rounded["nearest_even"] == rounded["toward_zero"] == [448, -448]
    assert math.isnan(rounded["up"][0])
    assert rounded["up"][1] == -448
    assert rounded["down"][0] == 448
    assert math.isnan(rounded["down"][1])


@pytest.mark.parametrize(
    "format", [pytest.param(f, id=n) for n, f in FORMATS.items() if not (f.has_nan or f.has_inf)]
)
def test_formats_without_inf_and_nan_always_saturate(format):
    x = torch.tensor([1e30, -1e30, math.inf, -math.inf])
    expected = torch.tensor([1, -1, 1, -1]) * format.max
    for rounding in oracles.DETERMINISTIC:
        assert_same_values(quantize(x, format, rounding=rounding, saturate=False), expected, x)


def test_m0_ties_go_to_the_even_code():
    # e7m0 has code e + 63 for 2**e, so 1 is odd, 2 even, 4 odd; 0 is even.
    x = torch.tensor([0.75, 1.5, 3.0, 6.0, -1.5, -3.0, 2.0**-63])
    assert quantize(x, "e7m0").tolist() == [0.5, 2, 2, 8, -2, -2, 0]


@pytest.mark.parametrize("bias", [0, 1], ids=["even bias", "odd bias"])
def test_m0_ties_depend_on_the_bias(bias):
    x = torch.tensor([1.5, 3.0, 6.0]).double() * 2**2
    format = FloatFormat("m0", 4, 0, bias)
    assert quantize(x, format).tolist() == ([4, 16, 16] if bias == 0 else [8, 8, 32])


@pytest.mark.parametrize("x", [5e-324, -5e-324, 1e-310, 1e300, -1.7976931348623157e308])
@rounding_modes
@pytest.mark.parametrize("format", EVERY_FORMAT)
def test_float64_far_out_of_range_equals_brute_force(format, rounding, x):
    tensor = torch.tensor(x, dtype=torch.float64)
    for scale in (1.0, 2.0**-100, 2.0**100):
        actual = quantize(tensor, format, scale, rounding=rounding).item()
        expected = oracles.round_by_brute_force(x, format, rounding, scale=scale)
        assert (actual, math.copysign(1, actual)) == (expected, math.copysign(1, expected))


def test_formats_as_wide_as_the_arithmetic_do_not_change_x():
    fp32 = FloatFormat("fp32", 8, 23, 127, num_high_nans=2**23 - 1, has_inf=True)
    fp64 = FloatFormat("fp64", 11, 52, 1023, num_high_nans=2**52 - 1, has_inf=True)
    for rounding in oracles.DETERMINISTIC:
        x = RANDOM[:100_000]
        assert_same_values(quantize(x, fp32, rounding=rounding, saturate=False), x, x)
        x = oracles.random_bit_patterns(100_000, torch.float64)
        assert_same_values(quantize(x, fp64, rounding=rounding, saturate=False), x, x)
        expected = oracles.round_with_gfloat(x, fp32, rounding)
        assert_same_values(quantize(x, fp32, rounding=rounding), expected, x)
