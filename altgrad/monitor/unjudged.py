"""Layers and formats that cannot be judged, and what the user is told of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from altgrad.monitor.layer_settings import LayerSettings
from altgrad.monitor.watch import Watch
from altgrad.quantization.arguments import INPUT_DTYPES
from altgrad.quantization.float_format import FloatFormat
from altgrad.quantization.format_set import FormatSet


def leave_out_unjudged(
    watch: Watch, settings: LayerSettings, stored: Mapping[Tensor, FloatFormat]
) -> Iterator[str]:
    """Leave out formats of stored layers, and yield notices of all that cannot be judged.

    Where weights are stored no finer than a format, updates that stalled are no longer there to
    see: the figures of what that format would keep have no value.

    Args:
        watch: The parameters and formats.
        settings: How each layer is observed; changed.
        stored: The format in which a `WeightStorage` stores each of its parameters.
    """
    for name, parameter in watch.parameters.items():
        if (element := stored.get(parameter)) is not None:
            yield from _leave_out_formats(name, element, watch.formats, settings)
    trained = {name: p.dtype for name, p in watch.parameters.items() if p.requires_grad}
    if others := [name for name, dtype in trained.items() if dtype not in INPUT_DTYPES]:
        yield f"leaves out parameters of other dtypes: {others}"
    for dtype in sorted({*trained.values()} & {*INPUT_DTYPES}, key=str):
        yield from _hidden_in(dtype, watch.formats)


def _leave_out_formats(
    name: str, element: FloatFormat, formats: FormatSet, settings: LayerSettings
) -> Iterator[str]:
    judged = settings.of(name).formats
    hidden = [f.name for f in formats if f.name in judged and not f.is_coarser_than(element)]
    if hidden:
        settings.leave_out_formats(name, hidden)
        yield (
            f"cannot judge {', '.join(hidden)} for weights that a WeightStorage stores in "
            f"{element.name}: updates that stalled are no longer there to see, and it "
            "leaves these out for such layers. Read unmoved_frac"
        )


def _hidden_in(dtype: torch.dtype, formats: FormatSet) -> Iterator[str]:
    judges = zip(formats.names, formats.judged(dtype), strict=True)
    if coarse := [name for name, judged in judges if not judged]:
        yield (
            f"cannot judge {', '.join(coarse)} for weights already stored in {dtype}: "
            "updates that stalled are no longer there to see, and those figures are NaN. "
            "Read unmoved_frac"
        )
