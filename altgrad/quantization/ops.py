"""What a number format does to a tensor: `quantize` and, from the same kernel, `spacing`."""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from altgrad.quantization.arguments import check_input, check_out, checked_scale, full_dtype
from altgrad.quantization.float_format import FloatFormat
from altgrad.quantization.formats import get_format
from altgrad.quantization.kernel import (
    Grid,
    Rounding,
    arithmetic_dtype,
    grid_of,
    round_in_place,
    spacing_at,
)

_ROUNDINGS = get_args(Rounding)


def quantize(
    x: Tensor,
    format: str | torch.dtype | FloatFormat,
    scale: float | Tensor = 1.0,
    *,
    rounding: Rounding = "nearest_even",
    saturate: bool = True,
    generator: torch.Generator | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Round to the scaled grid of a format: ``scale · RN(x / scale)``.

    For a power-of-two scale every value is rounded exactly once, whatever the format; grid values
    never move. Another scale divides first, which may itself round.

    - Zero stays zero, −0 stays −0 where the format has it, else it becomes 0.
    - NaN stays NaN.
    - ±inf and overflow become ±max (times scale) when saturating, else inf or NaN as the format
      has them. As in IEEE 754 a finite value overflows only if its rounding goes away from zero,
      so ``toward_zero`` never does. A format with neither inf nor NaN always saturates.
    - A tie goes to the even code, also where M = 0. Without subnormals, one between 0 and the
      smallest normal number goes to 0.
    - The gradient is passed straight through: ones everywhere, also where x saturates. The scale
      gets none.

    Args:
        x: float16, bfloat16, float32 or float64, any shape, any device.
        format: A `FloatFormat` or the name of one.
        scale: A positive number, or a tensor of positive numbers that broadcasts to x's shape.
            A tensor's values are not checked, which would cost a synchronisation. Under
            torch.compile, pass a scale that changes as a tensor: each new number may recompile.
        rounding: ``nearest_even``, ``toward_zero``, ``up``, ``down`` or ``stochastic``, which
            moves up with the probability that makes the mean x, and never moves a grid value.
        saturate: Whether ±inf and overflow become ±max.
        generator: The source of randomness, on x's device; needed by stochastic rounding alone.
        out: Where to write the result, of its shape and dtype. It may be x, but must not share
            memory with scale.

    Returns:
        A tensor of x's shape on x's device. Its dtype is x's where that holds every value of the
        scaled grid, else float32 (float64 for float64). So that this never depends on a tensor's
        values, half-precision x with a tensor scale gives float32. In float32, a value of a
        format that exceeds it becomes ±inf.

    Raises:
        TypeError: x is not a floating-point tensor of those dtypes, or out has another dtype.
        ValueError: Unknown format or rounding, a format that exceeds float64, a scale that is not
            positive and finite or does not broadcast to x, stochastic rounding without a
            generator, out of another shape or that is the scale, or out where a gradient is
            recorded.

    References:
        Rounding and overflow as in IEEE 754-2019, section 4.3 and 7.4, and gfloat's `round_float`;
        ties with M = 0 as in the latter.
    """
    key = get_format(format).key
    check_input(x)
    scale = checked_scale(scale, x)
    if rounding not in _ROUNDINGS:
        raise ValueError(f"rounding={rounding!r}: expected one of {', '.join(_ROUNDINGS)}")
    if rounding == "stochastic" and generator is None:
        raise ValueError(
            "stochastic rounding needs generator=torch.Generator(device=x.device): AltGrad never "
            "draws from the global generator"
        )
    if out is not None:
        check_out(out, x, scale, result_dtype(x, key, scale))
    elif _is_differentiated(x):
        return _StraightThrough.apply(x, key, scale, rounding, saturate, generator)  # type: ignore[no-any-return, no-untyped-call]
    return _quantize(x, key, scale, rounding, saturate, generator, out)


def _is_differentiated(x: Tensor) -> bool:
    """Whether a derivative by x is recorded, backward or forward; the latter not when compiled."""
    if torch.is_grad_enabled() and x.requires_grad:
        return True
    return not torch.compiler.is_compiling() and unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


class _StraightThrough(torch.autograd.Function):
    """`quantize` whose gradient is that of the identity.

    ``x + (q - x).detach()`` would not do: where x is far above max it gives 0, not max.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        format_key: str,
        scale: float | Tensor,
        rounding: Rounding,
        saturate: bool,
        generator: torch.Generator | None,
    ) -> Tensor:
        return _quantize(x, format_key, scale, rounding, saturate, generator, None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _output: Tensor) -> None:
        ctx.input_dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient.to(ctx.input_dtype), None, None, None, None, None


def _quantize(
    x: Tensor,
    format_key: str,
    scale: float | Tensor,
    rounding: Rounding,
    saturate: bool,
    generator: torch.Generator | None,
    out: Tensor | None,
) -> Tensor:
    wide, divisor = _widen(x, format_key, scale)
    grid = grid_of(format_key)
    saturate = saturate or grid.overflow is None
    # `out` may be x, so whatever is asked of x is asked before y is written.
    infinite = None if saturate else wide.isinf()
    nonzero = wide != 0 if rounding in ("up", "down") else None

    buffer = out if out is not None and out.dtype == wide.dtype else None
    y = wide if divisor is None else torch.div(wide, divisor, out=buffer)
    low, high = _clamp_limits(grid, rounding, saturate, wide.dtype)
    y = torch.clamp(y, low, high, out=buffer if divisor is None else y)
    if nonzero is not None:
        # Below half the smallest step only the sign matters here; y itself may have underflowed.
        tiny = torch.full_like(y, grid.smallest / 2).copysign_(y)
        y = torch.where(nonzero & (y.abs() < grid.smallest / 2), tiny, y)
    y = round_in_place(y, grid, rounding, generator)
    if infinite is not None and grid.overflow is not None:
        beyond = torch.full_like(y, grid.overflow).copysign_(y)
        y = torch.where(infinite | (y.abs() > grid.max), beyond, y)
    if not grid.has_negative_zero:
        y = torch.where(y == 0, 0.0, y)
    if divisor is not None:
        y = y.mul_(divisor)
    if out is None:
        return y.to(result_dtype(x, format_key, scale))
    return out if y is out else out.copy_(y)


def _clamp_limits(
    grid: Grid, rounding: Rounding, saturate: bool, dtype: torch.dtype
) -> tuple[float, float]:
    """Where to clamp before rounding: to ±max where overflow ends there, else to finite numbers."""
    beyond = torch.finfo(dtype).max
    low = grid.max if saturate or rounding in ("toward_zero", "up") else beyond
    high = grid.max if saturate or rounding in ("toward_zero", "down") else beyond
    return -low, high


@torch.no_grad()
def quantize_unbounded(x: Tensor, format: FloatFormat, scale: float | Tensor = 1.0) -> Tensor:
    """`quantize` to nearest on the grid continued beyond its top, as if the exponent had no end.

    ±inf and NaN give NaN. Arguments as in `quantize`; returns the dtype that was computed in.
    """
    wide, divisor = _widen(x, format.key, scale)
    y = wide.clone() if divisor is None else wide / divisor
    y = round_in_place(y, grid_of(format.key), "nearest_even")
    return y if divisor is None else y.mul_(divisor)


@torch.no_grad()
def spacing(
    x: Tensor, format: str | torch.dtype | FloatFormat, scale: float | Tensor = 1.0
) -> Tensor:
    """Distance between the neighbouring points of the scaled grid at x: the stiffness S.

    ``scale · 2**(clamp(floor(log2(abs(x) / scale)), emin, emax) − M)``: constant below the
    smallest normal number and, beyond the top, that of the top. At 0 it is the smallest
    subnormal; ±inf counts as the top; NaN gives NaN. Without subnormals the only neighbours
    below the smallest normal number are that number and 0.

    Args:
        x: float16, bfloat16, float32 or float64, any shape, any device.
        format: A `FloatFormat` or the name of one.
        scale: As in `quantize`.

    Returns:
        A tensor of x's shape, float32, or float64 for float64 x; no gradient.

    Raises:
        TypeError, ValueError: As `quantize`.
    """
    key = get_format(format).key
    check_input(x)
    scale = checked_scale(scale, x)
    wide, divisor = _widen(x, key, scale)
    gap = spacing_at(wide if divisor is None else wide / divisor, grid_of(key))
    return (gap if divisor is None else gap.mul_(divisor)).to(full_dtype(x))


def result_dtype(x: Tensor, format_key: str, scale: float | Tensor) -> torch.dtype:
    """The dtype of x where that surely holds every value of the scaled grid, else the full one.

    It does, if the significand fits, the largest value does, and all are multiples of the dtype's
    smallest. A scale that is no power of two widens the significand.
    """
    full = full_dtype(x)
    if x.dtype == full or isinstance(scale, Tensor):
        return full
    grid, info = grid_of(format_key), torch.finfo(x.dtype)
    holds = (
        math.frexp(scale)[0] == 0.5
        and grid.steps * info.eps <= 1
        and grid.max * scale <= info.max
        and grid.smallest * scale >= info.tiny * info.eps
    )
    return x.dtype if holds else full


def _widen(x: Tensor, format_key: str, scale: float | Tensor) -> tuple[Tensor, Tensor | None]:
    """Bring x to the dtype in which the kernel is exact, and make the scale a tensor; None for 1.

    A number becomes a tensor on x's device because CUDA divides by a number in another way: it
    multiplies by the reciprocal, which gives other values and overflows for scales below 2**-127.
    """
    if isinstance(scale, Tensor):
        at_least = torch.promote_types(x.dtype, scale.dtype)
        dtype = arithmetic_dtype(at_least, format_key, scaled=True)
        return x.to(dtype), scale.to(x.device, dtype)
    if scale == 1:
        return x.to(arithmetic_dtype(x.dtype, format_key, scaled=False)), None
    float32 = torch.finfo(torch.float32)
    at_least = x.dtype if float32.tiny <= scale <= float32.max else torch.float64
    dtype = arithmetic_dtype(at_least, format_key, scaled=True)
    return x.to(dtype), torch.full((), scale, dtype=dtype, device=x.device)
