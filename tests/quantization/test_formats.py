import dataclasses
import math

import gfloat.formats
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given

from altgrad.quantization import (
    BF16,
    E0M7,
    E1M6,
    E2M1,
    E2M3,
    E2M5,
    E3M2,
    E3M4,
    E4M3,
    E4M3_IEEE,
    E4M3B11FNUZ,
    E4M3FNUZ,
    E5M2,
    E5M2FNUZ,
    E6M1,
    E7M0,
    FORMATS,
    FP16,
    FloatFormat,
)
from tests import oracles
from tests.strategies import formats, thorough

EVERY_FORMAT = [pytest.param(format, id=name) for name, format in FORMATS.items()]
WITH_ML_DTYPE = [
    pytest.param(format, id=name)
    for name, format in FORMATS.items()
    if oracles.ml_dtypes_of(format) is not None
]


# --- the named formats ---------------------------------------------------------------------------

# E, M, bias, NaN codes at the top, inf, −0
FIELDS = {
    "e0m7": (E0M7, 0, 7, 1, 0, False, True),
    "e1m6": (E1M6, 1, 6, 0, 0, False, True),
    "e2m5": (E2M5, 2, 5, 1, 0, False, True),
    "e3m4": (E3M4, 3, 4, 3, 15, True, True),
    "e4m3fn": (E4M3, 4, 3, 7, 1, False, True),
    "e5m2": (E5M2, 5, 2, 15, 3, True, True),
    "e6m1": (E6M1, 6, 1, 31, 0, False, True),
    "e7m0": (E7M0, 7, 0, 63, 0, False, True),
    "e4m3_ieee": (E4M3_IEEE, 4, 3, 7, 7, True, True),
    "e4m3fnuz": (E4M3FNUZ, 4, 3, 8, 0, False, False),
    "e4m3b11fnuz": (E4M3B11FNUZ, 4, 3, 11, 0, False, False),
    "e5m2fnuz": (E5M2FNUZ, 5, 2, 16, 0, False, False),
    "e2m1": (E2M1, 2, 1, 1, 0, False, True),
    "e2m3": (E2M3, 2, 3, 1, 0, False, True),
    "e3m2": (E3M2, 3, 2, 3, 0, False, True),
    "fp16": (FP16, 5, 10, 15, 1023, True, True),
    "bf16": (BF16, 8, 7, 127, 127, True, True),
}


def test_every_named_format_is_listed():
    assert list(FORMATS) == list(FIELDS)
    assert all(format.name == name for name, format in FORMATS.items())
    with pytest.raises(TypeError):
        FORMATS["mine"] = E4M3


@pytest.mark.parametrize("name", FIELDS)
def test_fields(name):
    format, exponent_bits, mantissa_bits, bias, num_high_nans, has_inf, has_nz = FIELDS[name]
    assert FORMATS[name] is format
    expected = (name, exponent_bits, mantissa_bits, bias, num_high_nans, has_inf, has_nz, True)
    assert tuple(getattr(format, f.name) for f in dataclasses.fields(format) if f.init) == expected


# max, smallest normal, smallest positive, of the formats that are AltGrad's own
RANGES = {
    "e0m7": (127 / 128, 1.0, 2**-7),
    "e1m6": (127 / 32, 2.0, 2**-5),
    "e2m5": (7.875, 1.0, 2**-5),
    "e6m1": (1.5 * 2**32, 2**-30, 2**-31),
    "e7m0": (2**64, 2**-62, 2**-62),
}


@pytest.mark.parametrize("name", RANGES)
def test_range_of_own_formats(name):
    format = FORMATS[name]
    actual = (format.max, format.smallest_normal, format.smallest_subnormal)
    assert actual == RANGES[name]


@pytest.mark.parametrize(
    ("format", "largest"),
    [(E5M2, 57344), (E4M3, 448), (E3M4, 15.5), (E4M3_IEEE, 240), (E2M1, 6), (FP16, 65504)],
    ids=str,
)
def test_largest_values_that_everyone_knows(format, largest):
    assert format.max == largest


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


@pytest.mark.parametrize(
    ("format", "theirs"),
    [
        (E4M3, gfloat.formats.format_info_ocp_e4m3),
        (E5M2, gfloat.formats.format_info_ocp_e5m2),
        (E2M1, gfloat.formats.format_info_ocp_e2m1),
        (E2M3, gfloat.formats.format_info_ocp_e2m3),
        (E3M2, gfloat.formats.format_info_ocp_e3m2),
        (FP16, gfloat.formats.format_info_binary16),
        (BF16, gfloat.formats.format_info_bfloat16),
    ],
    ids=str,
)
def test_fields_agree_with_gfloats_own_formats(format, theirs):
    ours = oracles.gfloat_info(format)
    for field in ("k", "precision", "bias", "domain", "has_nz", "num_high_nans", "has_subnormals"):
        assert getattr(ours, field) == getattr(theirs, field), field


def test_torch_dtype():
    expected = {
        E4M3: torch.float8_e4m3fn,
        E5M2: torch.float8_e5m2,
        E4M3FNUZ: torch.float8_e4m3fnuz,
        E5M2FNUZ: torch.float8_e5m2fnuz,
        FP16: torch.float16,
        BF16: torch.bfloat16,
    }
    assert {f: f.torch_dtype for f in FORMATS.values() if f.torch_dtype} == expected


def test_torch_dtype_looks_at_the_codes_and_not_at_the_name():
    assert dataclasses.replace(BF16, name="mine").torch_dtype is torch.bfloat16
    assert dataclasses.replace(BF16, has_inf=False).torch_dtype is None
    assert dataclasses.replace(E4M3, bias=8).torch_dtype is None


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
def test_values_of_any_format(format):
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


def test_values_without_subnormals():
    format = FloatFormat("ftz", 2, 2, 1, has_subnormals=False)
    positive = [1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7]
    assert format.values()[12:].tolist() == [0, *positive]


def test_values_of_a_wide_format_is_an_error():
    fp32 = FloatFormat("fp32", 8, 23, 127, num_high_nans=2**23 - 1, has_inf=True)
    with pytest.raises(ValueError, match=r"fp32 has 32 bits .* at most 24"):
        fp32.values()


def test_e0m7_grid_is_k_over_128():
    assert E0M7.values().tolist() == [k / 128 for k in range(-127, 128)]
    assert (E0M7.emin, E0M7.emax) == (0, 0)


def test_e1m6_is_four_times_e0m7():
    assert E1M6.values().tolist() == (4 * E0M7.values()).tolist()
