"""The vocabulary of native code: bits of numbers, powers of two, and addresses.

numba compiles these functions into those that call them. `get_bits` costs nothing: it tells the
compiler to see the same 64 bits as an integer.

This file imports no torch. Read `altgrad.quantization.binary64` first; `native_kernel` and
`native_rounding` come next and are written in these words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from altgrad.quantization.binary64 import BIAS, EXPONENT_MASK, MANTISSA_BITS

Pointer: TypeAlias = Any
"""The address of numbers of one type, which can be indexed."""

# forceinline: calls disappear, and with them the code for Python exceptions, which would need
# numba. error_model: a division by 0 gives inf or NaN, as in torch.
OPTIONS: dict[str, Any] = {"error_model": "numpy", "forceinline": True}
"""Options of numba for all native code."""
inline = numba.njit(**OPTIONS)
"""A decorator: compile a function into the functions that call it."""


@intrinsic
def pointer(_: Any, __: Any, dtype: Any) -> tuple[Any, Callable[..., Any]]:
    """Return an address, int64, as a pointer to numbers of a dtype."""
    target = types.CPointer(dtype.dtype)

    def generate(context: Any, builder: Any, _: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], context.get_value_type(target))

    return target(types.int64, dtype), generate


@intrinsic
def add(_: Any, __: Any, ___: Any) -> tuple[Any, Callable[..., Any]]:
    """Return the sum of a total and a term, where terms may be added in any order.

    This alone lets the compiler keep several partial sums. All other arithmetic is exact or
    rounded as written.

    Returns:
        A function from two float64 to their sum; numba puts it in place of the call.
    """

    def generate(_: Any, builder: Any, __: Any, values: Any) -> Any:
        return builder.fadd(*values, flags=("reassoc", "nsz"))

    return types.float64(types.float64, types.float64), generate


@intrinsic
def get_bits(_: Any, __: Any) -> tuple[Any, Callable[..., Any]]:
    """Return the bits of a float64 as int64. Bits of magnitudes are in the order of these."""

    def generate(_: Any, builder: Any, __: Any, values: Any) -> Any:
        return builder.bitcast(values[0], ir.IntType(64))

    return types.int64(types.float64), generate


@intrinsic
def from_bits(_: Any, __: Any) -> tuple[Any, Callable[..., Any]]:
    """Return the float64 with the bits of an int64."""

    def generate(_: Any, builder: Any, __: Any, values: Any) -> Any:
        return builder.bitcast(values[0], ir.DoubleType())

    return types.float64(types.int64), generate


@intrinsic
def widen(_: Any, __: Any) -> tuple[Any, Callable[..., Any]]:
    """Return the float32 with the bits of a uint32, as float64."""

    def generate(_: Any, builder: Any, __: Any, values: Any) -> Any:
        return builder.fpext(builder.bitcast(values[0], ir.FloatType()), ir.DoubleType())

    return types.float64(types.uint32), generate


@intrinsic
def get_float32_bits(_: Any, __: Any) -> tuple[Any, Callable[..., Any]]:
    """Return the bits of a float64 that is rounded to float32, as uint32."""

    def generate(_: Any, builder: Any, __: Any, values: Any) -> Any:
        return builder.bitcast(builder.fptrunc(values[0], ir.FloatType()), ir.IntType(32))

    return types.uint32(types.float64), generate


@inline
def larger(a: Any, b: Any) -> Any:
    """Return the larger of two numbers.

    Args:
        a: A float64, or an int64.
        b: A number of the same type, which is returned if one of both is NaN.
    """
    return a if a > b else b  # noqa: FURB136 - numba's max() tests for NaN, too


@inline
def smaller(a: Any, b: Any) -> Any:
    """Return the smaller of two numbers.

    Args:
        a: A float64, or an int64.
        b: A number of the same type, which is returned if one of both is NaN.
    """
    return a if a < b else b  # noqa: FURB136


@inline
def clamp(x: float, low: float, high: float) -> float:
    """Return a number, limited to a range.

    Args:
        x: The number.
        low: The lower end, which is returned for NaN.
        high: The upper end.
    """
    return smaller(larger(x, low), high)


@inline
def binade(x: float) -> float:
    """Return the largest power of two up to abs(x); 0 for 0 and subnormal numbers."""
    return from_bits(get_bits(x) & EXPONENT_MASK)


@inline
def invert(power_of_two: float) -> float:
    """Return 1 / x for a power of two from 2**-1022 to 2**1022, faster than a division does."""
    return from_bits((2 * BIAS << MANTISSA_BITS) - get_bits(power_of_two))
