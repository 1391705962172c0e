"""`measure`: what one optimizer step did to one tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from altgrad.measurement.catalogue import NEED_GRADIENT, NEED_TRACKING
from altgrad.measurement.figures import tensor_figures
from altgrad.measurement.measurer import Measurer
from altgrad.quantization.block_formats import Formats
from altgrad.quantization.format_set import FormatSet
from altgrad.quantization.formats import Scaling

DEFAULT_FORMATS = ("bf16", "e4m3fn", "e5m2")
"""What is judged where nothing else is asked: bf16 and the two FP8 formats in use."""


@torch.no_grad()
def measure(
    before: Tensor,
    after: Tensor,
    gradient: Tensor | None = None,
    formats: Formats = DEFAULT_FORMATS,
    scaling: Scaling | None = "tensor",
) -> dict[str, float]:
    """What one optimizer step did to one tensor, and what each format would have kept of it.

    Everything is computed in float64 over the elements that are finite before, after and in the
    gradient; the others are counted in ``nonfinite_frac`` alone. (So are float64 numbers from 1e289
    on.) A figure that has no value is NaN: nothing moved, no gradient, no element. Values whose
    squares or quotients leave float64 give inf, 0 or NaN. Where the weights are already stored at
    or below a format's precision (bf16 weights judged for bf16), updates that stalled can no longer
    be seen, and the what-if figures of that format are NaN; ``unmoved_frac`` is the one to read.

    Args:
        before: The weights before the step: float16, bfloat16, float32 or float64, any shape.
        after: The same weights after it, of the same dtype.
        gradient: The gradient as the optimizer applied it: unscaled and clipped. Without it the
            figures that need it are left out.
        formats: Formats or their names, one or several; block formats (``"mxfp8_e4m3"``,
            ``"nvfp4"``, …) with the scales of their own.
        scaling: Which elements share an amax scale in formats of fewer than 16 bits, as in
            `compute_scale`, taken from `before` and kept for both sides of the step (where all
            that share it are 0 and set none, from `after`); None judges them unscaled, as those of
            16 bits always are.

    Returns:
        Figures by key: ``metric`` for the tensor, ``metric/format`` for each format, under the
        format's own name: ``stall_frac/e4m3fn`` also where it was asked for as ``"e4m3"``.

        `altgrad.measurement.catalogue` has their units, ranges and meanings. First come
        ``kept_update_ratio`` (⟨effective update, update⟩ over ⟨update, update⟩: 1 is all, 0 is
        nothing) and ``stall_frac`` (share of non-zero updates that vanish); what compares the
        gradient is descriptive.

    Raises:
        TypeError: Not floating-point tensors, or before and after of different dtypes.
        ValueError: Shapes that differ, an unknown format, two formats of one name, or a wrong
            scaling.

    Examples:
        >>> import torch
        >>> from altgrad import measure
        >>> before = torch.ones(4)  # a LayerNorm gain
        >>> after = before + 1e-3  # an update of AdamW at learning rate 1e-3
        >>> figures = measure(before, after, formats=["fp16", "bf16"])
        >>> figures["stall_frac/fp16"], figures["stall_frac/bf16"]
        (0.0, 1.0)
    """
    judged = FormatSet(formats, scaling)
    row = Measurer(judged).measure_tensor(before, after, gradient)
    figures = tensor_figures(judged.names, row)
    left_out = NEED_TRACKING if gradient is not None else NEED_TRACKING | NEED_GRADIENT
    return {key: figures[key] for key in figures if key.split("/")[0] not in left_out}
