"""From tensors to `LayerStatistics`, in chunks that stay in cache; `measure` does it for one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from altgrad.metrics import metrics_of
from altgrad.quantization.advanced_diagnostics import compute_ulp_distance
from altgrad.quantization.arguments import check_pair
from altgrad.quantization.diagnostics import effective_update, visible_mask
from altgrad.quantization.float_format import FloatFormat
from altgrad.quantization.formats import get_formats
from altgrad.quantization.ops import quantize, spacing, spacing_unbounded
from altgrad.quantization.scaling import Scaling, compute_scale
from altgrad.statistics import (
    FIRST_STEPS_OCTAVE,
    FORMAT_MAXIMA,
    FORMAT_SUMS,
    MAXIMA,
    OCTAVES,
    SUMS,
    LayerStatistics,
)

DEFAULT_FORMATS = ("bf16", "e4m3fn", "e5m2")
"""What is judged where nothing else is asked: bf16 and the two FP8 formats in use."""

_CHUNK = 2**16  # elements; some twenty temporaries of float64 are then 10 MiB
_NEED_GRADIENT = {
    *("gradient_rms", "zero_gradient_frac", "unmoved_frac"),
    *("grad_stiff_correlation", "grad_stiff_ratio_mean", "grad_below_stiffness_frac"),
}


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

        `altgrad.metrics` has their units, ranges and meanings. First come ``kept_update_ratio``
        (⟨effective update, update⟩ over ⟨update, update⟩: 1 is all, 0 is nothing) and
        ``stall_frac`` (share of non-zero updates that vanish); what compares the gradient is
        descriptive.

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
    resolved = get_formats(formats)
    (figures,) = metrics_of([statistics_of(before, after, gradient, resolved, scaling)])
    if gradient is None:
        figures = {key: figures[key] for key in figures if key.split("/")[0] not in _NEED_GRADIENT}
    return figures


@torch.no_grad()
def statistics_of(
    before: Tensor,
    after: Tensor,
    gradient: Tensor | None,
    formats: Sequence[FloatFormat],
    scaling: Scaling | None,
) -> LayerStatistics:
    """The statistics that all metrics of one tensor's step follow from; arguments as `measure`."""
    check_pair("before", before, "after", after)
    if before.dtype != after.dtype:
        raise TypeError(
            f"before has dtype {before.dtype} and after {after.dtype}; expected the same"
        )
    if gradient is not None:
        check_pair("before", before, "gradient", gradient)
    scales: list[Any] = [_flat_scale(before, format, scaling) for format in formats]
    w0, w1 = before.reshape(-1), after.reshape(-1)
    g = None if gradient is None else gradient.reshape(-1)
    whole = LayerStatistics.empty([format.name for format in formats], before.device)
    for start in range(0, before.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        step = _step(w0[part], w1[part], None if g is None else g[part])
        parts = [_of_layer(step)]
        for format, scale in zip(formats, scales, strict=True):
            one_for_each = isinstance(scale, Tensor) and scale.dim() > 0
            parts.append(_of_format(step, format, scale[part] if one_for_each else scale))
        sums, maxima = zip(*parts, strict=True)
        whole = whole.merge(LayerStatistics(whole.formats, torch.cat(sums), torch.cat(maxima)))
    return whole


def _flat_scale(x: Tensor, format: FloatFormat, scaling: Scaling | None) -> float | Tensor:
    """The number 1, one amax scale, or one for each element."""
    if scaling is None:
        return 1.0
    scale = compute_scale(x, format, scaling=scaling)
    return scale.expand(x.shape).reshape(-1) if scale.dim() else scale


class _Step(NamedTuple):
    """A chunk of a step in float64; all zeros where an element is not finite."""

    dtype: torch.dtype  # that the weights are stored in
    finite: Tensor
    before: Tensor
    after: Tensor
    update: Tensor
    gradient: Tensor | None
    ulps: Tensor


def _step(before: Tensor, after: Tensor, gradient: Tensor | None) -> _Step:
    finite = before.isfinite() & after.isfinite()
    if gradient is not None:
        finite &= gradient.isfinite()
    w0, w1 = (torch.where(finite, each, 0.0).double() for each in (before, after))
    g = None if gradient is None else torch.where(finite, gradient, 0.0).double()
    ulps = torch.where(finite, compute_ulp_distance(before, after), 0.0).double()
    return _Step(before.dtype, finite, w0, w1, w1 - w0, g, ulps)


def _of_layer(step: _Step) -> tuple[Tensor, Tensor]:
    w, d, g = step.before, step.update, step.gradient
    moved, nonzero = d != 0, w != 0
    paired = torch.zeros_like(w[:0]) if g is None else g.abs()[nonzero & step.finite]
    energy = d.square()
    sums = {
        "elements": w.new_tensor(w.numel()),
        "nonfinite": (~step.finite).sum(),
        "weight_sq": w.dot(w),
        "nonzero_weights": nonzero.sum(),
        "update_sq": energy.sum(),
        "update_4th": energy.dot(energy),
        "moved": moved.sum(),
        "ulps": step.ulps.sum(),
        "gradients": w.new_tensor(0) if g is None else step.finite.sum(),
        "gradient_sq": w.new_tensor(0) if g is None else g.dot(g),
        "nonzero_gradients": w.new_tensor(0) if g is None else (g != 0).sum(),
        "unmoved": w.new_tensor(0) if g is None else ((g != 0) & ~moved).sum(),
        "paired_gradients": w.new_tensor(paired.numel()),
        "paired_gradient_abs": paired.sum(),
        "paired_gradient_sq": paired.dot(paired),
    }
    ulps = step.ulps[moved]
    maxima = {
        "ulps": _max(step.ulps[step.finite]),
        "paired_gradient_abs": _max(paired),
        "minus_paired_gradient_abs": _max(-paired),
    }
    return _vector(sums, SUMS, _octaves(ulps, 0)), _vector(maxima, MAXIMA)


def _of_format(step: _Step, format: FloatFormat, scale: float | Tensor) -> tuple[Tensor, Tensor]:
    w = step.before
    stored = quantize(w, format, scale)
    error = (w - stored).abs()
    stiffness = spacing(w, format, scale)
    of_nonzero = stiffness[w != 0]
    size = stored.abs()
    top = format.max * scale
    sums = {
        "stiffness": of_nonzero.sum(),
        **_pairs(step, stiffness),
        "grid_error": error.sum(),
        "grid_error_sq": error.dot(error),
        "on_grid": (step.finite & (error == 0)).sum(),
        "underflow": ((w != 0) & (stored == 0)).sum(),
        "saturated": (w.abs() > top).sum(),
        "subnormal": ((stored != 0) & (size < format.smallest_normal * scale)).sum(),
        **_what_if(step, format, scale, stiffness),
    }
    steps = sums.pop("steps")
    of_finite = error[step.finite]
    maxima = {
        "grid_error": _max(of_finite),
        "minus_grid_error": _max(-of_finite),
        "stiffness": _max(of_nonzero),
        "minus_stiffness": _max(-of_nonzero),
        "paired_stiffness": _max(of_nonzero if step.gradient is not None else of_nonzero[:0]),
        "minus_paired_stiffness": _max(
            -of_nonzero if step.gradient is not None else of_nonzero[:0]
        ),
    }
    return _vector(sums, FORMAT_SUMS, steps), _vector(maxima, FORMAT_MAXIMA)


def _pairs(step: _Step, stiffness: Tensor) -> dict[str, Tensor]:
    """Gradient and stiffness side by side, where both have a value."""
    nonzero = step.before != 0
    s = stiffness[nonzero] if step.gradient is not None else stiffness[:0]
    g = step.gradient[nonzero].abs() if step.gradient is not None else s
    return {
        "paired_stiffness": s.sum(),
        "paired_stiffness_sq": s.dot(s),
        "stiffness_gradient": s.dot(g),
        "gradient_per_stiffness": (g / s).sum(),
        "gradient_below_stiffness": (g < s).sum(),
    }


def _what_if(
    step: _Step, format: FloatFormat, scale: float | Tensor, stiffness: Tensor
) -> dict[str, Tensor]:
    """What the grid would have kept of the update, had the weights been stored on it."""
    d = step.update if format.is_coarser_than(step.dtype) else torch.zeros_like(step.update)
    moved = d != 0
    effective = effective_update(step.before, d, format, scale)
    kept, lost = effective * d, (effective - d).abs()
    # Stochastic rounding goes to one of the neighbours of Q(before) + update, lost away from one;
    # beyond a top that clamps there is no choice.
    target = quantize(step.before, format, scale) + d
    noise = lost * (spacing_unbounded(target, format, scale) - lost)
    if not isinstance(scale, Tensor):
        noise = torch.where(target.abs() > format.max, 0.0, noise)
    steps = (d.abs() / stiffness).clamp_(max=torch.finfo(d.dtype).max)
    return {
        "judged": moved.sum(),
        "judged_sq": d.dot(d),
        "stalled": (moved & (effective == 0)).sum(),
        "visible": (moved & visible_mask(step.before, step.after, format, scale)).sum(),
        "kept": kept.sum(),
        "lost_sq": lost.dot(lost),
        "kept_sq": kept.dot(kept),
        "kept_update_cubed": kept.dot(d.square()),
        "judged_4th": d.square().dot(d.square()),
        "stochastic_move": steps.clamp(max=1).sum(),
        "stochastic_variance": noise.sum(),
        "steps": _octaves(steps[moved], FIRST_STEPS_OCTAVE),
    }


def _octaves(values: Tensor, first: int) -> Tensor:
    """How many positive values lie in each octave [2**e, 2**(e + 1)), the ends being open."""
    exponent = torch.frexp(values).exponent - 1 - first
    return exponent.clamp_(0, OCTAVES - 1).bincount(minlength=OCTAVES).double()


def _max(values: Tensor) -> Tensor:
    return values.max() if values.numel() else values.new_tensor(-torch.inf)


def _vector(named: dict[str, Tensor], names: Sequence[str], *tail: Tensor) -> Tensor:
    scalars = names[: len(named)]
    return torch.cat((torch.stack([named[name].double() for name in scalars]), *tail))
