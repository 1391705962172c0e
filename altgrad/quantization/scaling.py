"""From the largest magnitude of a tensor, channel or block to the scale that fits a format."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from altgrad.quantization.arguments import check_input, full_dtype
from altgrad.quantization.float_format import FloatFormat
from altgrad.quantization.formats import E4M3, Scaling, check_scaling, get_format
from altgrad.quantization.kernel import exact_exp2
from altgrad.quantization.number_format import NumberFormat
from altgrad.quantization.ops import quantize

# Elements of which the magnitude is taken at once: 4 MiB of float32.
_PIECE = 2**20
# Exponents of the normal powers of two: no scale becomes 0, subnormal or infinite.
_EXPONENTS = {torch.float32: (-126, 127), torch.float64: (-1022, 1023)}


@torch.no_grad()
def compute_scale(
    x: Tensor,
    format: str | torch.dtype | FloatFormat,
    *,
    scaling: Scaling = "tensor",
    power_of_two: bool | Literal["floor"] = True,
) -> Tensor:
    """The amax scale: with it, the largest magnitude of x comes to lie at the format's top.

    - An amax of zero, or none at all in an empty tensor, gives a scale of 1.
    - NaN and ±inf are left out of the amax.
    - A scale stays within 2**-126 … 2**127 (2**-1022 … 2**1023 for float64 x). For a format
      whose max is far from 1, or a tensor at the very end of its dtype, amax / max may lie beyond,
      and values then clip or vanish: give such tensors as float64.

    Args:
        x: float16, bfloat16, float32 or float64, any shape.
        format: A `FloatFormat` or the name of one.
        scaling: ``"tensor"``; ``"channel"``, one scale per index of dimension 0; or
            ``("block", size)``, one per `size` neighbours along the last dimension, the tail
            padded with zeros. A tensor without dimensions is one channel and one block.
        power_of_two: ``True`` rounds up to ``2**ceil(log2(amax / max))``, so that nothing clips.
            ``"floor"`` is the rule of OCP's MX formats, ``2**(floor(log2(amax)) -
            floor(log2(max)))``, under which the top of a block may clip. ``False`` is
            ``amax / max``: not a power of two, so that quantize divides inexactly.

    Returns:
        float32 (float64 for float64 x) on x's device, without a gradient: no dimensions for
        ``"tensor"``; shape ``(channels, 1, …)`` for ``"channel"``; x's shape for blocks. Nothing
        is read back to the host.

    Raises:
        TypeError: x is not a floating-point tensor of those dtypes.
        ValueError: Unknown format, scaling or power_of_two.

    References:
        OCP Microscaling Formats (MX) Specification 1.0, section 6.3 for ``"floor"``.
    """
    format = get_format(format)
    check_input(x)
    if not isinstance(power_of_two, bool) and power_of_two != "floor":
        raise ValueError(f"power_of_two={power_of_two!r}: expected True, False or 'floor'")
    check_scaling(scaling)
    scale = scale_from_amax(amax_of(x, scaling), format, power_of_two=power_of_two)
    if isinstance(scaling, str) or x.dim() == 0:
        return scale
    return scale.repeat_interleave(_block_size(scaling, x), dim=-1)[..., : x.shape[-1]]


def scale_from_amax(
    amax: Tensor, format: FloatFormat, *, power_of_two: bool | Literal["floor"] = True
) -> Tensor:
    """The scale for each largest magnitude, of the same shape and dtype; 1 for 0."""
    if power_of_two is False:
        smallest, largest = _EXPONENTS[amax.dtype]
        scale = (amax / format.max).clamp_(2.0**smallest, 2.0**largest)
    else:
        scale = _power_of_two_scale(amax, format, round_up=power_of_two is True)
    return torch.where(amax == 0, 1.0, scale)


def format_scales(amax: Tensor, format: NumberFormat, tensor_amax: Tensor | None = None) -> Tensor:
    """Return the scale that weights in a format are judged and stored under.

    An E4M3 scale that would round to 0, in a block far below the amax of its tensor, is the
    smallest one, 2**-9: a format in which all weights are 0 has no grid to move on.

    Args:
        amax: Largest magnitude of the weights that share each scale, float32 or float64.
        format: The format.
        tensor_amax: Largest magnitude in the tensor of each block, of a shape that broadcasts; for
            formats that have a tensor scale.

    Returns:
        float64 of the shape of `amax`; 1 where that is 0.
    """
    if format.block_size is None:
        return scale_from_amax(amax, format.element).double()
    amax = amax.double()
    if tensor_amax is None or not format.has_tensor_scale:
        scale = scale_from_amax(amax, format.element, power_of_two="floor")
        return scale.clamp_(2.0**-127, 2.0**127)  # the range of e8m0
    tensor_scale = tensor_amax.double() / (E4M3.max * format.element.max)
    # As float32, which it is stored in, neither 0 nor inf.
    float32 = torch.finfo(torch.float32)
    tensor_scale = tensor_scale.clamp(float32.smallest_normal, float32.max).float().double()
    scale = quantize(amax / format.element.max / tensor_scale, E4M3)
    scale = scale.clamp_(min=E4M3.smallest_subnormal) * tensor_scale
    return torch.where(amax == 0, 1.0, scale)


@torch.no_grad()
def amax_of(x: Tensor, scaling: Scaling) -> Tensor:
    """The largest finite magnitude of the tensor, or of each channel or block; 0 without one.

    In pieces along dimension 0, so that no second tensor of the size of x is made.

    Returns:
        float32 (float64 for float64 x): no dimensions for the tensor; ``(channels, 1, …)``; or, for
        blocks, x's shape with the number of blocks for its last dimension.
    """
    length = max(_PIECE * max(x.shape[0], 1) // x.numel(), 1) if x.dim() and x.numel() else 1
    if x.dim() == 0 or length >= x.shape[0]:
        return _amax(_finite_magnitude(x), scaling)
    pieces = [_amax(_finite_magnitude(piece), scaling) for piece in torch.split(x, length)]
    whole = isinstance(scaling, str) and scaling == "tensor"
    return torch.stack(pieces).amax() if whole else torch.cat(pieces)


def _finite_magnitude(x: Tensor) -> Tensor:
    magnitude = x.detach().abs().to(full_dtype(x))
    return magnitude.masked_fill_(~magnitude.isfinite(), 0.0)


def _amax(magnitude: Tensor, scaling: Scaling) -> Tensor:
    """The maximum of each tensor, channel or block; 0 for an empty one."""
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
    """A block is never longer than the last dimension."""
    return max(min(scaling[1], x.shape[-1]), 1)


def _max_or_zero(rows: Tensor) -> Tensor:
    return rows.amax(dim=-1) if rows.shape[-1] else rows.new_zeros(rows.shape[:-1])


def _power_of_two_scale(amax: Tensor, format: FloatFormat, *, round_up: bool) -> Tensor:
    """By exponents alone: a quotient amax / max could round to a power of two and hide the rest."""
    significand, exponent = torch.frexp(amax)  # amax = significand · 2**exponent, from [0.5, 1)
    top_significand, top_exponent = math.frexp(format.max)
    exponent = exponent - top_exponent
    if round_up:
        exponent += (significand > top_significand).int()
    return exact_exp2(exponent.clamp_(*_EXPONENTS[amax.dtype]), amax.dtype)
