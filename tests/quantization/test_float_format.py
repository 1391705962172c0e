"""`FloatFormat` as an object: valid fields, equality and properties."""

import copy
import dataclasses
import math
import pickle

import pytest
import torch

from altgrad.quantization import (
    BF16,
    E4M3,
    E4M3FNUZ,
    E5M2,
    E5M2FNUZ,
    FORMATS,
    FP16,
    FloatFormat,
    quantize,
)
from tests import oracles

BINARY128 = FloatFormat("binary128", 15, 112, 16383, num_high_nans=2**112 - 1, has_inf=True)


# --- a value object ------------------------------------------------------------------------------


def test_a_format_is_frozen_and_has_slots():
    with pytest.raises(dataclasses.FrozenInstanceError):
        E4M3.bias = 8
    assert not hasattr(E4M3, "__dict__")


def test_formats_are_equal_and_hashed_by_all_fields():
    twin = FloatFormat("e4m3fn", 4, 3, 7, num_high_nans=1)
    assert twin == E4M3
    assert hash(twin) == hash(E4M3)
    assert len({E4M3, twin, dataclasses.replace(E4M3, name="mine")}) == 2
    assert len({E4M3, dataclasses.replace(E4M3, has_subnormals=False)}) == 2


def test_a_format_survives_pickle_and_copy():
    assert pickle.loads(pickle.dumps(E5M2)) == E5M2
    assert copy.deepcopy(E5M2) == E5M2


def test_special_codes_are_keyword_only():
    with pytest.raises(TypeError):
        FloatFormat("mine", 4, 3, 7, 1)


def test_str_is_the_name():
    assert str(E4M3) == f"{E4M3}" == "e4m3fn"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, False),
        ({"num_high_nans": 1}, True),
        ({"has_negative_zero": False}, True),
        ({"has_inf": True}, False),
    ],
    ids=["finite", "high", "negative zero", "inf"],
)
def test_has_nan_is_true_for_high_nans_or_no_negative_zero(fields, expected):
    assert FloatFormat("mine", 4, 3, 7, **fields).has_nan is expected


@pytest.mark.parametrize("format", [*FORMATS.values(), FloatFormat("mine", 3, 2, -9)], ids=str)
def test_from_key_restores_every_field(format):
    assert FloatFormat.from_key(format.key) == format
    assert dataclasses.replace(format, name="other").key != format.key


def test_formats_with_different_fields_have_different_keys():
    every = [*FORMATS.values(), dataclasses.replace(E4M3, has_subnormals=False)]
    assert len({format.key for format in every}) == len(every)


@pytest.mark.parametrize(
    ("name", "dtype", "coarser"),
    [
        ("bf16", torch.float32, True),
        ("bf16", torch.float16, True),
        ("bf16", torch.bfloat16, False),
        ("fp16", torch.bfloat16, False),
        ("e4m3fn", torch.bfloat16, True),
    ],
    ids=str,
)
def test_a_format_is_coarser_than_a_dtype_with_more_significant_bits(name, dtype, coarser):
    assert FORMATS[name].is_coarser_than(dtype) is coarser


def test_formats_with_equal_grids_up_to_a_factor_are_judged_alike():
    """Every number of e0m7 is subnormal: with M = 7 it has a bit less than bf16, as e1m6 has."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert FORMATS["e0m7"].is_coarser_than(dtype) is FORMATS["e1m6"].is_coarser_than(dtype)
        assert FORMATS["e0m7"].is_coarser_than(dtype)
    assert not FORMATS["e1m6"].is_coarser_than(FORMATS["e0m7"])
    assert not FORMATS["e0m7"].is_coarser_than(FORMATS["e1m6"])


def count_significant_bits(format):
    """Count the bits of each value between its first and its last 1, by exact fractions."""
    # Denominators are powers of two. Code 0 is the number 0.
    codes = range(1, oracles.largest_code(format) + 1)
    numerators = [oracles.exact_value(format, code).numerator for code in codes]
    return max((n // (n & -n)).bit_length() for n in numerators)


@pytest.mark.parametrize(
    "format",
    [
        *FORMATS.values(),
        *(FloatFormat(f"fixed-point-{m}", 0, m, 1) for m in (1, 2, 8)),
        FloatFormat("few-codes", 0, 7, 1, num_high_nans=64),
        FloatFormat("one-normal-number", 1, 6, 0, num_high_nans=63),
    ],
    ids=str,
)
def test_significant_bits_are_those_of_the_longest_value(format):
    assert format.significant_bits == count_significant_bits(format)


def test_torch_dtype_has_the_same_codes():
    expected = {
        E4M3: torch.float8_e4m3fn,
        E5M2: torch.float8_e5m2,
        E4M3FNUZ: torch.float8_e4m3fnuz,
        E5M2FNUZ: torch.float8_e5m2fnuz,
        FP16: torch.float16,
        BF16: torch.bfloat16,
    }
    assert {f: f.torch_dtype for f in FORMATS.values() if f.torch_dtype} == expected


def test_torch_dtype_depends_on_the_codes_and_not_on_the_name():
    assert dataclasses.replace(BF16, name="mine").torch_dtype is torch.bfloat16
    assert dataclasses.replace(BF16, has_inf=False).torch_dtype is None
    assert dataclasses.replace(E4M3, bias=8).torch_dtype is None


# --- nonsense is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": ""}, "non-empty name"),
        ({"name": "a/b"}, r"'a/b'.*without '/'"),
        ({"name": "a b"}, "white space"),
        ({"exponent_bits": -1}, "exponent_bits=-1: expected 0 to 32"),
        ({"exponent_bits": 33}, "exponent_bits=33: expected 0 to 32"),
        ({"mantissa_bits": -1}, "mantissa_bits=-1: expected 0 to 256"),
        ({"mantissa_bits": 257}, "mantissa_bits=257: expected 0 to 256"),
        ({"num_high_nans": -1}, "num_high_nans=-1: expected 0 or more"),
        ({"num_high_nans": 127}, "no positive value.*codes up to 0"),
        ({"num_high_nans": 126, "has_inf": True}, "no positive value"),
        ({"exponent_bits": 0, "mantissa_bits": 0}, "add exponent or mantissa bits"),
        ({"exponent_bits": 0, "has_subnormals": False}, "expected at least 8"),
        ({"exponent_bits": 1, "num_high_nans": 8, "has_subnormals": False}, "no positive value"),
    ],
)
def test_invalid_fields_are_a_value_error_that_lists_what_is_allowed(fields, said):
    fields = {"name": "mine", "exponent_bits": 4, "mantissa_bits": 3, "bias": 7} | fields
    with pytest.raises(ValueError, match=said):
        FloatFormat(**fields)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": 8}, "name=8: expected str"),
        ({"exponent_bits": 4.0}, "exponent_bits=4.0: expected int"),
        ({"mantissa_bits": "3"}, "mantissa_bits='3': expected int"),
        ({"bias": True}, "bias=True: expected int"),
        ({"bias": None}, "bias=None: expected int"),
        ({"num_high_nans": 1.0}, "num_high_nans=1.0: expected int"),
        ({"has_inf": 1}, "has_inf=1: expected bool"),
        ({"has_negative_zero": "no"}, "has_negative_zero='no': expected bool"),
        ({"has_subnormals": None}, "has_subnormals=None: expected bool"),
    ],
)
def test_wrong_types_are_a_type_error(fields, said):
    fields = {"name": "mine", "exponent_bits": 4, "mantissa_bits": 3, "bias": 7} | fields
    with pytest.raises(TypeError, match=said):
        FloatFormat(**fields)


@pytest.mark.parametrize(
    "fields",
    [(0, 1, 1), (1, 0, 0), (1, 0, 50), (8, 10, -40)],
    ids=str,
)
def test_the_smallest_and_strangest_formats_are_allowed(fields):
    format = FloatFormat("tiny", *fields)
    assert quantize(torch.tensor([math.inf]).double(), format).item() == format.max


def test_a_format_may_have_a_single_positive_value():
    format = FloatFormat("ternary", 1, 0, 1)
    assert format.values().tolist() == [-1, 0, 1]


def test_a_format_beyond_float64_can_be_built_but_not_used():
    assert (BINARY128.bits, BINARY128.precision, BINARY128.emin) == (128, 113, -16382)
    assert BINARY128.emax == 16383
    assert BINARY128.eps == 2**-112
    for format in (BF16, FP16, E4M3, E5M2, E4M3FNUZ, E5M2FNUZ):
        before, last = sorted({value for value in format.values() if value < float("inf")})[-2:]
        assert format.largest_spacing == last - before
    for derived in ("max", "smallest_normal", "smallest_subnormal"):
        with pytest.raises(ValueError, match=r"binary128: .* exceeds float64"):
            getattr(BINARY128, derived)
    with pytest.raises(ValueError, match=r"binary128 .*exceeds float64.* expected M <= 52"):
        quantize(torch.ones(3), BINARY128)


@pytest.mark.parametrize(
    "format",
    [
        pytest.param(FloatFormat("fine", 5, 53, 15), id="M too large"),
        pytest.param(FloatFormat("large", 5, 2, -1020), id="emax too large"),
        pytest.param(FloatFormat("small", 5, 2, 1100), id="emin too small"),
    ],
)
def test_a_format_may_exceed_float64_in_each_of_three_ways(format):
    with pytest.raises(ValueError, match=f"{format}.*exceeds float64"):
        quantize(torch.ones(3), format)
