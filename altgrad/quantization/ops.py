"""The one rounding kernel: `quantize` and `spacing`.

Write the scaled input as y = t · p / 2**M, where p is the power of two below abs(y), never under
2**emin. The grid points around y are then the integers around t, and p / 2**M is the distance
between them. p comes from the exponent bits of y, so nothing here takes a logarithm, and every
step but the rounding of t itself is exact.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, ParamSpec, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor

from altgrad.quantization.formats import FloatFormat, get_format

Rounding: TypeAlias = Literal["nearest_even", "toward_zero", "up", "down", "stochastic"]
"""How a value between two grid points is decided; the names are IEEE 754's, up being toward +∞."""

_INPUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_EXPONENT_MASK = {torch.float32: 0x7F80_0000, torch.float64: 0x7FF0_0000_0000_0000}
_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}
_ARITHMETIC = ((torch.float32, 23, -126, 127), (torch.float64, 52, -1022, 1023))
_ROUNDINGS = get_args(Rounding)
_P = ParamSpec("_P")
_T = TypeVar("_T")

_ROUND_IN_PLACE: dict[Rounding, Callable[[Tensor], Tensor]] = {
    "nearest_even": Tensor.round_,
    "toward_zero": Tensor.trunc_,
    "up": Tensor.ceil_,
    "down": Tensor.floor_,
}


class _Grid(NamedTuple):
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
    """Cache a function of formats and dtypes, and let torch.compile take its result as constant.

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
def _grid_of(format: FloatFormat) -> _Grid:
    """The kernel's constants for a format."""
    return _Grid(
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
    - With M = 0 a tie goes to the even code.
    - The gradient is passed straight through: ones everywhere, also where x saturates. The scale
      gets none.

    Args:
        x: float16, bfloat16, float32 or float64, any shape, any device.
        format: A `FloatFormat` or the name of one.
        scale: A positive number, or a tensor of positive numbers that broadcasts to x's shape.
            A tensor's values are not checked, which would cost a synchronisation.
        rounding: ``nearest_even``, ``toward_zero``, ``up``, ``down`` or ``stochastic``, which
            moves up with the probability that makes the mean x, and never moves a grid value.
        saturate: Whether ±inf and overflow become ±max.
        generator: The source of randomness, on x's device; needed by stochastic rounding alone.
        out: Where to write the result, of its shape and dtype; x itself is allowed.

    Returns:
        A tensor of x's shape on x's device. Its dtype is x's where that holds every value of the
        scaled grid, else float32 (float64 for float64). So that this never depends on a tensor's
        values, half-precision x with a tensor scale gives float32. In float32, a value of a
        format that exceeds it becomes ±inf.

    Raises:
        TypeError: x is not a floating-point tensor of those dtypes, or out has another dtype.
        ValueError: Unknown format or rounding, a format that exceeds float64, a scale that is not
            positive and finite or does not broadcast to x, stochastic rounding without a
            generator, out of another shape, or out where a gradient is recorded.

    References:
        Rounding and overflow as in IEEE 754-2019, section 4.3 and 7.4, and gfloat's `round_float`;
        ties with M = 0 as in the latter.
    """
    format = get_format(format)
    check_input(x)
    _check_scale(scale, x)
    if rounding not in _ROUNDINGS:
        raise ValueError(f"rounding={rounding!r}: expected one of {', '.join(_ROUNDINGS)}")
    if rounding == "stochastic" and generator is None:
        raise ValueError(
            "stochastic rounding needs generator=torch.Generator(device=x.device): AltGrad never "
            "draws from the global generator"
        )
    records_gradient = torch.is_grad_enabled() and x.requires_grad
    if out is not None:
        _check_out(out, x, result_dtype(x, format, scale), records_gradient)
    if records_gradient:
        return _StraightThrough.apply(x, format, scale, rounding, saturate, generator)  # type: ignore[no-any-return, no-untyped-call]
    return _quantize(x, format, scale, rounding, saturate, generator, out)


class _StraightThrough(torch.autograd.Function):
    """`quantize` whose gradient is that of the identity.

    ``x + (q - x).detach()`` would not do: where x is far above max it gives 0, not max.
    """

    @staticmethod
    def forward(
        _ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        format: FloatFormat,
        scale: float | Tensor,
        rounding: Rounding,
        saturate: bool,
        generator: torch.Generator | None,
    ) -> Tensor:
        return _quantize(x, format, scale, rounding, saturate, generator, None)

    @staticmethod
    def backward(
        _ctx: torch.autograd.function.FunctionCtx, gradient: Tensor
    ) -> tuple[Tensor, None, None, None, None, None]:
        return gradient, None, None, None, None, None


def _quantize(
    x: Tensor,
    format: FloatFormat,
    scale: float | Tensor,
    rounding: Rounding,
    saturate: bool,
    generator: torch.Generator | None,
    out: Tensor | None,
) -> Tensor:
    wide, divisor = _widen(x, format, scale)
    grid = _grid_of(format)
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
    y = _round_in_place(y, grid, rounding, generator)
    if infinite is not None and grid.overflow is not None:
        beyond = torch.full_like(y, grid.overflow).copysign_(y)
        y = torch.where(infinite | (y.abs() > grid.max), beyond, y)
    if not grid.has_negative_zero:
        y = torch.where(y == 0, 0.0, y)
    if divisor is not None:
        y = y.mul_(divisor)
    if out is None:
        return y.to(result_dtype(x, format, scale))
    return out if y is out else out.copy_(y)


def _clamp_limits(
    grid: _Grid, rounding: Rounding, saturate: bool, dtype: torch.dtype
) -> tuple[float, float]:
    """Where to clamp before rounding: to ±max where overflow ends there, else to finite numbers."""
    beyond = torch.finfo(dtype).max
    low = grid.max if saturate or rounding in ("toward_zero", "up") else beyond
    high = grid.max if saturate or rounding in ("toward_zero", "down") else beyond
    return -low, high


def _round_in_place(
    y: Tensor, grid: _Grid, rounding: Rounding, generator: torch.Generator | None = None
) -> Tensor:
    """Round y, float32 or float64, to the grid continued beyond its top; ±inf becomes NaN.

    ±inf needs no value here: `quantize` clamps first, the diagnostics leave it out. The division
    by p / 2**M is made in two steps, as is its reverse: p / 2**M may be subnormal (bf16), and
    where a CPU or GPU flushes subnormals to zero the kernel would then divide by zero.
    """
    binade = _power_of_two_below(y).clamp_(min=grid.first_binade)
    steps: float | Tensor = grid.steps
    if not grid.has_subnormals:  # then nothing lies between 0 and 2**emin
        steps = torch.where(y.abs() < grid.first_binade, 1.0, grid.steps)
    t = y.div_(binade).mul_(steps)
    if rounding == "stochastic":
        t = _round_stochastically(t, generator)
    elif rounding == "nearest_even" and grid.steps == 1:
        t = _round_to_even_code(t, binade, grid.bias)
    else:
        t = _ROUND_IN_PLACE[rounding](t)
    return t.mul_(1 / steps).mul_(binade)


def _power_of_two_below(y: Tensor) -> Tensor:
    """The largest power of two up to abs(y); 0 for 0 and subnormal y, inf for inf and NaN."""
    exponent_bits = y.view(_INTEGER[y.dtype]).bitwise_and(_EXPONENT_MASK[y.dtype])
    return exponent_bits.view(y.dtype)


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
    mantissa_bits, dtype_bias = (23, 127) if t.dtype == torch.float32 else (52, 1023)
    exponent = (binade.view(_INTEGER[t.dtype]) >> mantissa_bits) - dtype_bias
    code_is_even = (exponent + bias) % 2 == 0
    tie_to_below = (t.abs() == 1.5) & code_is_even
    return torch.where(tie_to_below, t.trunc(), t.round())


@torch.no_grad()
def quantize_unbounded(x: Tensor, format: FloatFormat, scale: float | Tensor = 1.0) -> Tensor:
    """`quantize` to nearest on the grid continued beyond its top, as if the exponent had no end.

    ±inf and NaN give NaN. Arguments as in `quantize`; returns the dtype that was computed in.
    """
    wide, divisor = _widen(x, format, scale)
    y = wide.clone() if divisor is None else wide / divisor
    y = _round_in_place(y, _grid_of(format), "nearest_even")
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
    format = get_format(format)
    check_input(x)
    _check_scale(scale, x)
    wide, divisor = _widen(x, format, scale)
    grid = _grid_of(format)
    y = wide if divisor is None else wide / divisor
    magnitude = y.abs().clamp_(grid.first_binade, grid.last_binade)
    gap = _power_of_two_below(magnitude).mul_(1 / grid.steps)
    if not grid.has_subnormals:
        gap = torch.where(y.abs() < grid.first_binade, grid.first_binade, gap)
    if divisor is not None:
        gap = gap.mul_(divisor)
    # NaN has become inf; what is added is 0, and NaN to NaN, at a third of the cost of a where.
    return gap.add_(magnitude.sub_(magnitude)).to(full_dtype(x))


def result_dtype(x: Tensor, format: FloatFormat, scale: float | Tensor) -> torch.dtype:
    """The dtype of x where that surely holds every value of the scaled grid, else the full one.

    It does, if the significand fits, the largest value does, and all are multiples of the dtype's
    smallest. A scale that is no power of two widens the significand.
    """
    full = full_dtype(x)
    if x.dtype == full or isinstance(scale, Tensor):
        return full
    grid, info = _grid_of(format), torch.finfo(x.dtype)
    holds = (
        math.frexp(scale)[0] == 0.5
        and grid.steps * info.eps <= 1
        and grid.max * scale <= info.max
        and grid.smallest * scale >= info.tiny * info.eps
    )
    return x.dtype if holds else full


def full_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 x, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@_constant_of_the_trace
def _arithmetic_dtype(dtype: torch.dtype, format: FloatFormat, scaled: bool) -> torch.dtype:
    """The narrowest dtype, float32 or float64, at least `dtype`, in which the kernel is exact.

    It is where p and t fit. Under a scale x / scale may underflow as well: that does no harm below
    half the smallest value, so this half must not be subnormal.
    """
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


def _widen(x: Tensor, format: FloatFormat, scale: float | Tensor) -> tuple[Tensor, Tensor | None]:
    """Bring x to the dtype in which the kernel is exact, and make the scale a tensor; None for 1.

    A number becomes a tensor on x's device because CUDA divides by a number in another way: it
    multiplies by the reciprocal, which gives other values and overflows for scales below 2**-127.
    """
    if isinstance(scale, Tensor):
        at_least = torch.promote_types(x.dtype, scale.dtype)
        dtype = _arithmetic_dtype(at_least, format, scaled=True)
        return x.to(dtype), scale.detach().to(x.device, dtype)
    if scale == 1:
        return x.to(_arithmetic_dtype(x.dtype, format, scaled=False)), None
    float32 = torch.finfo(torch.float32)
    at_least = x.dtype if float32.tiny <= scale <= float32.max else torch.float64
    dtype = _arithmetic_dtype(at_least, format, scaled=True)
    return x.to(dtype), torch.full((), scale, dtype=dtype, device=x.device)


def check_input(x: Tensor, name: str = "x") -> None:
    """TypeError unless x is a tensor of a dtype that is rounded here."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in _INPUT_DTYPES:
        raise TypeError(
            f"{name} has dtype {x.dtype}; expected float16, bfloat16, float32 or float64 "
            f"(convert with {name}.float(), which is exact for narrower floating-point dtypes)"
        )


def _check_scale(scale: float | Tensor, x: Tensor) -> None:
    if not isinstance(scale, Tensor):
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise TypeError(f"scale={scale!r}: expected a number or a tensor")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale={scale!r}: expected a positive finite number")
        return
    if not scale.is_floating_point():
        raise TypeError(f"scale has dtype {scale.dtype}; expected a floating-point tensor")
    fits = scale.dim() <= x.dim() and all(
        size in (1, of_x)
        for size, of_x in zip(reversed(scale.shape), reversed(x.shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"scale of shape {tuple(scale.shape)} does not broadcast to x of shape "
            f"{tuple(x.shape)}; expected one factor, one per channel of shape (channels, 1, …), "
            "or one per element, as compute_scale returns them"
        )


def _check_out(out: Tensor, x: Tensor, dtype: torch.dtype, records_gradient: bool) -> None:
    if records_gradient or (torch.is_grad_enabled() and out.requires_grad):
        raise ValueError(
            "out= cannot record a gradient: x or out requires one; call under torch.no_grad() or "
            "leave out= away"
        )
    if out.dtype != dtype:
        raise TypeError(f"out has dtype {out.dtype}; the result has {dtype}")
    if out.shape != x.shape:
        raise ValueError(f"out has shape {tuple(out.shape)}; the result has {tuple(x.shape)}")
