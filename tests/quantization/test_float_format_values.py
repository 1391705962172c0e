"""Properties derived from the fields of a format: its range and its values."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given

from altgrad.quantization import E2M1, FORMATS, FloatFormat
from tests import oracles
from tests.quantization.matrix import EVERY_FORMAT, WITH_ML_DTYPE
from tests.strategies import formats, thorough

# --- the range -----------------------------------------------------------------------------------


@pytest.mark.parametrize("format", WITH_ML_DTYPE)
def test_derived_properties_agree_with_ml_dtypes(format):
    info = ml_dtypes.finfo(oracles.ml_dtypes_of(format))
    assert format.bits == info.bits
    assert (format.exponent_bits, format.mantissa_bits) == (info.nexp, info.nmant)
    assert format.precision == info.nmant + 1
    assert format.emin == info.minexp
    assert format.emax == math.frexp(float(info.max))[1] - 1
    assert format.max == float(info.max)
    assert format.eps == float(info.eps)
    assert format.smallest_normal == float(info.smallest_normal)
    assert format.smallest_subnormal == float(info.smallest_subnormal)


@pytest.mark.parametrize("format", [f for f in FORMATS.values() if f.torch_dtype], ids=str)
def test_derived_properties_agree_with_torch(format):
    info = torch.finfo(format.torch_dtype)
    assert format.bits == info.bits
    assert format.max == info.max
    if format.has_negative_zero:  # torch halves the eps of the fnuz dtypes; ml_dtypes does not
        assert format.eps == info.eps
    assert format.smallest_normal == info.smallest_normal


@pytest.mark.parametrize("format", EVERY_FORMAT)
def test_derived_properties_agree_with_gfloat(format):
    info = oracles.gfloat_info(format)
    assert format.bits == info.bits
    assert format.precision == info.precision
    assert format.max == info.max
    assert format.eps == info.eps
    assert format.smallest_normal == info.smallest_normal
    assert format.smallest_subnormal == info.smallest_subnormal
    assert format.has_nan == (info.num_nans > 0)
    if format.exponent_bits > 0:  # gfloat warns that its emax is another thing for E = 0
        assert format.emax == info.emax


# --- values() ------------------------------------------------------------------------------------


def finite_and_distinct(decoded):
    return torch.from_numpy(np.unique([value + 0.0 for value in decoded if math.isfinite(value)]))


@pytest.mark.parametrize("format", WITH_ML_DTYPE)
def test_values_are_all_codes_decoded_by_ml_dtypes(format):
    expected = finite_and_distinct(oracles.decode_with_ml_dtypes(format))
    oracles.assert_same_values(format.values(), expected)


@pytest.mark.parametrize("format", EVERY_FORMAT)
def test_values_are_all_codes_decoded_by_gfloat(format):
    expected = finite_and_distinct(oracles.decode_with_gfloat(format))
    oracles.assert_same_values(format.values(), expected)


@thorough
@given(format=formats(max_bits=11))
def test_values_of_any_format_equal_the_definition(format):
    values = format.values()
    positive = [float(value) for _, value in oracles.exact_magnitudes(format)[1:-1]]
    assert values.tolist() == [-value for value in reversed(positive)] + [0.0, *positive]
    assert (values.diff() > 0).all()
    assert not values.abs().min().signbit()
    assert (values.dtype, values.device.type) == (torch.float64, "cpu")
    assert values[-1] == format.max
    assert values[values > 0][0] == format.smallest_subnormal
    assert format.smallest_normal == 2.0 ** (1 - format.bias)


def test_values_are_a_fresh_tensor():
    E2M1.values().zero_()
    assert E2M1.values().tolist()[-3:] == [3, 4, 6]


def test_values_without_subnormals_skip_exponent_field_zero():
    format = FloatFormat("ftz", 2, 2, 1, has_subnormals=False)
    positive = [1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7]
    assert format.values()[12:].tolist() == [0, *positive]


def test_values_of_a_wide_format_is_an_error():
    fp32 = FloatFormat("fp32", 8, 23, 127, num_high_nans=2**23 - 1, has_inf=True)
    with pytest.raises(ValueError, match=r"fp32 has 32 bits.* at most 24 bits"):
        fp32.values()
