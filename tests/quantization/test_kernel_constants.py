"""The constants of the rounding kernel, and its behaviour above the largest value."""

import math

import pytest
import torch

from altgrad.quantization import BF16, E4M3, E7M0, FORMATS, FP16, FloatFormat
from altgrad.quantization.kernel import (
    compute_exp2,
    compute_spacing,
    get_arithmetic_dtype,
    get_grid,
    round_in_place,
)
from tests import oracles
from tests.quantization.matrix import EVERY_FORMAT

WIDE = FloatFormat("e9m2", 9, 2, 255)
FTZ = FloatFormat("ftz", 3, 2, 3, has_subnormals=False)


@pytest.mark.parametrize("format", [*EVERY_FORMAT, pytest.param(FTZ, id="ftz")])
def test_constants_equal_those_derived_from_the_values(format):
    magnitudes = [value for _, value in oracles.exact_magnitudes(format)[:-1]]
    grid = get_grid(format.key)
    assert grid.max == magnitudes[-1]
    assert grid.smallest == magnitudes[1]
    assert grid.first_binade == 2.0 ** (1 - format.bias)
    assert grid.last_binade == max(2.0 ** oracles.floor_log2(magnitudes[-1]), grid.first_binade)
    step = grid.last_binade / grid.points_per_binade
    assert step == oracles.exact_spacing(grid.max, format)
    assert all(value % step == 0 for value in magnitudes if value >= grid.last_binade)


@pytest.mark.parametrize(
    ("format", "overflow", "has_negative_zero"),
    [
        (E4M3, math.nan, True),
        (FP16, math.inf, True),
        (E7M0, None, True),
        (FORMATS["e4m3fnuz"], math.nan, False),
    ],
    ids=str,
)
def test_overflow_is_inf_or_nan_as_the_format_has_them(format, overflow, has_negative_zero):
    grid = get_grid(format.key)
    assert repr(grid.overflow) == repr(overflow)
    assert grid.has_negative_zero is has_negative_zero


@pytest.mark.parametrize(
    ("format", "dtype", "plain", "scaled"),
    [
        (E4M3, torch.float16, torch.float32, torch.float32),
        (E4M3, torch.float64, torch.float64, torch.float64),
        (BF16, torch.bfloat16, torch.float32, torch.float64),  # half its smallest is subnormal
        (WIDE, torch.float32, torch.float64, torch.float64),
        (FloatFormat("deep", 4, 2, 124), torch.float32, torch.float32, torch.float32),
        (FloatFormat("deeper", 4, 2, 125), torch.float32, torch.float32, torch.float64),
        (FloatFormat("fine", 4, 23, 7), torch.float32, torch.float32, torch.float32),
        (FloatFormat("finer", 4, 24, 7), torch.float32, torch.float64, torch.float64),
        (FloatFormat("high", 4, 2, -112), torch.float32, torch.float32, torch.float32),
        (FloatFormat("higher", 4, 2, -113), torch.float32, torch.float64, torch.float64),
    ],
    ids=str,
)
def test_the_arithmetic_dtype_is_the_narrowest_exact_one(format, dtype, plain, scaled):
    assert get_arithmetic_dtype(dtype, format.key, False) is plain
    assert get_arithmetic_dtype(dtype, format.key, True) is scaled


@pytest.mark.parametrize(
    ("dtype", "exponents"),
    [(torch.float32, range(-126, 128)), (torch.float64, range(-1022, 1024))],
    ids=str,
)
def test_every_normal_power_of_two_is_exact(dtype, exponents):
    powers = compute_exp2(torch.tensor(exponents), dtype)
    assert powers.dtype is dtype
    assert powers.tolist() == [math.ldexp(1.0, exponent) for exponent in exponents]


def test_rounding_continues_above_the_top_and_turns_infinity_into_nan():
    y = torch.tensor([447.0, 500.0, -1000.0, 3e38, math.inf, -math.inf, math.nan])
    rounded = round_in_place(y, get_grid(E4M3.key), "nearest_even")
    assert rounded.data_ptr() == y.data_ptr()
    assert rounded[:3].tolist() == [448.0, 512.0, -1024.0]
    assert rounded[3] == 14 * 2.0**124  # of 8 … 15 in the last binade of float32
    assert rounded[4:].isnan().all()


def test_the_spacing_is_constant_above_the_top_and_y_does_not_change():
    y = torch.tensor([0.0, 2.0**-9, 2.0**-6, 1.0, 1.9, -2.0, 448.0, 1e30, math.inf, math.nan])
    before = y.clone()
    gap = compute_spacing(y, get_grid(E4M3.key))
    expected = [2.0**-9, 2.0**-9, 2.0**-9, 2.0**-3, 2.0**-3, 2.0**-2, 32, 32, 32, math.nan]
    oracles.assert_same_values(gap, torch.tensor(expected), y)
    oracles.assert_same_values(y, before)


def test_torch_marks_constant_results_with_the_same_attribute():
    """The kernel sets the attribute itself, because calling torch would import the compiler."""

    def function():
        return 1

    torch.compiler.assume_constant_result(function)
    assert vars(function) == {"_dynamo_marked_constant": True}
    assert vars(get_grid)["_dynamo_marked_constant"] is True
