"""The effect of one update on a grid, element by element.

The grid is the set of numbers of a format, times a scale. The weights are stored on the grid, and
one scale applies before and after the step. Q rounds to the nearest point of the scaled grid:

    effective update = Q(Q(before) + update) − Q(before)
    stalled          = update ≠ 0 and effective update = 0
    visible          = Q(before) ≠ Q(after)

An amax scale is computed from the largest magnitude of the weights. With such a scale the rounding
of Q(before) + update is not clamped at the largest value. A real run would raise the scale there,
and clamping would count stalls that do not occur. If the scale is the number 1, the format is used
without a scale, and Q clamps.

Read `ops` first. `altgrad.measurement.kernel` computes the same effective updates for many layers
and formats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from altgrad.quantization.arguments import check_pair, get_full_dtype
from altgrad.quantization.devices import on_exact_device
from altgrad.quantization.float_format import FloatFormat
from altgrad.quantization.formats import get_format
from altgrad.quantization.ops import quantize, quantize_unbounded


@on_exact_device
@torch.no_grad()
def effective_update(
    before: Tensor,
    update: Tensor,
    format: str | torch.dtype | FloatFormat,
    scale: float | Tensor = 1.0,
) -> Tensor:
    """Return the part of an update that a format keeps: ``Q(Q(before) + update) − Q(before)``.

    Q rounds to the nearest value of the format times the scale. The sum Q(before) + update is
    computed in float64, which rounds a sum of more than 53 significant bits. The result is NaN
    where `before` or `update` is NaN or infinite.

    Args:
        before: The weights before the step: float16, bfloat16, float32 or float64, any shape.
        update: The update that the optimizer adds to the weights: float16, bfloat16, float32 or
            float64, with the shape of `before`.
        format: A `FloatFormat`, or a name or dtype that `get_format` accepts.
        scale: A positive number, or a tensor of positive numbers that broadcasts to the shape of
            `before`. The number 1 means a format without scaling, which clamps at ±max. Any other
            scale, including a tensor of ones, is an amax scale: a run would raise it for larger
            weights, so that nothing is clamped.

    Returns:
        A tensor with the shape of `before` in units of the weights, without gradient: float32, or
        float64 if `before` or `update` is float64.

    Raises:
        TypeError: A tensor has an unsupported dtype or is sparse, or the scale is neither a number
            nor a floating-point tensor.
        ValueError: The shapes differ, the format is unknown or too wide for float64, or the scale
            is not positive and finite, or does not broadcast.

    Examples:
        >>> import torch
        >>> from altgrad.quantization import effective_update
        >>> update = torch.tensor([0.01, 0.1])
        >>> effective_update(torch.tensor([1.0, 1.0]), update, "e4m3fn")
        tensor([0.0000, 0.1250])

    References:
        Collage (Yu et al., ICML 2024) derives its effective descent quality from the ratio of the
        effective update to the update.
    """
    format = get_format(format)
    check_pair("before", before, "update", update)
    # In float64 the sum below is exact unless it needs more than 53 bits.
    stored = quantize(before.double(), format, scale)
    effective = _round(stored + update.double(), format, scale).sub_(stored)
    finite = before.isfinite() & update.isfinite()
    dtype = torch.promote_types(get_full_dtype(before), get_full_dtype(update))
    return torch.where(finite, effective, torch.nan).to(dtype)


@on_exact_device
@torch.no_grad()
def stall_mask(
    before: Tensor,
    update: Tensor,
    format: str | torch.dtype | FloatFormat,
    scale: float | Tensor = 1.0,
) -> Tensor:
    """Return which weights stall: their update is not 0, but the format keeps nothing of it.

    The part that a format keeps is that of `effective_update`. A weight without an update gives
    False, and so does a NaN or infinite weight or update.

    Args:
        before: The weights before the step: float16, bfloat16, float32 or float64, any shape.
        update: The update that the optimizer adds to the weights: float16, bfloat16, float32 or
            float64, with the shape of `before`.
        format: A `FloatFormat`, or a name or dtype that `get_format` accepts.
        scale: A positive number, or a tensor of positive numbers that broadcasts to the shape of
            `before`. The number 1 means a format without scaling, which clamps at ±max. Any other
            scale, including a tensor of ones, is an amax scale: a run would raise it for larger
            weights, so that nothing is clamped.

    Returns:
        A bool tensor with the shape of `before`.

    Raises:
        TypeError: A tensor has an unsupported dtype or is sparse, or the scale is neither a number
            nor a floating-point tensor.
        ValueError: The shapes differ, the format is unknown or too wide for float64, or the scale
            is not positive and finite, or does not broadcast.

    Examples:
        >>> import torch
        >>> from altgrad.quantization import stall_mask
        >>> stall_mask(torch.tensor([1.0, 1.0]), torch.tensor([0.01, 0.1]), "e4m3fn")
        tensor([ True, False])
    """
    # The effective update of a NaN or infinite element is NaN, which is not equal to 0.
    return (effective_update(before, update, format, scale) == 0) & (update != 0)


@on_exact_device
@torch.no_grad()
def visible_mask(
    before: Tensor,
    after: Tensor,
    format: str | torch.dtype | FloatFormat,
    scale: float | Tensor = 1.0,
) -> Tensor:
    """Return which weights a step changes once cast to a format: ``Q(before) ≠ Q(after)``.

    Q rounds to the nearest value of the format times the scale. The mask is for training with fp32
    master weights, which are cast to the format for the forward pass. A weight that is NaN or
    infinite before or after the step gives False.

    Under an amax scale, neither Q(before) nor Q(after) is clamped: weights that grew beyond ±max
    are compared as if the scale had been raised. A cast under the old scale would clip the weights
    before and after the step to ±max, and show no change.

    Args:
        before: The weights before the step: float16, bfloat16, float32 or float64, any shape.
        after: The weights after the step: float16, bfloat16, float32 or float64, with the shape of
            `before`.
        format: A `FloatFormat`, or a name or dtype that `get_format` accepts.
        scale: A positive number, or a tensor of positive numbers that broadcasts to the shape of
            `before`. The number 1 means a format without scaling, which clamps at ±max. Any other
            scale, including a tensor of ones, is an amax scale: a run would raise it for larger
            weights, so that nothing is clamped.

    Returns:
        A bool tensor with the shape of `before`.

    Raises:
        TypeError: A tensor has an unsupported dtype or is sparse, or the scale is neither a number
            nor a floating-point tensor.
        ValueError: The shapes differ, the format is unknown or too wide for float64, or the scale
            is not positive and finite, or does not broadcast.

    Examples:
        >>> import torch
        >>> from altgrad.quantization import visible_mask
        >>> before, after = torch.tensor([1.0, 448.0]), torch.tensor([1.01, 500.0])
        >>> visible_mask(before, after, "e4m3fn")
        tensor([False, False])
        >>> visible_mask(before, after, "e4m3fn", torch.tensor(1.0))  # an amax scale
        tensor([False,  True])
    """
    format = get_format(format)
    check_pair("before", before, "after", after)
    differs = _round(before.double(), format, scale) != _round(after.double(), format, scale)
    return differs & before.isfinite() & after.isfinite()


def _round(x: Tensor, format: FloatFormat, scale: float | Tensor) -> Tensor:
    """Round to the nearest value of a format times a scale.

    Values beyond the largest value are clamped to it only if `scale` is the Python number 1. Any
    other scale is taken to follow the weights: it would grow with such a value.

    Args:
        x: float64, any shape.
        format: The format.
        scale: A positive number, or a tensor that broadcasts to the shape of x.

    Returns:
        float64, the shape of x.
    """
    is_amax_scale = isinstance(scale, Tensor) or scale != 1
    return quantize_unbounded(x, format, scale) if is_amax_scale else quantize(x, format, scale)
