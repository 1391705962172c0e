"""The rounding kernel: round one tensor to one grid, exactly, in float32 or float64.

A grid is the set of numbers that a format can hold.

The scaled input is written as ``y = t · p / 2**M``. Here p is the largest power of two up to
``abs(y)``, and at least ``2**emin``. The grid points around y then correspond to the integers
around t, at a spacing of ``p / 2**M``. Rounding t to an integer therefore rounds y to the grid.
Every other operation is exact, because it multiplies or divides by a power of two.

The exponent bits of y give p without a logarithm, whose error could double or halve p::

    float32 | s eeeeeeee mmmmmmmmmmmmmmmmmmmmmmm
    mask    | 0 11111111 00000000000000000000000   0x7F80_0000
    y = 5.5 | 0 10000001 01100000000000000000000   1.375 · 2**2
    p = 4   | 0 10000001 00000000000000000000000   2**2

`ops` contains the public functions around this kernel, and `grids` rounds to several formats at
once with the same idea.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, ParamSpec, TypeAlias, TypeVar

import torch
from torch import Tensor

from altgrad.quantization.float_format import FloatFormat

Rounding: TypeAlias = Literal["nearest_even", "toward_zero", "up", "down", "stochastic"]
"""The direction in which a value between two grid points is rounded. The names follow IEEE 754:
``"up"`` is toward +∞, ``"down"`` toward −∞."""

# The 8 exponent bits of binary32 and the 11 of binary64 (IEEE 754-2019, section 3.4).
_EXPONENT_MASK = {torch.float32: 0x7F80_0000, torch.float64: 0x7FF0_0000_0000_0000}
_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}
_MANTISSA_BITS_AND_BIAS = {torch.float32: (23, 127), torch.float64: (52, 1023)}
# dtype, M, emin, emax; narrowest first
_ARITHMETIC = ((torch.float32, 23, -126, 127), (torch.float64, 52, -1022, 1023))
_P = ParamSpec("_P")
_T = TypeVar("_T")

_ROUND_IN_PLACE: dict[Rounding, Callable[[Tensor], Tensor]] = {
    "nearest_even": Tensor.round_,
    "toward_zero": Tensor.trunc_,
    "up": Tensor.ceil_,
    "down": Tensor.floor_,
}


class Grid(NamedTuple):
    """The constants of a `FloatFormat`, as Python numbers that torch.compile folds into the kernel.

    A binade is the range from a power of two up to the next.

    Attributes:
        max: Largest finite value.
        first_binade: Smallest normal number, ``2**emin``.
        last_binade: Largest power of two up to `max`, ``2**emax``; at least `first_binade`.
        smallest: Smallest positive value.
        points_per_binade: Number of the format's values in each binade, ``2**M``.
        significant_bits: Largest number of significant bits of a value.
        bias: Bias of the exponent field.
        overflow: Result of an overflow: inf or NaN; None if the format has neither.
        has_negative_zero: Whether −0 is a value.
        has_subnormals: Whether the format has subnormals.
    """

    max: float
    first_binade: float
    last_binade: float
    smallest: float
    points_per_binade: float
    significant_bits: int
    bias: int
    overflow: float | None
    has_negative_zero: bool
    has_subnormals: bool


def _cache_as_constant(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Cache a function and mark its result as a constant for torch.compile.

    Without the mark and with dynamic shapes, torch.compile turns the integers of a format into
    arguments of the compiled kernel, which is then several times slower.

    Args:
        function: A function of format keys and dtypes, which are hashable.

    Returns:
        The function with a cache and the mark.
    """
    cached = functools.lru_cache(maxsize=256)(function)

    @functools.wraps(function)
    def constant(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        return cached(*args, **kwargs)  # type: ignore[arg-type]

    # `torch.compiler.assume_constant_result` sets this private attribute, but calling it imports
    # the whole compiler with AltGrad, 1.4 seconds. A test checks that torch still uses the name.
    # https://docs.pytorch.org/docs/stable/generated/torch.compiler.assume_constant_result.html
    constant._dynamo_marked_constant = True  # type: ignore[attr-defined]  # noqa: SLF001
    return constant


@_cache_as_constant
def get_grid(format_key: str) -> Grid:
    """Return the constants for rounding to the format with a given `FloatFormat.key`."""
    format = FloatFormat.from_key(format_key)
    return Grid(
        max=format.max,
        first_binade=format.smallest_normal,
        last_binade=math.ldexp(1.0, format.emax),
        smallest=format.smallest_subnormal,
        points_per_binade=math.ldexp(1.0, format.mantissa_bits),
        significant_bits=format.significant_bits,
        bias=format.bias,
        overflow=math.inf if format.has_inf else math.nan if format.has_nan else None,
        has_negative_zero=format.has_negative_zero,
        has_subnormals=format.has_subnormals,
    )


@_cache_as_constant
def get_arithmetic_dtype(dtype: torch.dtype, format_key: str, scaled: bool) -> torch.dtype:
    """Return the narrowest dtype in which the kernel rounds to a format exactly.

    The dtype must hold the power of two below each value, and each value in units of the spacing.
    Under a scale the quotient x / scale may underflow. An underflow is harmless below half the
    smallest value of the format, so this half must be a normal number of the dtype.

    Args:
        dtype: The dtype of the input; the returned dtype is at least as wide.
        format_key: The `FloatFormat.key` of the format.
        scaled: Whether the input is divided by a scale.

    Returns:
        float32 or float64.

    Raises:
        ValueError: The format is too wide for float64.
    """
    format = FloatFormat.from_key(format_key)
    for candidate, mantissa_bits, emin, emax in _ARITHMETIC:
        lowest = format.emin - format.mantissa_bits - 1 if scaled else format.emin
        fits = format.mantissa_bits <= mantissa_bits and format.emax <= emax and emin <= lowest
        if fits and torch.promote_types(dtype, candidate) == candidate:
            return candidate
    scale_limit = " - M - 1 (with a scale)" if scaled else ""
    raise ValueError(
        f"{format} (M {format.mantissa_bits}, emin {format.emin}, emax {format.emax}) exceeds "
        f"float64, the widest dtype AltGrad rounds in; expected M <= 52, emax <= 1023 and "
        f"emin{scale_limit} >= -1022: use a narrower format"
    )


def round_in_place(
    y: Tensor, grid: Grid, rounding: Rounding, generator: torch.Generator | None = None
) -> Tensor:
    """Round y in place to the values of a format, continued beyond the format's largest value.

    Callers clamp y before if the largest value is a limit. ±inf becomes NaN.

    Args:
        y: float32 or float64, any shape, already divided by the scale; overwritten.
        grid: The constants of the format.
        rounding: The rounding direction.
        generator: The random number generator for ``"stochastic"``, on the device of y.

    Returns:
        A tensor with the dtype and shape of y, in the memory of y. Stochastic rounding, and a
        format without mantissa bits, need new memory.
    """
    binade = _power_of_two_below(y).clamp_(min=grid.first_binade)
    if grid.has_subnormals and grid.smallest >= torch.finfo(y.dtype).tiny:
        # For M = 0 the spacing is the binade itself, which `_round_to_integer` needs.
        spacing = binade if grid.points_per_binade == 1 else binade.mul_(1 / grid.points_per_binade)
        return _round_to_integer(y.div_(spacing), binade, grid, rounding, generator).mul_(spacing)
    # Two divisions and two multiplications, instead of one by the spacing: this quotient is
    # subnormal in the lowest binades of bf16, and zero where the hardware flushes subnormals.
    points_per_binade: float | Tensor = grid.points_per_binade
    if not grid.has_subnormals:  # 0 and 2**emin are neighbours: one point per binade below 2**emin
        points_per_binade = torch.full_like(y, grid.points_per_binade)
        points_per_binade = points_per_binade.masked_fill_(y.abs() < grid.first_binade, 1.0)
    t = y.div_(binade).mul_(points_per_binade)
    t = _round_to_integer(t, binade, grid, rounding, generator)
    return t.mul_(1 / points_per_binade).mul_(binade)


def compute_spacing(y: Tensor, grid: Grid) -> Tensor:
    """Return the distance between the neighbouring values of a format at each value of y.

    Args:
        y: float32 or float64, any shape, already divided by the scale.
        grid: The constants of the format.

    Returns:
        A tensor with the dtype and shape of y, in units of y. The spacing at ±inf is that at the
        largest value, and the spacing at NaN is NaN.
    """
    magnitude = y.abs().clamp_(grid.first_binade, grid.last_binade)
    spacing = _power_of_two_below(magnitude).mul_(1 / grid.points_per_binade)
    if not grid.has_subnormals:
        spacing = torch.where(y.abs() < grid.first_binade, grid.first_binade, spacing)
    # The mask has turned NaN into inf. magnitude − magnitude is NaN for NaN and 0 otherwise, so
    # that the sum restores NaN; this takes a third of the time of torch.where.
    return spacing.add_(magnitude.sub_(magnitude))


def _power_of_two_below(y: Tensor) -> Tensor:
    """Return the largest power of two up to ``abs(y)``.

    A mask clears the bits of sign and mantissa. Thus 0 and subnormal y give 0, and inf and NaN give
    inf.
    """
    exponent_bits = y.view(_INTEGER[y.dtype]).bitwise_and(_EXPONENT_MASK[y.dtype])
    return exponent_bits.view(y.dtype)


def compute_exp2(exponent: Tensor, dtype: torch.dtype, offset: int = 0) -> Tensor:
    """Return ``2**(exponent + offset)`` exactly.

    The biased exponent is shifted into the exponent bits, because `torch.exp2` does not guarantee
    an exact result.

    Args:
        exponent: int32 or int64, any shape. The result must be a normal number of `dtype`.
        dtype: float32 or float64.
        offset: Number to add to each exponent, without an operation of its own.

    Returns:
        A tensor of `dtype` with the shape of `exponent`.
    """
    mantissa_bits, bias = _MANTISSA_BITS_AND_BIAS[dtype]
    return ((exponent.to(_INTEGER[dtype]) + (bias + offset)) << mantissa_bits).view(dtype)


def _round_to_integer(
    t: Tensor, binade: Tensor, grid: Grid, rounding: Rounding, generator: torch.Generator | None
) -> Tensor:
    """Round t to an integer, in place where the rounding direction allows it.

    Args:
        t: Values in units of the spacing, float32 or float64, any shape.
        binade: The largest power of two up to each value, the shape of t.
        grid: The constants of the format.
        rounding: The rounding direction.
        generator: The random number generator for ``"stochastic"``.

    Returns:
        A tensor of t's dtype and shape.
    """
    if rounding == "stochastic":
        return _round_stochastically(t, generator)
    if rounding == "nearest_even" and grid.points_per_binade == 1:
        return _round_to_even_code(t, binade, grid.bias)
    return _ROUND_IN_PLACE[rounding](t)


def _round_stochastically(t: Tensor, generator: torch.Generator | None) -> Tensor:
    """Round t to an integer: away from zero with probability ``abs(t) − floor(abs(t))``.

    Otherwise t is rounded toward zero, so that the mean of the results is t.

    Returns:
        A tensor of t's dtype and shape.
    """
    magnitude = t.abs()
    whole = magnitude.floor()
    draw = draw_numbers(t, generator)  # a line of its own: torch.compile breaks the graph here
    return whole.add_(draw < magnitude.sub_(whole)).copysign_(t)


def draw_numbers(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw the random numbers of stochastic rounding, for each element of x one from 0 to 1.

    They have 53 random bits. Among the 24 bits of float32 a draw of 0 alone has probability
    ``2**-24``, so that every remainder, however small, would be rounded up at least so often.

    Args:
        x: The tensor to round.
        generator: The random number generator, on the device of x.

    Returns:
        The numbers, float64, with the shape of x.
    """
    return torch.rand(x.shape, dtype=torch.float64, device=x.device, generator=generator)


def _round_to_even_code(t: Tensor, binade: Tensor, bias: int) -> Tensor:
    """Round t to the nearest integer for a format without mantissa bits, ties to the even code.

    A code is the bit pattern of a number. Without mantissa bits the last bit of a code is the last
    bit of its exponent field. The only ties of normal numbers are at ``abs(t) = 1.5``, between
    codes of neighbouring powers of two.

    Args:
        t: Values divided by `binade`, float32 or float64.
        binade: The largest power of two up to each value, with the dtype and shape of t.
        bias: Bias of the exponent field.

    Returns:
        A tensor of t's dtype and shape.
    """
    mantissa_bits, dtype_bias = _MANTISSA_BITS_AND_BIAS[t.dtype]
    exponent = (binade.view(_INTEGER[t.dtype]) >> mantissa_bits) - dtype_bias
    code_is_even = (exponent + bias) % 2 == 0
    tie_to_below = (t.abs() == 1.5) & code_is_even
    return torch.where(tie_to_below, t.trunc(), t.round())
