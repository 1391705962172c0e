"""Leave out layers and formats that cannot be judged, and write the notices about them.

Updates can be judged for a format only if the weights are stored finer than the format. Otherwise
the updates that the format would lose are lost before they can be measured. `UpdateMonitor.attach`
calls `leave_out_unjudged`.

Read `measured_layers` first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from altgrad.monitor.layer_settings import LayerSettings
from altgrad.monitor.measured_layers import MeasuredLayers
from altgrad.quantization.arguments import INPUT_DTYPES
from altgrad.quantization.float_format import FloatFormat
from altgrad.quantization.format_set import FormatSet


def leave_out_unjudged(
    layers: MeasuredLayers,
    formats: FormatSet,
    stored: Mapping[Tensor, FloatFormat],
    *,
    has_recipes: bool,
) -> Iterator[str]:
    """Leave out formats whose loss of updates cannot be measured, and yield notices about it.

    The loss cannot be measured if weights are stored no finer than the format, as updates are lost
    by the storage already.

    Only formats of layers in a `WeightStorage` are removed. The figures of weights in a dtype that
    is not finer than a format are NaN by themselves.

    Args:
        layers: The layers that are measured; formats are removed from their settings.
        formats: The formats for which figures (values of metrics) are computed.
        stored: The format in which a `WeightStorage` stores a parameter, by parameter.
        has_recipes: True if recipes are tried out on samples of the layers.

    Returns:
        An iterator over notices for the user.
    """
    settings, parameters = layers.settings, layers.registry.parameters
    figures = _list_own_figures(settings, has_recipes=has_recipes)
    remedy = f"read {' and '.join(figures)}"
    for name, parameter in parameters.items():
        if (element := stored.get(parameter)) is not None:
            yield from _leave_out_formats(name, element, formats, settings, remedy)
    # Parameters that are not trained, such as those of integers, need no notice.
    trained = {name: p.dtype for name, p in parameters.items() if p.requires_grad}
    if others := [name for name, dtype in trained.items() if dtype not in INPUT_DTYPES]:
        yield f"leaves out parameters of other dtypes: {others}"
    for dtype in sorted({*trained.values()} & {*INPUT_DTYPES}, key=str):
        yield from _hidden_in(dtype, formats, remedy)


def _list_own_figures(settings: LayerSettings, *, has_recipes: bool) -> list[str]:
    """Return the figures that tell what a run in 16 bits loses, as far as it has them."""
    if not any(each.twin_elements for each in settings.by_name.values()):
        return ["unmoved_frac"]
    return ["moved_since_start_frac/now", *(["progress_kept/now"] if has_recipes else [])]


def _leave_out_formats(
    name: str, element: FloatFormat, formats: FormatSet, settings: LayerSettings, remedy: str
) -> Iterator[str]:
    """Drop formats no coarser than a layer's stored weights from its settings; yield a notice."""
    judged = settings.get(name).formats
    hidden = [f.name for f in formats if f.name in judged and not f.is_coarser_than(element)]
    if hidden:
        settings.leave_out_formats(name, hidden)
        yield (
            f"cannot judge {', '.join(hidden)} for weights that a WeightStorage stores in "
            f"{element.name}: stalled updates are lost before they can be measured. These formats "
            f"are left out for such layers; {remedy}"
        )


def _hidden_in(dtype: torch.dtype, formats: FormatSet, remedy: str) -> Iterator[str]:
    """Yield a notice if weights of a dtype are stored no finer than some of the formats."""
    judges = zip(formats.names, formats.judged(dtype), strict=True)
    if coarse := [name for name, judged in judges if not judged]:
        yield (
            f"cannot judge {', '.join(coarse)} for weights already stored in {dtype}: "
            "stalled updates are lost before they can be measured, and these figures are NaN; "
            f"{remedy}"
        )
