"""Pack the numbers of an observed step into few bytes, which fit in a line of a file, and back.

Each number keeps 28 significant bits, which are more than 8 decimal digits: the relative error is
at most 2^-28 = 3.7e-9. Bytes of equal weight lie together, because zlib then finds more to save.

`columns` comes next: it says which number is which.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from altgrad.measurement.numbers import Numbers

PACKED = b"\0"
"""The byte between the text of a line and its packed numbers; JSON text has none."""

ABSENT = 4
"""The code of a place that has no number, unlike NaN, the code of a number without a value."""

_ZERO, _ONE, _NAN, _OTHER = range(4)
_KEPT_BYTES = 5
# float64:  s eeeeeeeeeee mmmmmmmmmmmmmmmmmmmmmmmmmmm 0 | 000000000000000000000000
#           sign, exponent, 27 bits of the mantissa; 5 bytes are kept, and 3 bytes are not.
_HALF, _DROPPED = np.uint64(1 << 24), np.uint64((1 << 25) - 1)
_LEVEL = 1  # of zlib: higher ones take up to twice as long, for 3 % of the bytes

# A line ends with a line feed, so that packed bytes may hold none. ESC, which is as rare, is free.
_ESCAPES = ((b"\x1b", b"\x1b\x01"), (b"\n", b"\x1b\x02"))


def pack_numbers(numbers: Numbers, is_absent: NDArray[np.bool_]) -> bytes:
    """Return numbers in few bytes, without a line feed.

    Args:
        numbers: The numbers, float64 of any shape. NaN and inf are kept.
        is_absent: True at places without a number, of the same shape.

    Returns:
        The bytes: a code for each place, then the numbers other than 0, 1 and NaN, compressed.
    """
    bits = numbers.ravel().view(np.uint64)
    codes = np.full(bits.shape, _OTHER, np.uint8)
    codes[bits == 0] = _ZERO  # -0.0 has other bits
    codes[numbers.ravel() == 1] = _ONE
    codes[np.isnan(numbers.ravel())] = _NAN
    codes[is_absent.ravel()] = ABSENT
    others = _round_bits(bits[codes == _OTHER])
    planes = others.astype(">u8").view(np.uint8).reshape(-1, 8)[:, :_KEPT_BYTES].T
    packed = zlib.compress(codes.tobytes() + planes.tobytes(), _LEVEL)
    for plain, escaped in _ESCAPES:
        packed = packed.replace(plain, escaped)
    return packed


def unpack_numbers(packed: bytes, count: int) -> tuple[Numbers, NDArray[np.uint8]]:
    """Return the numbers that `pack_numbers` packed.

    Args:
        packed: The bytes.
        count: The number of places.

    Returns:
        The numbers, float64 (count), NaN where there is none; and the codes of the places, uint8
        (count), `ABSENT` where there is no number.

    Raises:
        ValueError: The bytes are damaged, or hold another count of places.
    """
    for plain, escaped in _ESCAPES[::-1]:
        packed = packed.replace(escaped, plain)
    content = _decompress(packed, count * (1 + _KEPT_BYTES))
    codes = np.frombuffer(content, np.uint8, min(count, len(content)))
    places = np.flatnonzero(codes == _OTHER)
    if len(content) != count + _KEPT_BYTES * len(places) or (codes > ABSENT).any():
        raise ValueError(f"expected {count:,} packed numbers")
    numbers = _NUMBERS[codes]
    planes = np.frombuffer(content, np.uint8, offset=count).reshape(_KEPT_BYTES, -1)
    others = np.zeros((len(places), 8), np.uint8)
    others[:, 8 - _KEPT_BYTES :] = planes[::-1].T
    numbers[places] = others.view("<u8").ravel().astype(np.uint64, copy=False).view(np.float64)
    return numbers, codes


_NUMBERS = np.array([0.0, 1.0, np.nan, np.nan, np.nan])
"""The numbers by code; those of code 3 follow the codes."""


def _round_bits(bits: Any) -> Any:
    """Round the bits of finite numbers and inf to 28 significant bits, up at half."""
    is_finite = np.isfinite(bits.view(np.float64))
    rounded = (bits + _HALF) & ~_DROPPED
    # The largest numbers would become inf: they are cut.
    is_finite &= np.isfinite(rounded.view(np.float64))
    return np.where(is_finite, rounded, bits & ~_DROPPED)


def _decompress(packed: bytes, most: int) -> bytes:
    """Decompress bytes; raise ValueError if they are damaged, or hold more than `most` bytes."""
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(packed, most + 1)
    except zlib.error as error:
        raise ValueError(f"expected packed numbers, got {error}") from None
    if not stream.eof or stream.unused_data or len(content) > most:
        raise ValueError("expected packed numbers, of which some are missing or too many")
    return content
