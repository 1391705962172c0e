"""From one tensor's step to its figures: `measure`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from altgrad.quantization.advanced_diagnostics import (
    gradient_stiffness_correlation,
    grid_alignment_statistics,
    ulp_statistics,
)
from altgrad.quantization.arguments import check_pair
from altgrad.quantization.diagnostics import effective_update, visible_mask
from altgrad.quantization.float_format import FloatFormat
from altgrad.quantization.formats import get_formats
from altgrad.quantization.ops import spacing
from altgrad.quantization.scaling import Scaling, compute_scale

DEFAULT_FORMATS = ("bf16", "e4m3fn", "e5m2")
"""What is judged where nothing else is asked: bf16 and the two FP8 formats in use."""


@torch.no_grad()
def measure(
    before: Tensor,
    after: Tensor,
    gradient: Tensor | None = None,
    formats: str | FloatFormat | Iterable[str | torch.dtype | FloatFormat] = DEFAULT_FORMATS,
    scaling: Scaling | None = "tensor",
) -> dict[str, float]:
    """What one optimizer step did to one tensor, and what each format would have kept of it.

    Everything is computed in float64 over the elements that are finite before, after and in the
    gradient; the others are counted in ``nonfinite_frac`` alone. A figure that has no value is
    NaN: nothing moved, no gradient, no element. (Values whose squares leave float64 give inf or
    0.) Where the weights are already stored at or below a format's precision (bf16 weights judged
    for bf16), updates that stalled can no longer be seen, and the what-if figures of that format
    are NaN; ``unmoved_frac`` is the one to read.

    Args:
        before: The weights before the step: float16, bfloat16, float32 or float64, any shape.
        after: The same weights after it, of the same dtype.
        gradient: The gradient as the optimizer applied it: unscaled and clipped. Without it the
            figures that need it are left out.
        formats: Formats or their names, one or several.
        scaling: Which elements share an amax scale, as in `compute_scale`, taken from `before`
            and kept for both sides of the step; None judges the formats unscaled.

    Returns:
        Figures by key: ``metric`` for the tensor, ``metric/format`` for each format, under the
        format's own name: ``stall_frac/e4m3fn`` also where it was asked for as ``"e4m3"``.

        For the tensor: ``weight_rms``, ``update_rms``, ``gradient_rms``, ``update_weight_ratio``
        (norm of the update over that of the weights), ``zero_update_frac``,
        ``zero_gradient_frac``, ``nonfinite_frac``, ``unmoved_frac`` (share of non-zero gradients
        whose weight did not move), ``ulp_mean``, ``ulp_max``, ``ulp_zero_frac``.

        For each format, what-if: ``kept_update_ratio`` (⟨effective update, update⟩ over ⟨update,
        update⟩: 1 is all, 0 is nothing), ``stall_frac`` (share of non-zero updates that vanish),
        ``update_error`` (norm of effective update − update over that of the update),
        ``visible_frac`` (share of non-zero updates that a cast for the forward pass shows).
        Descriptive: ``stiffness_mean``, ``stiffness_min``, ``stiffness_max`` over non-zero
        weights, the four of `grid_alignment_statistics` and the three of
        `gradient_stiffness_correlation`.

    Raises:
        TypeError: Not floating-point tensors, or before and after of different dtypes.
        ValueError: Shapes that differ, an unknown format, two formats of one name, or a wrong
            scaling.

    Example:
        >>> import torch
        >>> from altgrad import measure
        >>> before = torch.ones(4)  # a LayerNorm gain
        >>> after = before + 1e-3  # an update of AdamW at learning rate 1e-3
        >>> figures = measure(before, after, formats=["fp16", "bf16"])
        >>> figures["stall_frac/fp16"], figures["stall_frac/bf16"]
        (0.0, 1.0)
    """
    check_pair("before", before, "after", after)
    finite = before.isfinite() & after.isfinite()
    if gradient is not None:
        check_pair("before", before, "gradient", gradient)
        finite &= gradient.isfinite()
    figures = _figures_of_tensor(before, after, gradient, finite)
    for format in get_formats(formats):
        scale = 1.0 if scaling is None else compute_scale(before, format, scaling=scaling)
        of_format = {
            **_what_if(before, after, finite, format, scale),
            **_descriptive(before, gradient, finite, format, scale),
        }
        figures |= {f"{metric}/{format.name}": value for metric, value in of_format.items()}
    return figures


def _figures_of_tensor(
    before: Tensor, after: Tensor, gradient: Tensor | None, finite: Tensor
) -> dict[str, float]:
    weight = before[finite].double()
    update = after[finite].double() - weight
    ulps = ulp_statistics(before[finite], after[finite])
    figures = {
        "weight_rms": _rms(weight),
        "update_rms": _rms(update),
        "update_weight_ratio": _ratio(update.norm(), weight.norm()),
        "zero_update_frac": _share(update == 0),
        "nonfinite_frac": _share(~finite),
        "ulp_mean": ulps["ulp_mean"],
        "ulp_max": ulps["ulp_max"],
        "ulp_zero_frac": ulps["ulp_zero_frac"],
    }
    if gradient is not None:
        applied = gradient[finite].double()
        figures |= {
            "gradient_rms": _rms(applied),
            "zero_gradient_frac": _share(applied == 0),
            "unmoved_frac": _share(update[applied != 0] == 0),
        }
    return figures


def _what_if(
    before: Tensor, after: Tensor, finite: Tensor, format: FloatFormat, scale: float | Tensor
) -> dict[str, float]:
    """What the grid would have kept of this update."""
    if not format.is_coarser_than(before.dtype):
        return dict.fromkeys(
            ("kept_update_ratio", "stall_frac", "update_error", "visible_frac"), torch.nan
        )
    weight = before.double()
    update = after.double() - weight
    moved = finite & (update != 0)
    effective = effective_update(weight, update, format, scale)[moved]
    visible = visible_mask(before, after, format, scale)[moved]
    update = update[moved]
    return {
        "kept_update_ratio": _ratio(effective.dot(update), update.dot(update)),
        "stall_frac": _share(effective == 0),
        "update_error": _ratio((effective - update).norm(), update.norm()),
        "visible_frac": _share(visible),
    }


def _descriptive(
    before: Tensor,
    gradient: Tensor | None,
    finite: Tensor,
    format: FloatFormat,
    scale: float | Tensor,
) -> dict[str, float]:
    """DIAG-01, 02 and 04; elements to leave out become NaN, which those leave out."""
    weight = torch.where(finite, before, torch.nan)
    nonzero = finite & (before != 0)
    stiffness = spacing(weight, format, scale)[nonzero].double()
    figures = {
        "stiffness_mean": stiffness.mean().item(),
        "stiffness_min": stiffness.min().item() if stiffness.numel() else torch.nan,
        "stiffness_max": stiffness.max().item() if stiffness.numel() else torch.nan,
        **grid_alignment_statistics(weight, format, scale),
    }
    if gradient is not None:
        correlation = gradient_stiffness_correlation(weight, gradient, format=format, scale=scale)
        # The contract of DIAG-04 gives 0.0 without a valid weight; here no value is NaN.
        figures |= correlation if stiffness.numel() else dict.fromkeys(correlation, torch.nan)
    return figures


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def _share(mask: Tensor) -> float:
    return mask.double().mean().item()


def _ratio(numerator: Tensor, denominator: Tensor) -> float:
    """The quotient; NaN where the denominator is zero."""
    return (numerator / denominator).item() if denominator != 0 else torch.nan
