"""`native_bits`: the words of native code, each against Python's own numbers."""

import math
import struct

import pytest

numba = pytest.importorskip("numba")

from altgrad.measurement import native_bits as words  # noqa: E402 - it imports numba

NUMBERS = [0.0, -0.0, 1.0, -1.5, 3.0e38, 2.0**-149, 1.0 + 2.0**-24, 65504.0, math.inf]


@numba.njit
def look(x: float) -> tuple[int, float, int, float, float]:
    return (
        words.get_bits(x),
        words.from_bits(words.get_bits(x)),
        words.get_float32_bits(x),
        words.widen(words.get_float32_bits(x)),
        words.binade(x),
    )


@numba.njit
def invert(x: float) -> float:
    return words.invert(x)


@pytest.mark.parametrize("x", NUMBERS)
def test_bits_are_those_of_ieee_754(x: float) -> None:
    bits, same, narrow_bits, narrow, binade = look(x)
    assert bits == struct.unpack("<q", struct.pack("<d", x))[0]
    assert struct.pack("<d", same) == struct.pack("<d", x)
    assert narrow_bits == struct.unpack("<I", struct.pack("<f", x))[0]
    assert struct.pack("<d", narrow) == struct.pack(
        "<d", struct.unpack("<f", struct.pack("<f", x))[0]
    )
    if 0 < abs(x) < math.inf:
        assert binade == 2.0 ** (math.frexp(x)[1] - 1)


@pytest.mark.parametrize("exponent", [-1022, -133, 0, 1022])
def test_a_power_of_two_is_inverted_exactly(exponent: int) -> None:
    assert invert(2.0**exponent) == 2.0**-exponent
