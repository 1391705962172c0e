"""Constants of binary64 agree with torch and with Python's floats."""

import math
import struct
import sys

from altgrad.quantization import binary64


def test_masks_and_counts_describe_a_float64() -> None:
    (code,) = struct.unpack("<q", struct.pack("<d", 1.5))
    power = struct.unpack("<d", struct.pack("<q", code & binary64.EXPONENT_MASK))
    assert power == (1.0,)
    assert code >> binary64.MANTISSA_BITS == binary64.BIAS
    assert sys.float_info.mant_dig - 1 == binary64.MANTISSA_BITS


def test_the_largest_float_below_one() -> None:
    assert math.nextafter(1, 0) == binary64.JUST_BELOW_ONE


def test_the_rounder_rounds_to_whole_numbers_with_ties_to_even() -> None:
    for x in (0.5, 1.5, 2.5, -0.5, -1.5, 7.49, -7.51):
        assert (x + binary64.ROUNDER) - binary64.ROUNDER == round(x)


def test_sums_with_the_rounder_do_not_overflow() -> None:
    assert math.isfinite(binary64.LARGEST * (1 + binary64.ROUNDER))
