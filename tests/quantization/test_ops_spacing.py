import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, strategies as st

from altgrad.quantization import BF16, E0M7, E4M3, FORMATS, FP16, FloatFormat, quantize, spacing
from tests import oracles, strategies
from tests.oracles import assert_same_values
from tests.quantization.matrix import EVERY_FORMAT

SMALL_FORMATS = [pytest.param(f, id=name) for name, f in FORMATS.items() if f.bits <= 8]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def spacing_by_frexp(x, format, scale=1.0):
    """Return the spacing by its definition in float64, where frexp and powers of two are exact."""
    y = (x.double() / scale).abs()
    exponent = torch.frexp(y).exponent - 1
    exponent = torch.where(y == 0, format.emin, exponent)
    exponent = torch.where(y.isinf(), format.emax, exponent).clamp(format.emin, format.emax)
    gap = torch.ldexp(torch.ones_like(y), exponent - format.mantissa_bits) * scale
    return torch.where(y.isnan(), y, gap)


@pytest.mark.parametrize("format", EVERY_FORMAT)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_precision_value_equals_the_definition(dtype, format):
    x = oracles.every_value_of(dtype)
    assert_same_values(spacing(x, format), spacing_by_frexp(x, format), x)


@pytest.mark.parametrize("format", EVERY_FORMAT)
def test_random_and_critical_inputs_equal_the_definition(format):
    x = torch.cat([oracles.critical_inputs(format), oracles.random_bit_patterns(100_000).double()])
    assert_same_values(spacing(x, format), spacing_by_frexp(x, format), x)
    x = x.float()
    assert_same_values(spacing(x, format), spacing_by_frexp(x, format), x)


@pytest.mark.parametrize("format", EVERY_FORMAT)
@pytest.mark.parametrize("exponent", [-140, -120, -20, 20, 100, 120])
def test_power_of_two_scales_multiply_the_spacing(exponent, format):
    scale = 2.0**exponent
    near = oracles.critical_inputs(format) if format.bits <= 8 else torch.empty(0).double()
    x = torch.cat([(near * scale).float(), oracles.random_bit_patterns(20_000)])
    expected = spacing_by_frexp(x, format, scale).float()  # float32 may not hold the largest
    assert_same_values(spacing(x, format, scale), expected, x)
    assert_same_values(spacing(x, format, torch.tensor(scale)), expected, x)


@pytest.mark.parametrize("format", SMALL_FORMATS)
def test_spacing_equals_the_difference_of_neighbouring_values(format):
    values = format.values()
    positive = values[values >= 0]
    gaps = positive.diff()
    below_top = positive[:-1]
    for x in (below_top, -below_top, below_top + gaps / 3, below_top + gaps * 0.999):
        assert_same_values(spacing(x, format), gaps, x)
    top = positive[-1:]
    for x in (top, -top, top * 1.5, top * 1e6, top * math.inf):
        assert_same_values(spacing(x, format), gaps[-1:] if format.mantissa_bits else top)


@strategies.thorough
@given(st.data(), strategies.formats(), strategies.power_of_two_scales())
def test_spacing_equals_its_definition_in_exact_fractions_for_any_format(data, format, scale):
    x = data.draw(strategies.tensors(format, scale))
    actual = spacing(x, format, scale)
    expected = [float(oracles.exact_spacing(value, format, scale)) for value in x.tolist()]
    assert_same_values(actual, torch.tensor(expected, dtype=torch.float64), x)


@strategies.thorough
@given(st.data(), strategies.formats(max_bits=9), strategies.power_of_two_scales())
def test_any_small_format_equals_the_distance_of_neighbours(data, format, scale):
    """Check values inside a binade; a power of two belongs to the binade above it."""
    top = format.max * scale
    x = data.draw(strategies.tensors(format, scale)).abs()
    x = x[x < top]
    for value, gap in zip(x.tolist(), spacing(x, format, scale).tolist(), strict=True):
        low, high = oracles.neighbours(value, format, scale)
        if low == high:
            _, high = oracles.neighbours(math.nextafter(value, math.inf), format, scale)
        assert Fraction(gap) == high - low


def test_zero_infinity_and_nan_give_first_and_last_spacing_and_nan():
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])
    assert_same_values(spacing(x, E4M3), torch.tensor([2**-9, 2**-9, 32, 32, math.nan]))
    assert_same_values(spacing(x, E4M3, 4.0), torch.tensor([2**-7, 2**-7, 128, 128, math.nan]), x)


@pytest.mark.parametrize("format", EVERY_FORMAT)
def test_at_zero_it_is_the_smallest_subnormal(format):
    assert spacing(torch.zeros(1).double(), format).item() == format.smallest_subnormal


def test_without_subnormals_the_spacing_around_zero_is_the_smallest_normal():
    format = FloatFormat("ftz", 3, 2, 3, has_subnormals=False)
    x = torch.tensor([0.0, 1e-30, 0.24, -0.24, 0.25, 0.3, 0.5])
    assert spacing(x, format).tolist() == [0.25, 0.25, 0.25, 0.25, 2**-4, 2**-4, 2**-3]
    assert spacing(x * 2, format, 2.0).tolist() == [0.5, 0.5, 0.5, 0.5, 2**-3, 2**-3, 2**-2]


def test_e0m7_is_the_same_everywhere():
    x = oracles.random_bit_patterns(10_000)
    x = x[~x.isnan()]
    assert (spacing(x, E0M7) == 2**-7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.5, torch.tensor(0.5), torch.tensor(0.5).double()])
@pytest.mark.parametrize("format", [E4M3, BF16, FP16, FloatFormat("e9m2", 9, 2, 255)], ids=str)
def test_result_is_float32_or_float64_for_float64(format, scale, dtype):
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert spacing(torch.ones(3, dtype=dtype), format, scale).dtype is expected


def test_a_scale_that_is_not_a_power_of_two_multiplies_the_spacing():
    x = torch.tensor([0.3, 0.31, 100.0])
    expected = spacing(x / 0.3, E4M3) * torch.tensor(0.3)
    assert_same_values(spacing(x, E4M3, 0.3), expected, x)


@pytest.mark.parametrize("shape", [(), (4,), (3, 1), (2, 3, 4)], ids=str)
def test_scales_broadcast(shape):
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    scale = 2.0 ** torch.randint(-4, 4, shape, generator=torch.Generator().manual_seed(1))
    expected = torch.stack(
        [
            spacing(value, E4M3, factor.item())
            for value, factor in zip(x.flatten(), scale.expand(x.shape).flatten(), strict=True)
        ]
    )
    assert_same_values(spacing(x, E4M3, scale).flatten(), expected, x.flatten())


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)], ids=str)
def test_scalars_and_empty_tensors_keep_their_shape(shape):
    assert_same_values(spacing(torch.ones(shape), E4M3), torch.full(shape, 0.125))


def test_the_layout_of_x_does_not_matter():
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    assert_same_values(spacing(x.t(), E4M3), spacing(x.t().contiguous(), E4M3))
    assert_same_values(spacing(x[:, :1].expand(6, 10), E4M3)[:, 3], spacing(x[:, 0], E4M3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_x_is_not_changed_and_gets_no_gradient(dtype):
    x = torch.tensor([1.0, math.nan, 1e4], dtype=dtype, requires_grad=True)
    before = x.detach().clone()
    for format in FORMATS.values():
        for scale in (1.0, torch.tensor(2.0)):
            assert not spacing(x, format, scale).requires_grad
    assert_same_values(x, before)


def test_errors_are_those_of_quantize():
    for function in (quantize, spacing):
        with pytest.raises(TypeError, match=r"x has dtype torch\.int64"):
            function(torch.ones(3).long(), E4M3)
        with pytest.raises(ValueError, match="unknown format"):
            function(torch.ones(3), "e4m9")
        with pytest.raises(ValueError, match="does not broadcast"):
            function(torch.ones(3), E4M3, torch.ones(2))
        with pytest.raises(ValueError, match="expected a positive finite number"):
            function(torch.ones(3), E4M3, 0.0)
        with pytest.raises(ValueError, match="exceeds float64"):
            function(torch.ones(3), FloatFormat("binary128", 15, 112, 16383))
