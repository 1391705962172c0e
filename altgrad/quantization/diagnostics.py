"""One update on a grid, element by element: what is kept of it, whether it stalls, who sees it.

The weights themselves are stored on the grid, and one scale serves both sides of the step. With Q
for rounding to the scaled grid, to nearest:

    effective update = Q(Q(before) + update) − Q(before)
    stalled          = update ≠ 0 and effective update = 0
    visible          = Q(before) ≠ Q(after)

Under an amax scale the rounding of Q(before) + update is not clamped at the top: a real run would
raise its scale there, and the clamp would count false stalls. At scale 1, the number, there is no
scale to raise, and it is clamped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from altgrad.quantization.arguments import check_pair, full_dtype
from altgrad.quantization.float_format import FloatFormat
from altgrad.quantization.formats import get_format
from altgrad.quantization.ops import quantize, quantize_unbounded


@torch.no_grad()
def effective_update(
    before: Tensor,
    update: Tensor,
    format: str | torch.dtype | FloatFormat,
    scale: float | Tensor = 1.0,
) -> Tensor:
    """What the grid keeps of an update: ``Q(Q(before) + update) − Q(before)``.

    The sum is rounded to float64 first, which could only matter where it needs more than 53 bits.
    Where before or update is NaN or infinite, the result is NaN.

    Args:
        before: The weights before the step: float16, bfloat16, float32 or float64, any shape.
        update: What the optimizer adds to them, of the same shape.
        format: A `FloatFormat` or the name of one.
        scale: As in `quantize`. The number 1 means a format without scaling and is clamped at
            ±max; everything else, a tensor of ones too, counts as an amax scale.

    Returns:
        A tensor of before's shape, float32, or float64 where before or update is; no gradient.

    Raises:
        TypeError, ValueError: Shapes that differ, or as `quantize`.

    References:
        The ratio of this to the update is behind the effective descent quality of Collage (Yu et
        al., ICML 2024).
    """
    format = get_format(format)
    check_pair("before", before, "update", update)
    stored = quantize(before.double(), format, scale)
    effective = _round(stored + update.double(), format, scale).sub_(stored)
    finite = before.isfinite() & update.isfinite()
    dtype = torch.promote_types(full_dtype(before), full_dtype(update))
    return torch.where(finite, effective, torch.nan).to(dtype)


@torch.no_grad()
def stall_mask(
    before: Tensor,
    update: Tensor,
    format: str | torch.dtype | FloatFormat,
    scale: float | Tensor = 1.0,
) -> Tensor:
    """Which weights were to move and do not: update ≠ 0 and effective update = 0.

    Zero updates and NaN or infinite elements do not stall. Arguments and errors as in
    `effective_update`; returns a bool tensor of before's shape.
    """
    return (effective_update(before, update, format, scale) == 0) & (update != 0)


@torch.no_grad()
def visible_mask(
    before: Tensor,
    after: Tensor,
    format: str | torch.dtype | FloatFormat,
    scale: float | Tensor = 1.0,
) -> Tensor:
    """Which weights a forward pass in this format sees move: Q(before) ≠ Q(after).

    For training that keeps fp32 master weights and casts them for the forward pass. Under an amax
    scale neither side is clamped at the top. NaN and infinite elements are not visible.

    Args:
        before: The weights before the step: float16, bfloat16, float32 or float64, any shape.
        after: The weights after it, of the same shape.
        format: A `FloatFormat` or the name of one.
        scale: As in `effective_update`.

    Returns:
        A bool tensor of before's shape.

    Raises:
        TypeError, ValueError: Shapes that differ, or as `quantize`.
    """
    format = get_format(format)
    check_pair("before", before, "after", after)
    differs = _round(before.double(), format, scale) != _round(after.double(), format, scale)
    return differs & before.isfinite() & after.isfinite()


def _round(x: Tensor, format: FloatFormat, scale: float | Tensor) -> Tensor:
    """To nearest; clamped at ±max only where no scale could be raised."""
    is_amax_scale = isinstance(scale, Tensor) or scale != 1
    return quantize_unbounded(x, format, scale) if is_amax_scale else quantize(x, format, scale)
