"""`quantize` and `spacing`: the public functions around the rounding kernel.

Both functions check their arguments (`arguments`), choose a dtype in which the kernel is exact,
divide by the scale, call `kernel`, and multiply by the scale again. Read `kernel` first; `scaling`,
which computes scales, comes next.
"""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from altgrad.quantization.arguments import check_input, check_out, get_full_dtype, prepare_scale
from altgrad.quantization.devices import on_exact_device
from altgrad.quantization.float_format import FloatFormat
from altgrad.quantization.formats import get_format
from altgrad.quantization.kernel import (
    Grid,
    Rounding,
    compute_spacing,
    get_arithmetic_dtype,
    get_grid,
    round_in_place,
)

_ROUNDINGS = get_args(Rounding)


@on_exact_device
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

    RN rounds to the format. With a power-of-two scale every value is rounded exactly once, and
    values on the grid do not change. With any other scale the division may round as well.

    - 0 stays 0. −0 stays −0 if the format has −0; otherwise it becomes 0.
    - NaN stays NaN.
    - If `saturate` is True, ±inf and overflow become ±max (times the scale). If `saturate` is
      False, ±inf and overflow become ±inf, or NaN in a format without inf. A format without inf and
      NaN always saturates.
    - As in IEEE 754, a finite value overflows only if its rounding goes away from zero. Thus
      ``"toward_zero"`` never overflows.
    - A tie goes to the even code, also if M = 0. Without subnormals, a tie between 0 and the
      smallest normal number goes to 0.
    - The gradient is passed straight through: it is 1 everywhere, also where x saturates. The
      scale has no gradient.

    Args:
        x: float16, bfloat16, float32 or float64, any shape, any device. On a device without
            float64, such as MPS, the host computes, and the result is copied back.
        format: A `FloatFormat`, or a name or dtype that `get_format` accepts.
        scale: A positive number, or a tensor of positive numbers that broadcasts to x's shape.
            The values of a tensor are not checked, to avoid a synchronisation. Under torch.compile,
            pass a scale that changes as a tensor, because each new number may recompile.
        rounding: ``"nearest_even"``, ``"toward_zero"``, ``"up"``, ``"down"`` or ``"stochastic"``.
            Stochastic rounding has the mean x and does not change values on the grid.
        saturate: If True, ±inf and overflow become ±max; if False, ±inf or NaN.
        generator: The random number generator, on x's device, or on the CPU for a device without
            float64 such as MPS. Only ``"stochastic"`` needs one.
        out: The tensor to write to, with the shape and dtype of the result. It may be x, but must
            not share memory with the scale.

    Returns:
        A tensor of x's shape on x's device. Float32 and float64 x keep their dtype; in float32, a
        value of the format that exceeds float32 becomes ±inf. Float16 and bfloat16 x keep their
        dtype under two conditions: the scale is a number that is a power of two, and the dtype
        holds every value of the scaled grid. Otherwise the result is
        float32: under a scale such as 0.75, and under any scale tensor, whose values stay unread.

    Raises:
        TypeError: x is not a tensor of a supported dtype, the scale is neither a number nor a
            floating-point tensor, or `out` has another dtype.
        ValueError: The format or rounding is unknown, or the format is too wide for float64. The
            scale is not positive and finite, or does not broadcast to x. Stochastic rounding has no
            generator, or one on another device. `out` has another shape, is the scale, or a
            gradient would be recorded.

    Examples:
        >>> import torch
        >>> from altgrad.quantization import quantize
        >>> quantize(torch.tensor([0.3, 1.05, 1000.0]), "e4m3fn").tolist()
        [0.3125, 1.0, 448.0]

    References:
        Rounding and overflow follow IEEE 754-2019, sections 4.3 and 7.4, and gfloat's
        ``round_float``, which also defines ties for formats without mantissa bits.
    """
    key = get_format(format).key
    check_input(x)
    scale = prepare_scale(scale, x)
    if rounding not in _ROUNDINGS:
        raise ValueError(f"rounding={rounding!r}: expected one of {', '.join(_ROUNDINGS)}")
    if rounding == "stochastic":
        _check_generator(generator, x.device)
    if out is not None:
        check_out(out, x, scale, get_result_dtype(x, key, scale))
    elif _is_differentiated(x):
        return _StraightThrough.apply(x, key, scale, rounding, saturate, generator)  # type: ignore[no-any-return, no-untyped-call]
    return quantize_checked(x, key, scale, rounding, saturate, generator, out)


def _check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    """Check that there is a generator that draws on a device.

    Args:
        generator: The random number generator for stochastic rounding.
        device: The device that rounds. On ``meta`` there is nothing to draw.

    Raises:
        ValueError: There is no generator, or it draws on another device.
    """
    if generator is None:
        raise ValueError(
            "rounding='stochastic': expected a generator, because AltGrad does not use the global "
            "one; pass generator=torch.Generator(device=x.device)"
        )
    if device.type not in (generator.device.type, "meta"):
        raise ValueError(
            f"generator is on {generator.device}; expected a generator on {device.type}, where x "
            f"is rounded: pass generator=torch.Generator({device.type!r})"
        )


def _is_differentiated(x: Tensor) -> bool:
    """Return whether a derivative with respect to x is recorded.

    Forward-mode derivatives are not detected under torch.compile, which cannot trace `unpack_dual`.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return True
    return not torch.compiler.is_compiling() and unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


class _StraightThrough(torch.autograd.Function):
    """A version of `quantize` whose gradient is that of the identity.

    The usual ``x + (q - x).detach()`` is wrong for saturated x: in floating-point arithmetic it
    gives 0 instead of max if x is far above max.
    """

    generate_vmap_rule = True  # torch.func.vmap then works on `forward` as it stands

    @staticmethod
    def forward(
        x: Tensor,
        format_key: str,
        scale: float | Tensor,
        rounding: Rounding,
        saturate: bool,
        generator: torch.Generator | None,
    ) -> Tensor:
        return quantize_checked(x, format_key, scale, rounding, saturate, generator, None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _output: Tensor) -> None:
        ctx.input_dtype = inputs[0].dtype  # the result may be wider than x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # One gradient per argument of `forward`; only x has one.
        return gradient.to(ctx.input_dtype), None, None, None, None, None


def quantize_checked(
    x: Tensor,
    format_key: str,
    scale: float | Tensor,
    rounding: Rounding,
    saturate: bool,
    generator: torch.Generator | None,
    out: Tensor | None,
) -> Tensor:
    """Round a tensor as `quantize` does, without checking arguments and without a gradient.

    Args:
        x: The tensor to round.
        format_key: The `FloatFormat.key` of the format.
        scale: The scale as `prepare_scale` returns it.
        rounding: The rounding direction.
        saturate: If True, ±inf and overflow become ±max.
        generator: The random number generator for ``"stochastic"``.
        out: The tensor to write to; None for a new one.

    Returns:
        The rounded tensor, with the dtype that `get_result_dtype` says.
    """
    wide, divisor = _widen(x, format_key, scale)
    grid = get_grid(format_key)
    saturate = saturate or grid.overflow is None  # ±max is the only possible result
    # `out` may be x, so masks of x are computed before y is written.
    infinite = None if saturate else wide.isinf()
    nonzero = wide != 0 if rounding in ("up", "down") else None

    buffer = out if out is not None and out.dtype == wide.dtype else None
    y = wide if divisor is None else torch.div(wide, divisor, out=buffer)
    low, high = _clamp_limits(grid, rounding, saturate, wide.dtype)
    y = torch.clamp(y, low, high, out=buffer if divisor is None else y)
    if nonzero is not None:
        # x ≠ 0 must round up or down even if x / scale has underflowed to 0. All y below half the
        # smallest value round alike, so half the smallest value, with its sign, replaces y.
        tiny = torch.full_like(y, grid.smallest / 2).copysign_(y)
        y = torch.where(nonzero & (y.abs() < grid.smallest / 2), tiny, y)
    y = round_in_place(y, grid, rounding, generator)
    if infinite is not None and grid.overflow is not None:
        beyond = torch.full_like(y, grid.overflow).copysign_(y)
        y = torch.where(infinite | (y.abs() > grid.max), beyond, y)
    if not grid.has_negative_zero:  # −0 == 0, so that this replaces −0
        y = torch.where(y == 0, 0.0, y)
    if divisor is not None:
        y = y.mul_(divisor)
    if out is None:
        return _convert(y, get_result_dtype(x, format_key, scale))
    return out if y is out else out.copy_(y)


def _clamp_limits(
    grid: Grid, rounding: Rounding, saturate: bool, dtype: torch.dtype
) -> tuple[float, float]:
    """Return the lower and upper limit to which values are clamped before they are rounded.

    A limit is ±max where overflow becomes ±max: if `saturate` is True, or if the direction of
    rounding is toward zero on that side. Otherwise the limit is the largest finite number of the
    dtype, with the sign of its side.

    Args:
        grid: The constants of the format.
        rounding: The rounding direction.
        saturate: Whether overflow becomes ±max.
        dtype: The dtype of the values.

    Returns:
        The lower and the upper limit.
    """
    beyond = torch.finfo(dtype).max
    low = grid.max if saturate or rounding in ("toward_zero", "up") else beyond
    high = grid.max if saturate or rounding in ("toward_zero", "down") else beyond
    return -low, high


@torch.no_grad()
def quantize_unbounded(x: Tensor, format: FloatFormat, scale: float | Tensor = 1.0) -> Tensor:
    """Round to the scaled grid of a format as `quantize` does, but without a largest value.

    The scaled grid has the values of the format times the scale. Beyond ±max it continues with the
    same number of values between powers of two.

    Args:
        x: float16, bfloat16, float32 or float64, any shape, any device.
        format: The format.
        scale: A positive number, or a tensor of positive numbers that broadcasts to x's shape.

    Returns:
        A tensor of x's shape, float32 or float64: the dtype in which the kernel is exact. ±inf and
        NaN give NaN.

    Raises:
        ValueError: The format is too wide for float64.
    """
    wide, divisor = _widen(x, format.key, scale)
    y = wide.clone() if divisor is None else wide / divisor
    y = round_in_place(y, get_grid(format.key), "nearest_even")
    return y if divisor is None else y.mul_(divisor)


@on_exact_device
@torch.no_grad()
def spacing(
    x: Tensor, format: str | torch.dtype | FloatFormat, scale: float | Tensor = 1.0
) -> Tensor:
    """Return the distance between neighbouring points of the scaled grid at each value of x.

    The scaled grid has the values of the format times the scale. The spacing, also called stiffness
    S, is ``scale · 2**(clamp(floor(log2(abs(x) / scale)), emin, emax) − M)``.

    - Below the smallest normal number the spacing is constant: the smallest subnormal, also at 0.
    - Above the largest value, and at ±inf, the spacing is that at the largest value.
    - Without subnormals, the spacing below the smallest normal number is that number.
    - NaN gives NaN.

    Args:
        x: float16, bfloat16, float32 or float64, any shape, any device.
        format: A `FloatFormat`, or a name or dtype that `get_format` accepts.
        scale: A positive number, or a tensor of positive numbers that broadcasts to x's shape.

    Returns:
        A tensor of x's shape in units of x, without gradient: float32, or float64 for float64 x.

    Raises:
        TypeError: x is not a tensor of a supported dtype, or the scale is neither a number nor a
            floating-point tensor.
        ValueError: The format is unknown or too wide for float64, or the scale is not positive and
            finite, or does not broadcast to x.

    Examples:
        >>> import torch
        >>> from altgrad.quantization import spacing
        >>> spacing(torch.tensor([0.0, 1.0, 448.0]), "e4m3fn").tolist()
        [0.001953125, 0.125, 32.0]
    """
    key = get_format(format).key
    check_input(x)
    scale = prepare_scale(scale, x)
    wide, divisor = _widen(x, key, scale)
    distance = compute_spacing(wide if divisor is None else wide / divisor, get_grid(key))
    return (distance if divisor is None else distance.mul_(divisor)).to(get_full_dtype(x))


def get_result_dtype(x: Tensor, format_key: str, scale: float | Tensor) -> torch.dtype:
    """Return the dtype of the result of `quantize` for a tensor, format and scale.

    Float32 and float64 x keep their dtype. Float16 and bfloat16 x keep their dtype if the scale is
    a number that is a power of two, and the dtype holds every value of the scaled grid. Otherwise
    the result is float32. A dtype holds the grid under three conditions: the significand fits, the
    largest value fits, and every value is a multiple of the smallest subnormal of the dtype.

    Args:
        x: The tensor to round.
        format_key: The `FloatFormat.key` of the format.
        scale: The scale as `prepare_scale` returns it.

    Returns:
        The dtype of x, float32 or float64.
    """
    full = get_full_dtype(x)
    if x.dtype == full or isinstance(scale, Tensor):
        return full
    grid, info = get_grid(format_key), torch.finfo(x.dtype)
    # Every value is a multiple of the spacing above the smallest normal number.
    spacing = grid.first_binade / grid.points_per_binade
    holds = (
        math.frexp(scale)[0] == 0.5  # a power of two has the significand 0.5
        and math.ldexp(info.eps, grid.significant_bits - 1) <= 1
        and grid.max * scale <= info.max
        and spacing * scale >= info.tiny * info.eps  # the smallest subnormal
    )
    return x.dtype if holds else full


def _widen(x: Tensor, format_key: str, scale: float | Tensor) -> tuple[Tensor, Tensor | None]:
    """Convert x to a dtype in which rounding is exact, and the scale to a tensor of that dtype.

    A scale that is a number becomes a tensor on x's device, because torch on CUDA multiplies by the
    reciprocal of a Python number instead of dividing. The product rounds differently, and overflows
    for scales below ``2**-127``.

    Args:
        x: The tensor to round.
        format_key: The `FloatFormat.key` of the format.
        scale: The scale as `prepare_scale` returns it.

    Returns:
        x in float32 or float64, and the scale as a tensor of the same dtype; None for the number 1.
    """
    if isinstance(scale, Tensor):
        same = x.dtype == scale.dtype
        at_least = x.dtype if same else torch.promote_types(x.dtype, scale.dtype)
        dtype = get_arithmetic_dtype(at_least, format_key, scaled=True)
        return _convert(x, dtype), _convert(scale, dtype, x.device)
    if scale == 1:
        return _convert(x, get_arithmetic_dtype(x.dtype, format_key, scaled=False)), None
    float32 = torch.finfo(torch.float32)
    at_least = x.dtype if float32.tiny <= scale <= float32.max else torch.float64
    dtype = get_arithmetic_dtype(at_least, format_key, scaled=True)
    return _convert(x, dtype), torch.full((), scale, dtype=dtype, device=x.device)


def _convert(x: Tensor, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Return x with a dtype and device; x itself, without an operation, if it has them already."""
    if x.dtype == dtype and (device is None or x.device == device):
        return x  # `to` is an operation in inference mode, in which weights are stored at each step
    return x.to(device=device, dtype=dtype)
