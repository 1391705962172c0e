"""Amax scales: from the largest finite magnitude to the scale that fits a format.

`compute_scale` is the public function. `compute_amax` finds the amax of a tensor, its channels or
its blocks, and `compute_format_scales` turns amaxes into the scales of any number format. Read
`ops` first. `scale_groups`, after `format_set`, extends this to many layers and formats.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from altgrad.quantization.arguments import check_input, get_full_dtype
from altgrad.quantization.devices import on_exact_device
from altgrad.quantization.float_format import FloatFormat
from altgrad.quantization.formats import E4M3, Scaling, check_scaling, get_format
from altgrad.quantization.kernel import compute_exp2
from altgrad.quantization.number_format import NumberFormat
from altgrad.quantization.ops import quantize

# Number of elements whose magnitude is computed at once: a temporary of 4 MiB in float32.
_PIECE = 2**20
# Exponents of the normal powers of two. Scales stay between them: 0 and inf are useless as scales,
# and hardware may flush subnormal numbers to 0.
_EXPONENTS = {torch.float32: (-126, 127), torch.float64: (-1022, 1023)}


@on_exact_device
@torch.no_grad()
def compute_scale(
    x: Tensor,
    format: str | torch.dtype | FloatFormat,
    *,
    scaling: Scaling = "tensor",
    power_of_two: bool | Literal["floor"] = True,
) -> Tensor:
    """Return the amax scale, which maps the largest magnitude of x to the format's largest value.

    The amax is the largest finite magnitude; NaN and ±inf are ignored. If it is 0, or x is empty,
    the scale is 1. A scale stays within ``2**-126`` to ``2**127`` (``2**-1022`` to ``2**1023`` for
    float64 x). If amax / max lies outside this range, values clip or become 0. This can occur at
    the ends of the range of a dtype, or with a format whose largest value is far from 1; pass x as
    float64 then.

    Args:
        x: float16, bfloat16, float32 or float64, any shape.
        format: A `FloatFormat`, or a name or dtype that `get_format` accepts.
        scaling: ``"tensor"``; ``"channel"``, one scale per index of dimension 0; or
            ``("block", size)``, one scale per `size` neighbours along the last dimension. The last
            block may be shorter. A tensor without dimensions is one channel and one block.
        power_of_two: The rule. True rounds up to ``2**ceil(log2(amax / max))``, so that no value
            clips. The value ``"floor"`` is the rule of OCP's MX formats,
            ``2**(floor(log2(amax)) - floor(log2(max)))``, with which the largest elements may clip.
            False is ``amax / max``, with which the division in `quantize` rounds.

    Returns:
        float32 (float64 for float64 x) on x's device, without gradient. The shape is ``()`` for
        ``"tensor"``, ``(channels, 1, …)`` for ``"channel"``, and x's shape for blocks. No value is
        read on the host.

    Raises:
        TypeError: x is not a tensor of a supported dtype, or `format` is neither a name nor a
            format.
        ValueError: The format, scaling or `power_of_two` is unknown.

    Examples:
        >>> import torch
        >>> from altgrad.quantization import compute_scale
        >>> compute_scale(torch.tensor([1000.0, -0.5]), "e4m3fn")
        tensor(4.)

    References:
        OCP Microscaling Formats (MX) Specification 1.0, section 6.3 for ``"floor"``.
    """
    format = get_format(format)
    check_input(x)
    if not isinstance(power_of_two, bool) and power_of_two != "floor":
        raise ValueError(f"power_of_two={power_of_two!r}: expected True, False or 'floor'")
    check_scaling(scaling)
    scale = compute_scale_from_amax(compute_amax(x, scaling), format, power_of_two=power_of_two)
    if isinstance(scaling, str) or x.dim() == 0:
        return scale
    return scale.repeat_interleave(_block_size(scaling, x), dim=-1)[..., : x.shape[-1]]


def compute_scale_from_amax(
    amax: Tensor, format: FloatFormat, *, power_of_two: bool | Literal["floor"] = True
) -> Tensor:
    """Return the scale in a format for weights up to a given magnitude.

    Args:
        amax: The largest finite magnitude of the weights that share each scale: float32 or float64,
            any shape.
        format: The format; max is its largest value.
        power_of_two: The rule: False is ``amax / max``, True rounds this up to a power of two, and
            ``"floor"`` is OCP's rule for MX formats. See `compute_scale`.

    Returns:
        A tensor with the dtype and shape of `amax`; 1 where `amax` is 0.
    """
    if power_of_two is False:
        smallest, largest = _EXPONENTS[amax.dtype]
        scale = (amax / format.max).clamp_(2.0**smallest, 2.0**largest)
    else:
        scale = _power_of_two_scale(amax, format, round_up=power_of_two is True)
    return scale.masked_fill_(amax == 0, 1.0)


def compute_format_scales(
    amax: Tensor, format: NumberFormat, tensor_amax: Tensor | None = None
) -> Tensor:
    """Return the scale of weights in a number format, by the format's own rule, from each amax.

    If an E4M3 scale would round to 0, in a block far below the amax of the tensor, the smallest
    positive E4M3 number, ``2**-9``, replaces the 0. Otherwise all weights of the block would be 0
    and could not move.

    Args:
        amax: The largest finite magnitude of the weights that share each scale: float32 or float64,
            any shape.
        format: The format.
        tensor_amax: The largest finite magnitude in the tensor that contains each block: float32 or
            float64, a shape that broadcasts to that of `amax`. Formats without a tensor scale
            ignore it. None gives formats with the rule ``"e4m3"`` the scales of the rule
            ``"e8m0"``.

    Returns:
        float64, the shape of `amax`; 1 where `amax` is 0.
    """
    if format.scale == "amax":
        return compute_scale_from_amax(amax, format.element).double()
    amax = amax.double()
    if tensor_amax is None or not format.has_tensor_scale:
        rule: Literal[True, "floor"] = True if format.scale == "e8m0_ceil" else "floor"
        scale = compute_scale_from_amax(amax, format.element, power_of_two=rule)
        return scale.clamp_(2.0**-127, 2.0**127)  # the range of e8m0: 8 bits, bias 127
    # 448 · 6 for NVFP4: the largest scale is then E4M3.max. arXiv 2509.25149, appendix C.
    tensor_scale = tensor_amax.double() / (E4M3.max * format.element.max)
    # NVFP4 stores the tensor scale as float32; clamped, it is neither 0 nor inf.
    float32 = torch.finfo(torch.float32)
    tensor_scale = tensor_scale.clamp(float32.smallest_normal, float32.max).float().double()
    scale = quantize(amax / format.element.max / tensor_scale, E4M3)
    scale = scale.clamp_(min=E4M3.smallest_subnormal) * tensor_scale
    return torch.where(amax == 0, 1.0, scale)


@torch.no_grad()
def compute_amax(x: Tensor, scaling: Scaling) -> Tensor:
    """Return the largest finite magnitude of a tensor, of each channel, or of each block.

    A large tensor is processed in pieces along dimension 0, to avoid a temporary of the size of x.

    Args:
        x: float16, bfloat16, float32 or float64, any shape.
        scaling: The elements that share an amax: ``"tensor"`` (all), ``"channel"`` (an index of
            dimension 0) or ``("block", size)`` (neighbours in the last dimension).

    Returns:
        float32 (float64 for float64 x). The shape is ``()`` for ``"tensor"``, ``(channels, 1, …)``
        for ``"channel"``, and for blocks the shape of x with the number of blocks as last
        dimension. A tensor, channel or block without finite elements gives 0.
    """
    length = max(_PIECE * max(x.shape[0], 1) // x.numel(), 1) if x.dim() and x.numel() else 1
    if x.dim() == 0 or length >= x.shape[0]:
        return _amax(_finite_magnitude(x), scaling)
    pieces = [_amax(_finite_magnitude(piece), scaling) for piece in torch.split(x, length)]
    whole = isinstance(scaling, str) and scaling == "tensor"
    return torch.stack(pieces).amax() if whole else torch.cat(pieces)


def _finite_magnitude(x: Tensor) -> Tensor:
    """Return ``abs(x)`` in float32 or float64, with 0 for NaN and ±inf."""
    magnitude = x.detach().abs().to(get_full_dtype(x))
    return magnitude.masked_fill_(~magnitude.isfinite(), 0.0)


def _amax(magnitude: Tensor, scaling: Scaling) -> Tensor:
    """Return the maximum over all elements that share a scale, with the shape of `compute_amax`.

    The maximum is that of the tensor, of each channel (index of dimension 0), or of each block of
    neighbours in the last dimension, as `scaling` says; 0 without elements.
    """
    if isinstance(scaling, str) and scaling == "tensor":
        return _max_or_zero(magnitude.flatten())
    if magnitude.dim() == 0:
        return magnitude
    if isinstance(scaling, str):
        ones = [1] * (magnitude.dim() - 1)
        return _max_or_zero(magnitude.flatten(1) if ones else magnitude[:, None]).view(-1, *ones)
    size = _block_size(scaling, magnitude)
    tail = -magnitude.shape[-1] % size
    padded = pad(magnitude, (0, tail)) if tail else magnitude
    blocks = padded.shape[-1] // size
    return _max_or_zero(padded.reshape(*padded.shape[:-1], blocks, size))


def _block_size(scaling: tuple[Literal["block"], int], x: Tensor) -> int:
    """Return the smaller of the block size and the length of x's last dimension, at least 1."""
    return max(min(scaling[1], x.shape[-1]), 1)


def _max_or_zero(rows: Tensor) -> Tensor:
    """Return the maximum along the last dimension; 0 if this dimension is empty."""
    return rows.amax(dim=-1) if rows.shape[-1] else rows.new_zeros(rows.shape[:-1])


def _power_of_two_scale(amax: Tensor, format: FloatFormat, *, round_up: bool) -> Tensor:
    """Return the power-of-two scale of weights with each amax, their largest finite magnitude.

    With `round_up` the scale is ``2**ceil(log2(amax / max))``, otherwise that of OCP's floor rule,
    ``2**(floor(log2(amax)) - floor(log2(max)))``. Here max is the format's largest value. Exponents
    and significands are compared separately: a computed quotient amax / max could round down to a
    power of two, under which amax would clip.
    """
    significand, exponent = torch.frexp(amax)  # significand in [0.5, 1)
    top_significand, top_exponent = math.frexp(format.max)
    if round_up:
        exponent += significand > top_significand
    smallest, largest = _EXPONENTS[amax.dtype]
    exponent.clamp_(smallest + top_exponent, largest + top_exponent)
    return compute_exp2(exponent, amax.dtype, offset=-top_exponent)
