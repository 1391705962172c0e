"""The one rounding kernel, exact in float32 or float64, and the constants it needs of a format.

Write the scaled input as y = t · p / 2**M, where p is the power of two below abs(y), never under
2**emin. The grid points around y are then the integers around t, and p / 2**M is the distance
between them. p comes from the exponent bits of y, so nothing here takes a logarithm, and every
step but the rounding of t itself is exact.
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
"""How a value between two grid points is decided; the names are IEEE 754's, up being toward +∞."""

_EXPONENT_MASK = {torch.float32: 0x7F80_0000, torch.float64: 0x7FF0_0000_0000_0000}
_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}
_MANTISSA_BITS_AND_BIAS = {torch.float32: (23, 127), torch.float64: (52, 1023)}
# dtype, M, emin, emax
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
    """A format as the Python constants that the kernel needs, so that a compiler folds them."""

    max: float
    first_binade: float  # 2**emin
    last_binade: float  # 2**emax
    smallest: float  # the smallest positive value
    steps: float  # grid points per binade, 2**M
    bias: int
    overflow: float | None  # what overflow becomes; None where only ±max can stand for it
    has_negative_zero: bool
    has_subnormals: bool


def _constant_of_the_trace(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Cache a function of format keys and dtypes; torch.compile takes its result as constant.

    With dynamic shapes a format's integers would otherwise turn into arguments of the compiled
    kernel, which makes it several times slower. The mark is the one that
    `torch.compiler.assume_constant_result` sets; calling that would import the whole compiler,
    1.4 seconds, with AltGrad.
    """
    cached = functools.lru_cache(maxsize=256)(function)

    @functools.wraps(function)
    def constant(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        return cached(*args, **kwargs)  # type: ignore[arg-type]

    constant._dynamo_marked_constant = True  # type: ignore[attr-defined]  # noqa: SLF001
    return constant


@_constant_of_the_trace
def grid_of(format_key: str) -> Grid:
    """The kernel's constants for the format with this key."""
    format = FloatFormat.from_key(format_key)
    return Grid(
        max=format.max,
        first_binade=format.smallest_normal,
        last_binade=math.ldexp(1.0, format.emax),
        smallest=format.smallest_subnormal,
        steps=math.ldexp(1.0, format.mantissa_bits),
        bias=format.bias,
        overflow=math.inf if format.has_inf else math.nan if format.has_nan else None,
        has_negative_zero=format.has_negative_zero,
        has_subnormals=format.has_subnormals,
    )


@_constant_of_the_trace
def arithmetic_dtype(dtype: torch.dtype, format_key: str, scaled: bool) -> torch.dtype:
    """The narrowest dtype, float32 or float64, at least `dtype`, in which the kernel is exact.

    It is where p and t fit. Under a scale x / scale may underflow as well: that does no harm below
    half the smallest value, so this half must not be subnormal.
    """
    format = FloatFormat.from_key(format_key)
    for candidate, mantissa_bits, emin, emax in _ARITHMETIC:
        lowest = format.emin - format.mantissa_bits - 1 if scaled else format.emin
        fits = format.mantissa_bits <= mantissa_bits and format.emax <= emax and emin <= lowest
        if fits and torch.promote_types(dtype, candidate) == candidate:
            return candidate
    scale_limit = " - M - 1 (under a scale)" if scaled else ""
    raise ValueError(
        f"{format} (M {format.mantissa_bits}, emin {format.emin}, emax {format.emax}) exceeds "
        f"float64, the widest dtype that values are rounded in; expected M <= 52, emax <= 1023 and "
        f"emin{scale_limit} >= -1022"
    )


def round_in_place(
    y: Tensor, grid: Grid, rounding: Rounding, generator: torch.Generator | None = None
) -> Tensor:
    """Round y, float32 or float64, to the grid continued beyond its top; ±inf becomes NaN.

    ±inf needs no value here: `quantize` clamps first, the diagnostics leave it out. The division
    by p / 2**M is made in two steps, as is its reverse: p / 2**M may be subnormal (bf16), and
    where a CPU or GPU flushes subnormals to zero the kernel would then divide by zero.
    """
    binade = _power_of_two_below(y).clamp_(min=grid.first_binade)
    steps: float | Tensor = grid.steps
    if not grid.has_subnormals:  # then nothing lies between 0 and 2**emin
        steps = torch.full_like(y, grid.steps).masked_fill_(y.abs() < grid.first_binade, 1.0)
    t = y.div_(binade).mul_(steps)
    if rounding == "stochastic":
        t = _round_stochastically(t, generator)
    elif rounding == "nearest_even" and grid.steps == 1:
        t = _round_to_even_code(t, binade, grid.bias)
    else:
        t = _ROUND_IN_PLACE[rounding](t)
    return t.mul_(1 / steps).mul_(binade)


def spacing_at(y: Tensor, grid: Grid) -> Tensor:
    """Distance between the neighbouring grid points at y, float32 or float64; NaN at NaN."""
    magnitude = y.abs().clamp_(grid.first_binade, grid.last_binade)
    gap = _power_of_two_below(magnitude).mul_(1 / grid.steps)
    if not grid.has_subnormals:
        gap = torch.where(y.abs() < grid.first_binade, grid.first_binade, gap)
    # NaN has become inf; what is added is 0, and NaN to NaN, at a third of the cost of a where.
    return gap.add_(magnitude.sub_(magnitude))


def _power_of_two_below(y: Tensor) -> Tensor:
    """The largest power of two up to abs(y); 0 for 0 and subnormal y, inf for inf and NaN."""
    exponent_bits = y.view(_INTEGER[y.dtype]).bitwise_and(_EXPONENT_MASK[y.dtype])
    return exponent_bits.view(y.dtype)


def exact_exp2(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2**exponent in float32 or float64, exactly; exponents that are normal there."""
    mantissa_bits, bias = _MANTISSA_BITS_AND_BIAS[dtype]
    return ((exponent.to(_INTEGER[dtype]) + bias) << mantissa_bits).view(dtype)


def _round_stochastically(t: Tensor, generator: torch.Generator | None) -> Tensor:
    """Away from zero with probability abs(t) − floor(abs(t)), which is 0 for a whole number.

    The draw has 53 bits: one of 24 would move a tiny remainder with probability 2**-24 at least.
    """
    magnitude = t.abs()
    whole = magnitude.floor()
    draw = torch.rand(t.shape, dtype=torch.float64, device=t.device, generator=generator)
    return whole.add_(draw < magnitude.sub_(whole)).copysign_(t)


def _round_to_even_code(t: Tensor, binade: Tensor, bias: int) -> Tensor:
    """Nearest, for M = 0: a tie is at abs(t) = 1.5, and the code's last bit is the exponent's."""
    mantissa_bits, dtype_bias = _MANTISSA_BITS_AND_BIAS[t.dtype]
    exponent = (binade.view(_INTEGER[t.dtype]) >> mantissa_bits) - dtype_bias
    code_is_even = (exponent + bias) % 2 == 0
    tie_to_below = (t.abs() == 1.5) & code_is_even
    return torch.where(tie_to_below, t.trunc(), t.round())
