"""`measure`: judge formats by one optimizer step of one tensor.

This is the door of the room for one tensor. Read `measurer` next, which does the work;
`altgrad.monitor` judges a whole model, step by step.
"""

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
"""The formats that are judged by default: bf16 and the two FP8 formats in use."""


@torch.no_grad()
def measure(
    before: Tensor,
    after: Tensor,
    gradient: Tensor | None = None,
    formats: Formats = DEFAULT_FORMATS,
    scaling: Scaling | None = "tensor",
) -> dict[str, float]:
    """Measure one optimizer step of one tensor, and what each format would have kept of it.

    - All figures are computed in float64, over the elements that are finite before the step, after
      it and in the gradient. ``nonfinite_frac`` counts the other elements, and float64 numbers of
      1e289 or more.
    - A figure is NaN if it has no value: nothing moved, or the tensor is empty. It is inf, 0 or NaN
      if squares or quotients leave the range of float64.
    - What-if figures of a format are NaN if the weights are stored no finer than the format, such
      as bfloat16 weights judged for bf16. Stalled updates are then lost before they can be
      measured; read ``unmoved_frac`` instead.

    Args:
        before: Weights before the step, float16, bfloat16, float32 or float64, any shape.
        after: The same weights after the step, with the dtype and shape of `before`.
        gradient: The gradient as the optimizer applied it, unscaled and clipped, with the shape of
            `before`. If None, figures that need it are left out.
        formats: One or several formats, or their names. Block formats (``"mxfp8_e4m3"``,
            ``"nvfp4"``, …) use their own scales. The scale of a whole tensor in nvfp4 follows from
            `before`; `UpdateMonitor` keeps its amax from step to step, as it keeps every amax.
        scaling: Which elements share an amax scale in formats of fewer than 16 bits, as in
            `compute_scale`. The amax is taken from `before` and kept for both sides of the step;
            it is taken from `after` if `before` is all 0. With None all formats are judged with
            scale 1. Formats of 16 bits always are.

    Returns:
        Figures by key: ``metric`` for the tensor, ``metric/format`` for each format. The key has
        the canonical name of a format, such as ``stall_frac/e4m3fn`` for ``"e4m3"``.

        Read ``kept_update_ratio`` and ``stall_frac`` first. The former is ⟨effective update,
        update⟩ over ⟨update, update⟩: 1 is all, 0 is nothing. The latter is the share of non-zero
        updates of which the grid keeps nothing. `altgrad.measurement.catalogue` lists the unit,
        range and meaning of all. Metrics that compare the gradient are descriptive.

    Raises:
        TypeError: A tensor is not floating-point, or `before` and `after` differ in dtype.
        ValueError: Shapes differ, a format is unknown, two formats have one name, or `scaling` is
            invalid.

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
    # One step has no history, and never_moved_frac is over all steps.
    left_out = NEED_TRACKING if gradient is not None else NEED_TRACKING | NEED_GRADIENT
    return {key: figures[key] for key in figures if key.split("/")[0] not in left_out}
