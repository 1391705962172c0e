"""The native rounding: round float32 numbers in place to a format, in one pass over them.

It computes what `altgrad.recipes.rounding.store_` computes with tensors, from the same random
numbers, so that each result has the same bits. Here the formula stands for one element::

    y = w / scale          limited to ±max
    p = the largest power of two up to abs(y), and at least the smallest normal number
    w = y, rounded to a multiple of the spacing p / 2**M, times scale

All of it is float64, in which each float32 operation comes out right: the exact sum, product or
quotient of two float32 numbers, rounded to 53 bits and then to 24, is the number that float32
arithmetic gives. S. A. Figueroa, "When is double rounding innocuous?", SIGNUM Newsletter 30 (1995).

This file imports no torch. Read `native_bits` first; `native_code` comes next.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
from numba import types

from altgrad.measurement.native_bits import (
    OPTIONS,
    Pointer,
    binade,
    clamp,
    from_bits,
    get_bits,
    get_float32_bits,
    inline,
    invert,
    larger,
    pointer,
    widen,
)
from altgrad.quantization.binary64 import ROUNDER

_SIGN = -(2**63)  # the first bit of 64
_TO_INTEGER = 2.0**52  # float64 numbers from here up are integers
_INF = float("inf")


class Steps(NamedTuple):
    """The grid of a format without scale: `altgrad.quantization.kernel.Grid` has the same numbers.

    Attributes:
        max: The largest value.
        eps: The spacing above 1, 2**-M for M mantissa bits.
        smallest: The smallest positive value, which is the spacing around 0.
        has_negative_zero: 1 if −0 is a value, otherwise 0.
    """

    max: float
    eps: float
    smallest: float
    has_negative_zero: int


# numba.float64(x) and not float(x), which would keep float32, and with it the arithmetic.


@inline
def _round_to_float32(x: float) -> float:
    return widen(get_float32_bits(x))


@inline
def _copy_sign(magnitude: float, x: float) -> float:
    return from_bits(get_bits(magnitude) | (get_bits(x) & _SIGN))


@inline
def _round_to_grid(y: float, draw: float | None, steps: Steps) -> float:
    """Round y to a multiple of the spacing: to nearest without a draw, otherwise at random."""
    y = clamp(y, -steps.max, steps.max)
    size = abs(y)
    spacing = larger(binade(size) * steps.eps, steps.smallest)
    if draw is None:
        rounder = ROUNDER * spacing
        rounded = (size + rounder) - rounder
    else:
        count = size * invert(spacing)  # below 2**(M + 1)
        whole = (count + _TO_INTEGER) - _TO_INTEGER  # to nearest
        whole = whole - 1.0 if whole > count else whole
        whole = whole + 1.0 if draw < count - whole else whole
        rounded = whole * spacing
    keeps_sign = (rounded != 0) | (steps.has_negative_zero != 0)
    return _copy_sign(rounded, y) if keeps_sign else rounded


@inline
def _find_error(lost: float, most: float) -> int:
    """Return the bits of a rounding error in bfloat16, limited to ± `most`; 0 for NaN."""
    error = clamp(lost, -most, most) if lost == lost else 0.0  # noqa: PLR0124 - False for NaN
    bits = get_float32_bits(error)
    # To nearest, ties to even: the bit that stays last decides if half a unit is rounded up.
    last = (bits >> numba.uint32(16)) & numba.uint32(1)
    return (bits + numba.uint32(0x7FFF) + last) >> numba.uint32(16)


@inline
def _store_unscaled(floats: Pointer, count: int, draws: int, steps: Steps) -> None:
    if draws == 0:
        for i in range(count):
            w = numba.float64(floats[i])
            q = _round_to_grid(w, None, steps)
            floats[i] = numba.float32(q if abs(w) < _INF else w)
    else:
        draw = pointer(draws, numba.float64)
        for i in range(count):
            w = numba.float64(floats[i])
            q = _round_to_grid(w, draw[i], steps)
            floats[i] = numba.float32(q if abs(w) < _INF else w)


@inline
def _store_scaled(
    floats: Pointer, count: int, scales: Pointer, is_narrow: int, draws: int, steps: Steps
) -> None:
    if draws == 0:
        for i in range(count):
            w, scale = numba.float64(floats[i]), numba.float64(scales[i])
            y = w / scale
            y = _round_to_float32(y) if is_narrow else y
            q = _round_to_grid(y, None, steps) * scale
            floats[i] = numba.float32(q if abs(w) < _INF else w)
    else:
        draw = pointer(draws, numba.float64)
        for i in range(count):
            w, scale = numba.float64(floats[i]), numba.float64(scales[i])
            y = w / scale
            y = _round_to_float32(y) if is_narrow else y
            q = _round_to_grid(y, draw[i], steps) * scale
            floats[i] = numba.float32(q if abs(w) < _INF else w)


@inline
def _store_with_errors(
    floats: Pointer, count: int, errors: Pointer, most: float, steps: Steps
) -> None:
    for i in range(count):
        error = widen(numba.uint32(errors[i]) << numba.uint32(16))
        w = _round_to_float32(numba.float64(floats[i]) + error)
        q = _round_to_grid(w, None, steps)
        q = q if abs(w) < _INF else w
        errors[i] = numba.uint16(_find_error(w - q, most))
        floats[i] = numba.float32(q)


def store(
    weights: int,
    count: int,
    scales: int,
    is_narrow: int,
    draws: int,
    errors: int,
    has_negative_zero: int,
    most: float,
    max: float,
    eps: float,
    smallest: float,
) -> None:
    """Round weights in place: `altgrad.recipes.rounding.store_`, for float32 on the CPU.

    Args:
        weights: Address of the weights, float32.
        count: Number of weights.
        scales: Address of the scale of each weight, float32; 0 without scales.
        is_narrow: 1 if the quotient by the scale is rounded to float32, otherwise 0.
        draws: Address of a random number from 0 to 1 for each weight, float64; 0 to round to
            nearest.
        errors: Address of the errors of Kahan summation, bfloat16; 0 without. There are then
            neither scales nor draws.
        has_negative_zero: 1 if −0 is a value of the format, otherwise 0.
        most: The largest error to keep.
        max: The largest value of the format.
        eps: The format's spacing above 1.
        smallest: The format's smallest positive value.
    """
    floats = pointer(weights, numba.float32)
    steps = Steps(max, eps, smallest, has_negative_zero)
    if errors != 0:
        _store_with_errors(floats, count, pointer(errors, numba.uint16), most, steps)
    elif scales != 0:
        each = pointer(scales, numba.float32)
        _store_scaled(floats, count, each, is_narrow, draws, steps)
    else:
        _store_unscaled(floats, count, draws, steps)


def make_assembly() -> tuple[str, str]:
    """Compile `store` for this processor.

    Returns:
        The code in LLVM's assembly language, and the name of the function in it.
    """
    signature: Any = types.void(*[types.int64] * 7, *[types.float64] * 4)
    compiled = numba.cfunc(signature, **OPTIONS)(store)
    return compiled.inspect_llvm(), compiled.native_name
