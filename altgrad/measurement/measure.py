"""`measure`: compute what number formats would keep of an optimizer step of one tensor.

`altgrad.measure` is this function.

Read `measurer` next, which does the work; `altgrad.monitor` measures a whole model, step by step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from altgrad.measurement.catalogue import NEED_GRADIENT, NEED_TRACKING
from altgrad.measurement.figures import tensor_figures
from altgrad.measurement.measurer import Measurer
from altgrad.measurement.native_code import native_code
from altgrad.quantization.block_formats import Formats
from altgrad.quantization.devices import on_exact_device
from altgrad.quantization.format_set import FormatSet
from altgrad.quantization.formats import Scaling

DEFAULT_FORMATS = ("bf16", "e4m3fn", "e5m2")
"""Names of the default formats: bf16 and the two FP8 formats that hardware has."""


@on_exact_device
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
      it and in the gradient. ``nonfinite_frac`` is the share of other elements. Numbers of 1e289 or
      more, which float64 can hold, count as not finite.
    - A figure is NaN if it has no value: nothing moved, or the tensor is empty. It is inf, 0 or NaN
      if squares or quotients leave the range of float64.
    - What-if figures say what a format would have kept of the update. They are NaN if the dtype of
      the weights is no finer than the format, as for bfloat16 weights and bf16. Updates that bf16
      would lose are then lost before they can be measured. Of a single step ``unmoved_frac`` tells
      that, and of a training `UpdateMonitor`, with ``moved_since_start_frac/now``.

    Args:
        before: Weights before the step, float16, bfloat16, float32 or float64, any shape.
        after: The same weights after the step, with the dtype and shape of `before`.
        gradient: The gradient as the optimizer applied it, unscaled and clipped, with the shape of
            `before`. If None, figures that need it are left out.
        formats: One or several formats, or their names. Block formats (``"mxfp8_e4m3"``,
            ``"nvfp4"``, …) have scales of their own. In nvfp4 the scale of the whole tensor follows
            from the amax, the largest magnitude, of `before`; `UpdateMonitor` keeps this amax from
            step to step.
        scaling: Elements that share an amax scale in formats of fewer than 16 bits: ``"tensor"``,
            ``"channel"`` or ``("block", size)``, as in `compute_scale`. The scale follows from the
            amax of `before`, or of `after` where that is 0, and is the same before and after the
            step. None means no scale. Formats of 16 bits never have one.

    Returns:
        Figures by key: ``metric`` for the tensor, ``metric/format`` for each format. The key has
        the canonical name of a format, such as ``stall_frac/e4m3fn`` for ``"e4m3"``.

        Read ``kept_update_ratio`` and ``stall_frac`` first. The former is ⟨effective update,
        update⟩ over ⟨update, update⟩: 1 is all, 0 is nothing. The latter is the share of updates
        other than 0 of which the format's grid keeps nothing. `altgrad.measurement.catalogue` lists
        the unit, range and meaning of each metric. Metrics that compare the gradient with the grid
        do not predict what training loses, as they ignore the optimizer and the learning rate.

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
    if before.device.type == "cpu":
        native_code.prepare(compiles=False)  # used where it is compiled already
    row = Measurer(judged).measure_tensor(before, after, gradient)
    figures = tensor_figures(judged.names, row)
    # never_moved_frac is over all observed steps, and there is only one here.
    left_out = NEED_TRACKING if gradient is not None else NEED_TRACKING | NEED_GRADIENT
    return {key: figures[key] for key in figures if key.split("/")[0] not in left_out}
