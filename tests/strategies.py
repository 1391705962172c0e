"""Hypothesis strategies: any small format, power-of-two scales, inputs that matter to a format."""

import math

import torch
from hypothesis import settings, strategies as st
from torch import Tensor

from altgrad.quantization import FloatFormat
from tests.oracles import exact_value, largest_code

# No deadline: the first example of a process pays for imports and caches.
thorough = settings(max_examples=60, deadline=None)


@st.composite
def formats(
    draw: st.DrawFn, *, max_bits: int = 19, subnormals: st.SearchStrategy[bool] | None = None
) -> FloatFormat:
    """Draw a format: E 0 to 8, M 0 to 10, any bias around IEEE 754's, any special codes.

    All values, and their products with `power_of_two_scales`, are exact in float64.
    """
    exponent_bits = draw(st.integers(0, min(8, max_bits - 1)))
    room = max_bits - 1 - exponent_bits
    mantissa_bits = draw(st.integers(0 if exponent_bits else 1, max(min(10, room), 1)))
    has_subnormals = draw(st.booleans() if subnormals is None else subnormals)
    if exponent_bits == 0:
        has_subnormals = True  # otherwise zero would be the only value
    has_inf = draw(st.booleans())
    lowest = 1 if has_subnormals else 1 << mantissa_bits
    spare = (1 << (exponent_bits + mantissa_bits)) - 1 - has_inf - lowest
    if spare < 0:
        has_inf, spare = False, spare + 1
    middle = (1 << exponent_bits) // 2
    return FloatFormat(
        "any",
        exponent_bits,
        mantissa_bits,
        draw(st.integers(middle - 150, middle + 150)),
        num_high_nans=draw(st.integers(0, spare) | st.integers(0, min(spare, 3))),
        has_inf=has_inf,
        has_negative_zero=draw(st.booleans()),
        has_subnormals=has_subnormals,
    )


def power_of_two_scales(limit: int = 100) -> st.SearchStrategy[float]:
    """Return a strategy for scales from ``2**-limit`` to ``2**limit``."""
    return st.integers(-limit, limit).map(lambda exponent: math.ldexp(1.0, exponent))


@st.composite
def numbers(draw: st.DrawFn, format: FloatFormat, scale: float = 1.0) -> float:
    """Draw a finite float64: any, or one at or next to a value or midpoint of the scaled grid."""
    if draw(st.integers(0, 3)) == 0:
        return draw(st.floats(allow_nan=False, allow_infinity=False))
    code = draw(st.integers(0, largest_code(format) + 1))
    x = float(exact_value(format, code))
    if draw(st.booleans()):
        x = (x + float(exact_value(format, code + 1))) / 2
    x = draw(st.sampled_from([x, math.nextafter(x, 0), math.nextafter(x, math.inf)])) * scale
    return -x if draw(st.booleans()) else x


@st.composite
def tensors(draw: st.DrawFn, format: FloatFormat, scale: float = 1.0) -> Tensor:
    """Draw a tensor of one to 20 `numbers`."""
    drawn = draw(st.lists(numbers(format, scale), min_size=1, max_size=20))
    return torch.tensor(drawn, dtype=torch.float64)
