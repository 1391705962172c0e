"""Errors seen in public implementations of rounding to small formats, one test each."""

import math

import pytest
import torch

from altgrad.quantization import (
    BF16,
    E0M7,
    E1M6,
    E4M3,
    E5M2,
    E6M1,
    E7M0,
    FORMATS,
    FP16,
    FloatFormat,
    compute_scale,
    quantize,
    spacing,
)
from tests import oracles
from tests.oracles import assert_same_values
from tests.quantization.matrix import EVERY_FORMAT


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


# --- spacing -------------------------------------------------------------------------------------


def test_spacing_is_right_just_below_powers_of_two():
    """floor(log2(x)) in float32 is one too high for up to 44 neighbours of a power of two."""
    powers = torch.tensor([2.0**exponent for exponent in range(-125, 128)])
    below = powers
    for _ in range(50):
        below = below.nextafter(torch.tensor(0.0))
        assert_same_values(spacing(below, BF16), powers / 2 / 128, below)
    assert_same_values(spacing(powers, BF16), powers / 128, powers)


def test_spacing_of_bfloat16_tensors_is_right():
    """log2 of a bfloat16 tensor rounds to bfloat16: wrong for a fifth of all normal numbers."""
    x = oracles.every_value_of(torch.bfloat16)
    x = x[x.isfinite() & (x.abs() >= 2.0**-126)]
    exact = torch.ldexp(torch.ones(len(x)).double(), x.double().frexp().exponent - 1 - 7)
    assert_same_values(spacing(x, BF16), exact, x)


def test_spacing_does_not_shrink_below_the_smallest_normal():
    x = torch.tensor([2.0**-6, 2.0**-7, 2.0**-9, 1e-20, 0.0])
    assert spacing(x, E4M3).tolist() == [2**-9] * 5


def test_spacing_is_multiplied_by_the_scale():
    assert spacing(torch.tensor([1.0, 100.0]), E4M3, 64.0).tolist() == [2**-3, 8]


def test_bf16_differs_from_e0m7():
    """Both have 7 mantissa bits, so that `mantissa_bits == 7` does not distinguish them."""
    x = torch.tensor([100.0, 0.3])
    assert spacing(x, BF16).tolist() == [0.5, 2**-9]
    assert spacing(x, E0M7).tolist() == [2**-7, 2**-7]
    assert quantize(x, BF16).tolist() == [100, 0.30078125]
    assert quantize(x, E0M7).tolist() == [127 / 128, 0.296875]


def test_e1m6_and_e0m7_are_one_format_under_amax_scales():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for factor in (1.0, 1e-8, 1e8):
        scales = compute_scale(x * factor, E1M6), compute_scale(x * factor, E0M7)
        assert scales[1] == 4 * scales[0]
        q = quantize(x * factor, E1M6, scales[0])
        assert_same_values(q, quantize(x * factor, E0M7, scales[1]), x * factor)


# --- the ends of the range -----------------------------------------------------------------------


@pytest.mark.parametrize("saturate", [True, False])
def test_e4m3_max_is_448(saturate):
    x = torch.tensor([447.0, 448.0, 464.0, -464.0])  # 464 is the tie with 480, which is NaN
    assert quantize(x, E4M3, saturate=saturate).tolist() == [448, 448, 448, -448]
    beyond = quantize(torch.tensor([465.0, 480.0]), E4M3, saturate=saturate)
    assert_same_values(beyond, torch.full((2,), 448.0 if saturate else math.nan))


def test_256_to_448_do_not_become_zero_in_e4m3():
    x = torch.arange(256.0, 449.0, 32)
    assert_same_values(quantize(x, E4M3), x)


@pytest.mark.parametrize("exponent", [4, 10, 38])
def test_overflow_does_not_depend_on_the_torch_version(exponent):
    x = torch.tensor([10.0**exponent, math.inf]).clamp(min=60_000)
    x[0] *= 2 if exponent == 4 else 1
    assert quantize(x, E4M3).tolist() == [448, 448]
    assert quantize(x, E5M2).tolist() == [57344, 57344]
    assert quantize(x, E4M3, saturate=False).isnan().all()
    assert quantize(x, E5M2, saturate=False).tolist() == [math.inf, math.inf]


def test_the_largest_subnormal_carries_into_the_normal_numbers():
    """0.01465 lies just above the last midpoint of the subnormals of e4m3."""
    assert quantize(float64(0.01465, -0.01465), E4M3).tolist() == [0.015625, -0.015625]


def test_rounding_carries_into_every_next_binade():
    for format in (E4M3, E5M2, BF16, FP16):
        lowest, highest = max(format.emin, -100), min(format.emax, 100)
        powers = float64(*(2.0**exponent for exponent in range(lowest, highest)))
        just_below = powers * (1 - 2.0**-40)
        assert_same_values(quantize(just_below, format), powers, just_below)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_half_the_smallest_subnormal_is_the_last_value_to_round_to_zero(dtype):
    half = torch.tensor([2.0**-10], dtype=dtype)
    zero = torch.zeros(1, dtype=dtype)
    one = torch.ones(1, dtype=dtype)
    for x, expected in ((half.nextafter(zero), 0), (half, 0), (half.nextafter(one), 2**-9)):
        assert quantize(x, E4M3).item() == expected


def test_ties_go_to_even_and_not_away_from_zero():
    x = torch.tensor([1.0625, 1.1875, -1.0625, -1.1875, 17.0, 19.0])
    assert quantize(x, E4M3).tolist() == [1, 1.25, -1, -1.25, 16, 20]


def test_ties_with_m0_go_to_the_even_code():
    assert quantize(torch.tensor([1.5, 3.0]), E7M0).tolist() == [2, 2]


# --- zeros and NaN -------------------------------------------------------------------------------


@pytest.mark.parametrize("format", EVERY_FORMAT)
@pytest.mark.parametrize("scale", [1.0, 2.0**-20], ids=["1", "2^-20"])
def test_negative_zero_is_kept(scale, format):
    """A small negative number becomes −0, too; the fnuz formats have only 0."""
    tiny = format.smallest_subnormal * scale / 4
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([-0.0, -tiny, 0.0, tiny], dtype=dtype)
        q = quantize(x, format, scale)
        assert (q == 0).all()
        kept = format.has_negative_zero
        assert q.signbit().tolist() == [kept, kept, False, False]


@pytest.mark.parametrize("format", EVERY_FORMAT)
def test_nan_is_not_lost_by_clamping(format):
    x = torch.tensor([math.nan, -math.nan])
    for rounding in oracles.DETERMINISTIC:
        for saturate in (True, False):
            assert quantize(x, format, rounding=rounding, saturate=saturate).isnan().all()


# --- exactness across dtypes ---------------------------------------------------------------------


def test_float64_is_not_rounded_twice():
    x = float64(1 + 2**-4 + 2**-30, -1 - 2**-4 - 2**-30, 1 + 2**-4 - 2**-30, 1 + 2**-4)
    assert quantize(x, E4M3).tolist() == [1.125, -1.125, 1.0, 1.0]
    assert quantize(x, E4M3, 0.25).tolist() == [1.125, -1.125, 1.0, 1.0]
    assert quantize(x.float(), E4M3).tolist() == [1.0, -1.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_bf16_subnormals_are_rounded_right(dtype):
    """Other implementations overflow in Python arithmetic, or let p / 2**M underflow."""
    x = torch.arange(0, 2**7 * 3, dtype=torch.int16).view(torch.bfloat16).to(dtype)
    assert_same_values(quantize(x, BF16), x, x)
    assert (spacing(x, BF16).double() == 2.0**-133)[: 2**7 * 2].all()
    if dtype != torch.bfloat16:
        between = x + 2.0**-135
        assert_same_values(quantize(between, BF16), x, between)
        assert_same_values(quantize(between, BF16, rounding="up")[:-1], x[1:], between[:-1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_inputs_keep_all_their_elements(dtype):
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    for format in FORMATS.values():
        q = quantize(x, format)
        assert q.shape == x.shape
        assert_same_values(q, quantize(x.float(), format), x.flatten())


@pytest.mark.parametrize(
    ("dtype", "format", "x", "expected"),
    [
        (torch.bfloat16, FP16, 1e30, 65504),  # as bfloat16 it would be 65536
        (torch.float16, E6M1, math.inf, 1.5 * 2**32),  # as float16 it would be inf
        (torch.float16, BF16, math.inf, 2.0**128 - 2.0**120),
        (torch.float16, E7M0, math.inf, 2.0**64),
        (torch.bfloat16, FP16, 2.0**-24, 2.0**-24),
    ],
    ids=["FP16", "E6M1", "BF16", "E7M0", "FP16 subnormal"],
)
def test_the_dtype_of_the_result_holds_the_grid(dtype, format, x, expected):
    q = quantize(torch.tensor([x], dtype=dtype), format)
    assert q.dtype is torch.float32
    assert q.item() == expected


@pytest.mark.parametrize("format", EVERY_FORMAT)
def test_every_result_is_on_the_grid(format):
    grid = format.values()
    for dtype in (torch.float16, torch.bfloat16):
        x = oracles.every_value_of(dtype)
        for rounding in oracles.DETERMINISTIC:
            q = quantize(x[~x.isnan()], format, rounding=rounding).double()
            nearest = grid[torch.searchsorted(grid, q)]
            assert_same_values(nearest.abs(), q.abs())


def test_formats_wider_than_float32_are_computed_in_float64():
    wide = FloatFormat("e9m2", 9, 2, 255)
    for rounding in oracles.DETERMINISTIC:
        x = torch.cat([oracles.critical_inputs(wide), oracles.random_bit_patterns(10_000).double()])
        assert_same_values(
            quantize(x, wide, rounding=rounding), oracles.round_with_gfloat(x, wide, rounding), x
        )
        x = oracles.random_bit_patterns(10_000)
        expected = oracles.round_with_gfloat(x, wide, rounding).float()
        assert_same_values(quantize(x, wide, rounding=rounding), expected, x)
    assert quantize(torch.tensor([math.inf]), wide).item() == math.inf  # beyond float32


# --- scales and gradients ------------------------------------------------------------------------


def test_x_is_divided_by_the_scale_and_not_multiplied_by_its_reciprocal():
    """Q(x) = s · RN(x / s); other conventions differ if s is not a power of two."""
    scale = torch.tensor(0.3)
    x = torch.arange(1.0, 4000.0) * scale / 32
    x = torch.cat([x, x.nextafter(torch.tensor(math.inf)), x.nextafter(torch.tensor(0.0))])
    expected = oracles.round_with_gfloat((x / scale).double(), E4M3).float() * scale
    other = quantize(x * (1 / scale), E4M3) * scale
    assert not torch.equal(expected, other)
    assert_same_values(quantize(x, E4M3, scale), expected, x)
    assert_same_values(quantize(x, E4M3, scale.item()), expected, x)


@pytest.mark.parametrize("format", EVERY_FORMAT)
@pytest.mark.parametrize("scale", [2.0**-30, 1.0, 2.0**30], ids=["2^-30", "1", "2^30"])
def test_grid_values_never_move_under_a_power_of_two_scale(scale, format):
    grid = format.values() * scale
    for rounding in oracles.DETERMINISTIC:
        assert_same_values(quantize(grid, format, scale, rounding=rounding), grid)


def test_straight_through_gives_max_when_saturating():
    """x + (q − x).detach() gives 0 for 1e30."""
    x = torch.tensor([1e30, -1e30, math.inf, 3.3], requires_grad=True)
    q = quantize(x, E4M3)
    assert q.tolist() == [448, -448, 448, 3.25]
    q.sum().backward()
    assert x.grad.tolist() == [1, 1, 1, 1]


# --- the processor -------------------------------------------------------------------------------


@pytest.fixture
def flush_denormal():
    """Flush subnormal operands and results to zero with torch.set_flush_denormal(True)."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers to zero")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.usefixtures("flush_denormal")
@pytest.mark.parametrize("rounding", oracles.DETERMINISTIC)
def test_flushing_subnormals_to_zero_leaves_normal_numbers_right(rounding):
    # Few elements, so that torch stays in this thread: the setting applies to one thread.
    for start in range(0, 2**16, 2**13):
        x = oracles.every_value_of(torch.bfloat16)[start : start + 2**13].float()
        x = x[x.isfinite() & (x.abs() >= 2.0**-126)]
        assert_same_values(quantize(x, BF16, rounding=rounding), x, x)
        for format in FORMATS.values():
            if format.smallest_subnormal >= 2.0**-126:
                q = quantize(x, format, rounding=rounding)
                assert_same_values(q, oracles.round_with_gfloat(x, format, rounding), x)


@pytest.mark.usefixtures("flush_denormal")
def test_flushing_subnormals_to_zero_makes_no_nan_or_infinity():
    x = oracles.random_bit_patterns(2**13)
    x = x[x.isfinite()]
    for rounding in oracles.DETERMINISTIC:
        for format in FORMATS.values():
            assert quantize(x, format, rounding=rounding).isfinite().all()
    normal = x[x.abs() >= 2.0**-126]
    nearest = oracles.round_with_gfloat(normal, BF16)
    assert_same_values(quantize(normal, BF16), nearest, normal)


def test_flush_denormal_is_restored():
    assert torch.tensor([2.0**-149]).mul(1.0).item() > 0
