"""The named formats: their list, their fields and their spellings."""

import dataclasses

import gfloat.formats
import numpy as np
import pytest
import torch

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
    FP8Format,
    get_format,
)
from tests import oracles
from tests.quantization.matrix import WITH_ML_DTYPE

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
def test_fields_equal_those_of_the_specifications(name):
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
def test_ranges_of_the_finite_eight_bit_formats(name):
    format = FORMATS[name]
    actual = (format.max, format.smallest_normal, format.smallest_subnormal)
    assert actual == RANGES[name]


@pytest.mark.parametrize(
    ("format", "largest"),
    [(E5M2, 57344), (E4M3, 448), (E3M4, 15.5), (E4M3_IEEE, 240), (E2M1, 6), (FP16, 65504)],
    ids=str,
)
def test_largest_values_equal_well_known_ones(format, largest):
    assert format.max == largest


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


def test_e0m7_grid_is_k_over_128():
    assert E0M7.values().tolist() == [k / 128 for k in range(-127, 128)]
    assert (E0M7.emin, E0M7.emax) == (0, 0)


def test_e1m6_is_four_times_e0m7():
    assert E1M6.values().tolist() == (4 * E0M7.values()).tolist()


def test_fp8format_is_floatformat():
    assert FP8Format is FloatFormat


# --- get_format ----------------------------------------------------------------------------------

SPELLINGS = {
    **FORMATS,
    "e4m3": E4M3,
    "float8_e4m3fn": E4M3,
    "float8_e4m3": E4M3_IEEE,
    "float8_e5m2": E5M2,
    "float8_e3m4": E3M4,
    "float8_e4m3fnuz": E4M3FNUZ,
    "float8_e4m3b11fnuz": E4M3B11FNUZ,
    "float8_e5m2fnuz": E5M2FNUZ,
    "float4_e2m1fn": E2M1,
    "float6_e2m3fn": E2M3,
    "float6_e3m2fn": E3M2,
    "float16": FP16,
    "half": FP16,
    "bfloat16": BF16,
    "torch.float8_e4m3fn": E4M3,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("case", [str.lower, str.upper, str.title], ids=["lower", "upper", "title"])
def test_every_spelling_is_found_in_any_case(spelling, case):
    assert get_format(case(spelling)) is SPELLINGS[spelling]


@pytest.mark.parametrize("format", WITH_ML_DTYPE)
def test_a_name_of_ml_dtypes_gives_the_format_of_ml_dtypes(format):
    name = np.dtype(oracles.ml_dtypes_of(format)).name
    assert get_format(name) is format
    assert get_format(name.removeprefix("float4_").removeprefix("float6_")) is format


@pytest.mark.parametrize("format", [f for f in FORMATS.values() if f.torch_dtype], ids=str)
def test_torch_dtypes_are_names_too(format):
    assert get_format(format.torch_dtype) is format


def test_a_format_is_returned_unchanged():
    mine = FloatFormat("e4m3fn", 3, 3, 3)
    assert get_format(mine) is mine


@pytest.mark.parametrize(
    ("name", "near"),
    [("e4m3fm", "e4m3fn"), ("bflot16", "bfloat16"), ("fp8_e5m2", "e5m2"), ("E0M8", "e0m7")],
)
def test_the_error_for_an_unknown_name_lists_near_matches(name, near):
    with pytest.raises(ValueError, match=f"unknown format '{name}'; nearest: .*{near}"):
        get_format(name)


@pytest.mark.parametrize("name", ["", "?", "zzzzzzz"])
def test_the_error_for_a_name_without_near_matches_lists_all(name):
    with pytest.raises(ValueError, match=r"e0m7, e1m6, .*, fp16, bf16"):
        get_format(name)


def test_a_dtype_without_a_format_is_unknown():
    with pytest.raises(ValueError, match=r"unknown format 'torch.float32'"):
        get_format(torch.float32)


@pytest.mark.parametrize("wrong", [None, 7, (4, 3), b"e4m3"], ids=repr)
def test_neither_name_nor_format_is_a_type_error(wrong):
    with pytest.raises(TypeError, match="expected a format's name"):
        get_format(wrong)
