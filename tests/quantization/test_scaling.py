import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, strategies as st

from altgrad.quantization import E0M7, E1M6, E4M3, E5M2, FORMATS, compute_scale, quantize
from tests import oracles, strategies
from tests.oracles import assert_same_values
from tests.quantization.matrix import EVERY_FORMAT

every_rule = pytest.mark.parametrize("power_of_two", [True, "floor", False], ids=str)
SCALINGS = ["tensor", "channel", ("block", 4)]


def exact_exponent(amax, format, power_of_two=True, limits=(-126, 127)):
    """Return k of the scale 2**k, within the limits.

    k is the smallest exponent with amax <= max · 2**k. By OCP's rule it is the difference of the
    exponents of amax and max.
    """
    amax, largest = Fraction(amax), Fraction(format.max)
    if power_of_two == "floor":
        exponent = oracles.floor_log2(amax) - oracles.floor_log2(largest)
    else:
        exponent = -oracles.floor_log2(largest / amax)  # ceil(log2(amax / largest))
    return min(max(exponent, limits[0]), limits[1])


def random_numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- the value of a scale ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", EVERY_FORMAT)
def test_amax_does_not_clip_and_clips_under_half_the_scale(format, dtype):
    x = oracles.every_value_of(dtype)
    x = x[x.isfinite() & (x != 0)]
    scale = compute_scale(x[:, None], format, scaling="channel").double()[:, 0]
    magnitude = x.double().abs()
    assert (torch.frexp(scale).mantissa == 0.5).all()
    assert (magnitude <= scale * format.max)[scale < 2.0**127].all()
    assert (magnitude > scale / 2 * format.max)[scale > 2.0**-126].all()
    assert (scale >= 2.0**-126).all()


@pytest.mark.parametrize("exponent", [-120, -30, -1, 0, 1, 17, 100])
@pytest.mark.parametrize("format", EVERY_FORMAT)
def test_amax_one_float_above_the_top_rounds_up(format, exponent):
    """amax / max would round to 1 and lose the excess."""
    exponent = min(exponent, 126 - format.emax)
    exponent = max(exponent, -125 - format.emax, -125)
    for dtype in (torch.float32, torch.float64):
        top = torch.tensor(format.max * 2.0**exponent, dtype=dtype)
        above = top.nextafter(torch.tensor(math.inf, dtype=dtype))
        below = top.nextafter(torch.tensor(0, dtype=dtype))
        assert compute_scale(top, format) == 2.0**exponent
        assert compute_scale(below, format) == 2.0**exponent
        assert compute_scale(above, format) == 2.0 ** (exponent + 1)


@pytest.mark.parametrize("power_of_two", [True, "floor"], ids=str)
@pytest.mark.parametrize("format", EVERY_FORMAT)
def test_powers_of_two_equal_exact_fractions(format, power_of_two):
    x = oracles.random_bit_patterns(2000).abs()
    powers = torch.tensor([2.0**exponent for exponent in range(-149, 128)])
    x = torch.cat([x[x.isfinite() & (x > 0)], powers, torch.tensor([torch.finfo().max])])
    expected = [2.0 ** exact_exponent(amax, format, power_of_two) for amax in x.tolist()]
    actual = compute_scale(x[:, None], format, scaling="channel", power_of_two=power_of_two)
    assert_same_values(actual[:, 0], torch.tensor(expected), x)


@pytest.mark.parametrize("format", EVERY_FORMAT)
def test_power_of_two_false_gives_the_quotient(format):
    x = random_numbers(500).exp() * 1024  # bf16's quotients would else end at 2**-126
    actual = compute_scale(x[:, None], format, scaling="channel", power_of_two=False)[:, 0]
    quotient = [Fraction(amax) / Fraction(format.max) for amax in x.tolist()]
    spacing = actual.nextafter(torch.tensor(math.inf)) - actual
    for scale, exact, ulp in zip(actual.tolist(), quotient, spacing.tolist(), strict=True):
        assert abs(Fraction(scale) - exact) <= Fraction(ulp) / 2  # rounded once


@strategies.thorough
@given(
    amax=st.floats(min_value=1e-300, max_value=1e300),
    format=strategies.formats(max_bits=12),
)
def test_any_format_and_any_float64_equal_exact_fractions(amax, format):
    scale = compute_scale(torch.tensor(amax, dtype=torch.float64), format)
    assert scale.dtype is torch.float64
    assert scale.item() == 2.0 ** exact_exponent(amax, format, limits=(-1022, 1023))


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("format", EVERY_FORMAT)
def test_rounding_up_never_saturates(format, scaling):
    for seed in range(20):
        x = random_numbers(8, 12, seed=seed) * 10.0 ** (seed - 10)
        scale = compute_scale(x, format, scaling=scaling)
        limit = scale * format.max
        assert (x.abs() <= limit).all()
        for rounding in oracles.DETERMINISTIC:
            free = quantize(x, format, scale, rounding=rounding, saturate=False)
            assert_same_values(quantize(x, format, scale, rounding=rounding), free)


def test_floor_is_the_rule_of_ocp_and_may_clip():
    x = torch.tensor([1.0, 1.75, 1.99])  # floor(log2) is 0, and 448 has exponent 8
    scale = compute_scale(x, E4M3, power_of_two="floor")
    assert scale == 2.0**-8
    assert quantize(x, E4M3, scale).tolist() == [1, 1.75, 1.75]
    assert compute_scale(x, E4M3) == 2.0**-7


@pytest.mark.parametrize(
    ("format", "emax"), [("e4m3fn", 8), ("e5m2", 15), ("e2m3", 2), ("e3m2", 4), ("e2m1", 2)]
)
def test_floor_uses_the_exponents_of_the_mx_specification(format, emax):
    assert compute_scale(torch.tensor(1.5), format, power_of_two="floor") == 2.0**-emax


@every_rule
def test_e1m6_and_e0m7_get_the_same_grid(power_of_two):
    for seed in range(10):
        x = random_numbers(3, seed=seed)
        scales = (compute_scale(x, f, power_of_two=power_of_two) for f in (E1M6, E0M7))
        assert next(scales) * 4 == next(scales)


# --- what shares a scale -------------------------------------------------------------------------


@every_rule
def test_tensor_is_one_scale_without_dimensions(power_of_two):
    x = random_numbers(3, 4, 5)
    scale = compute_scale(x, E4M3, power_of_two=power_of_two)
    assert scale.shape == ()
    largest = compute_scale(x.abs().max(), E4M3, power_of_two=power_of_two)
    assert_same_values(scale, largest)


@every_rule
@pytest.mark.parametrize("shape", [(6,), (6, 4), (6, 4, 5), (6, 1)], ids=str)
def test_channel_is_one_scale_per_index_of_dimension_0(shape, power_of_two):
    x = random_numbers(*shape) * 10.0 ** torch.arange(6).view(-1, *[1] * (len(shape) - 1))
    scale = compute_scale(x, E4M3, scaling="channel", power_of_two=power_of_two)
    assert scale.shape == (6, *[1] * (len(shape) - 1))
    alone = [compute_scale(channel, E4M3, power_of_two=power_of_two) for channel in x]
    assert_same_values(scale.flatten(), torch.stack(alone))


@every_rule
@pytest.mark.parametrize("size", [1, 3, 4, 12, 13, 100])
@pytest.mark.parametrize("shape", [(12,), (2, 12), (2, 3, 12)], ids=str)
def test_block_is_one_scale_per_run_of_the_last_dimension(shape, size, power_of_two):
    x = random_numbers(*shape) * 10.0 ** torch.arange(-6, 6)
    scale = compute_scale(x, E4M3, scaling=("block", size), power_of_two=power_of_two)
    assert scale.shape == x.shape
    for row, scales in zip(x.reshape(-1, 12), scale.reshape(-1, 12), strict=True):
        for block, found in zip(row.split(size), scales.split(size), strict=True):
            alone = compute_scale(block, E4M3, power_of_two=power_of_two)
            assert_same_values(found, alone.expand(len(block)))


def test_the_tail_of_a_block_is_padded_with_zeros():
    scale = compute_scale(torch.tensor([448.0, 1, 2, 7 / 128]), E4M3, scaling=("block", 3))
    assert scale.tolist() == [1, 1, 1, 2**-13]


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_scales_broadcast_to_x(scaling):
    for shape in ((), (5,), (3, 7), (2, 3, 7), (0,), (0, 3), (3, 0)):
        x = torch.ones(shape)
        assert quantize(x, E4M3, compute_scale(x, E4M3, scaling=scaling)).shape == x.shape


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_the_layout_of_x_does_not_matter(scaling):
    x = random_numbers(8, 6)
    expected = compute_scale(x.t().contiguous(), E4M3, scaling=scaling)
    assert_same_values(compute_scale(x.t(), E4M3, scaling=scaling), expected)


# --- degenerate inputs ---------------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_zeros_give_a_scale_of_one(scaling, power_of_two):
    x = torch.zeros(3, 8)
    scale = compute_scale(x, E4M3, scaling=scaling, power_of_two=power_of_two)
    assert (scale == 1).all()
    x[1] = 448.0
    scale = compute_scale(x, E5M2, scaling=scaling, power_of_two=power_of_two).expand(3, 8)
    if scaling != "tensor":
        assert (scale[0] == 1).all()
        assert (scale[1] < 1).all()


@every_rule
@pytest.mark.parametrize(
    ("shape", "scaling", "expected"),
    [
        ((0,), "tensor", ()),
        ((0,), "channel", (0,)),
        ((0,), ("block", 4), (0,)),
        ((3, 0), "tensor", ()),
        ((3, 0), "channel", (3, 1)),
        ((3, 0), ("block", 4), (3, 0)),
        ((0, 3), "channel", (0, 1)),
        ((0, 3), ("block", 4), (0, 3)),
    ],
    ids=str,
)
def test_empty_tensors_give_a_scale_of_one(shape, scaling, expected, power_of_two):
    scale = compute_scale(torch.empty(shape), E4M3, scaling=scaling, power_of_two=power_of_two)
    assert_same_values(scale, torch.ones(expected))


@every_rule
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_a_tensor_without_dimensions_is_one_channel_and_one_block(scaling, power_of_two):
    x = torch.tensor(-3.0)
    scale = compute_scale(x, E4M3, scaling=scaling, power_of_two=power_of_two)
    assert_same_values(scale, compute_scale(x[None], E4M3, power_of_two=power_of_two))


@every_rule
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_nan_and_infinity_are_ignored(scaling, power_of_two):
    x = random_numbers(3, 8)
    broken = x.clone()
    broken[:, 2], x[:, 2] = math.nan, 0
    broken[:, 3], x[:, 3] = -math.inf, 0
    broken[2], x[2] = math.inf, 0
    options = {"scaling": scaling, "power_of_two": power_of_two}
    assert_same_values(compute_scale(broken, E4M3, **options), compute_scale(x, E4M3, **options))


@every_rule
def test_a_scale_and_its_reciprocal_stay_in_float32(power_of_two):
    ends = torch.tensor([2.0**-149, torch.finfo().max])
    for format in FORMATS.values():
        scale = compute_scale(ends, format, scaling=("block", 1), power_of_two=power_of_two)
        assert ((scale >= 2.0**-126) & (scale <= 2.0**127)).all()


# --- dtypes and errors ---------------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_gives_the_float32_scale_of_its_values(dtype, scaling, power_of_two):
    x = random_numbers(3, 8).to(dtype)
    options = {"scaling": scaling, "power_of_two": power_of_two}
    scale = compute_scale(x, E4M3, **options)
    assert scale.dtype is torch.float32
    assert_same_values(scale, compute_scale(x.float(), E4M3, **options))


@every_rule
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_float64_gives_float64(scaling, power_of_two):
    x = random_numbers(3, 8).double() + 2.0**-40
    scale = compute_scale(x, E4M3, scaling=scaling, power_of_two=power_of_two)
    assert scale.dtype is torch.float64


@every_rule
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_x_is_not_changed_and_gets_no_gradient(scaling, power_of_two):
    x = random_numbers(3, 8).index_fill(1, torch.tensor([1]), math.nan).requires_grad_()
    before = x.detach().clone()
    assert not compute_scale(x, E4M3, scaling=scaling, power_of_two=power_of_two).requires_grad
    assert_same_values(x, before)


@pytest.mark.parametrize(
    "scaling",
    [
        *("row", "Tensor", "block", None, 32, ("block",), ("blocks", 32), ("tensor", 1)),
        *(("block", size) for size in (0, -1, 2.5, "32")),
        ("block", 32, 32),
    ],
    ids=str,
)
def test_the_error_for_an_unknown_scaling_lists_what_is_allowed(scaling):
    for shape in ((), (4, 8), (0,)):
        with pytest.raises(ValueError, match=r"scaling=.*'tensor', 'channel' or \('block', size\)"):
            compute_scale(torch.ones(shape), E4M3, scaling=scaling)


@pytest.mark.parametrize("power_of_two", ["ceil", "Floor", None, 0, 1, 1.0, 2], ids=repr)
def test_an_unknown_power_of_two_is_refused(power_of_two):
    with pytest.raises(ValueError, match=r"power_of_two=.*expected True, False or 'floor'"):
        compute_scale(torch.ones(3), E4M3, power_of_two=power_of_two)


def test_wrong_x_and_format_are_refused():
    with pytest.raises(TypeError, match=r"x has dtype torch\.int64"):
        compute_scale(torch.ones(3).long(), E4M3)
    with pytest.raises(TypeError, match=r"x: expected a torch\.Tensor"):
        compute_scale([1.0], E4M3)
    with pytest.raises(ValueError, match="unknown format 'e4m9'"):
        compute_scale(torch.ones(3), "e4m9")


def test_scales_of_float64_use_the_range_of_float64():
    """1e300 would clip at 7.6e40 under a scale that float32 can hold."""
    x = torch.tensor([1e300, -1e-300], dtype=torch.float64)
    scale = compute_scale(x[:, None], E4M3, scaling="channel")[:, 0]
    assert scale.tolist() == [2.0 ** math.ceil(math.log2(v / 448)) for v in (1e300, 1e-300)]
    assert (quantize(x, E4M3, scale) / x).sub(1).abs().max() <= 2**-4


def test_a_block_longer_than_the_dimension_needs_no_padding():
    x = random_numbers(2, 5)
    huge = compute_scale(x, E4M3, scaling=("block", 10**12))
    assert_same_values(huge, compute_scale(x, E4M3, scaling=("block", 5)))
