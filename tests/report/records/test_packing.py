"""Packed numbers: bytes without a line feed, from which the numbers come back with 8 digits."""

import math
import random
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, strategies as st

from altgrad.report.records.packing import ABSENT, pack_numbers, unpack_numbers
from tests.report.records.by_hand import decode_numbers

ODD = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    math.nan,
    math.inf,
    -math.inf,
    5e-324,
    1.7976931348623157e308,
    2.0**-30,
)


def pack(numbers: list[float], absent: frozenset[int] = frozenset()) -> bytes:
    is_absent = np.array([place in absent for place in range(len(numbers))], np.bool_)
    return pack_numbers(np.array(numbers, np.float64), is_absent)


def check(numbers: list[float]) -> None:
    packed = pack(numbers)
    assert b"\n" not in packed
    found, codes = unpack_numbers(packed, len(numbers))
    assert ABSENT not in codes
    for actual, expected in zip(found.tolist(), numbers, strict=True):
        if math.isnan(expected):
            assert math.isnan(actual)
        elif abs(expected) >= 2.0**-1022 and math.isfinite(expected):
            assert abs(actual - expected) <= 2.0**-28 * abs(expected)
            assert math.copysign(1, actual) == math.copysign(1, expected)
        else:  # numbers below the normal ones have fewer bits
            assert actual == pytest.approx(expected, rel=0, abs=2.0**-1050)
            assert math.copysign(1, actual) == math.copysign(1, expected)


@given(st.lists(st.one_of(st.floats(), st.sampled_from(ODD))))
def test_numbers_keep_28_bits(numbers: list[float]) -> None:
    check(numbers)


def test_a_number_is_rounded_to_nearest() -> None:
    ulp = 2.0**-27
    numbers = [1 + ulp, 1 + 0.49 * ulp, 1 + 0.51 * ulp, 2 - 0.49 * ulp, -1 - 0.51 * ulp]
    found, _ = unpack_numbers(pack(numbers), len(numbers))
    assert found.tolist() == [1 + ulp, 1, 1 + ulp, 2, -1 - ulp]


def test_places_without_a_number_are_told_from_those_without_a_value() -> None:
    found, codes = unpack_numbers(pack([2.5, math.nan, 3.5], frozenset({2})), 3)
    assert [each == ABSENT for each in codes] == [False, False, True]
    assert found.tolist() == pytest.approx([2.5, math.nan, math.nan], nan_ok=True)


def test_the_bytes_are_those_of_the_documentation() -> None:
    generator = random.Random(0)
    numbers = [generator.choice([0.0, 1.0, math.nan, generator.gauss(0, 1)]) for _ in range(500)]
    names = {"figures": ["a"], "errors": [], "moved_elements": False, "histograms": {}}
    found = decode_numbers(pack(numbers, frozenset({7})), names | {"layers": [*range(500)]})
    assert found[7] is None
    assert found[8:] == pytest.approx(numbers[8:], rel=4e-9, nan_ok=True)


@pytest.mark.parametrize("count", [0, 2, 4, 1000])
def test_another_count_is_an_error(count: int) -> None:
    with pytest.raises(ValueError, match="packed numbers"):
        unpack_numbers(pack([1.5, 2.5, 0.0]), count)


def test_damaged_bytes_are_an_error_or_the_same_numbers() -> None:
    numbers = [math.sqrt(place) for place in range(100)]
    packed, generator = pack(numbers), random.Random(0)
    whole = unpack_numbers(packed, 100)[0].tolist()
    for place in range(len(packed)):
        damaged = bytearray(packed)
        damaged[place] ^= 1 << generator.randrange(8)
        for changed in (bytes(damaged), packed[:place]):
            with suppress(ValueError):
                assert unpack_numbers(changed, 100)[0].tolist() == whole


def test_few_bytes_that_unpack_to_many_take_no_memory() -> None:
    bomb = zlib.compress(bytes(10**8)).replace(b"\x1b", b"\x1b\x01").replace(b"\n", b"\x1b\x02")
    with pytest.raises(ValueError, match="too many"):
        unpack_numbers(bomb, 1000)


def test_a_code_that_is_unknown_is_an_error() -> None:
    packed = zlib.compress(bytes([0, 5]))
    with pytest.raises(ValueError, match="packed numbers"):
        unpack_numbers(packed.replace(b"\x1b", b"\x1b\x01").replace(b"\n", b"\x1b\x02"), 2)
