"""What holds for a whole run as plain data, of which the header of its run file is made.

Nothing here needs torch, so that a report can compare formats with those of a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from altgrad.quantization.number_format import NumberFormat, applied_scaling

if TYPE_CHECKING:
    from torch import Tensor

    from altgrad.observation.rules import LayerSampling
    from altgrad.quantization.formats import Scaling


def describe_run(
    formats: Iterable[NumberFormat], scaling: Scaling | None, layers: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """Return formats, scaling and layers as the header of a run file has them.

    Args:
        formats: Formats that are judged.
        scaling: Which elements share a scale.
        layers: What `describe_layer` returns, by name of the layer.

    Returns:
        A dict with the keys ``formats``, ``scaling`` and ``layers``, which JSON can write.
    """
    return {
        "formats": {format.name: describe_format(format, scaling) for format in formats},
        "scaling": scaling,
        "layers": dict(layers),
    }


def describe_format(format: NumberFormat, scaling: Scaling | None) -> dict[str, Any]:
    """Return range and precision of a format; for a block format those of its elements.

    Args:
        format: The format.
        scaling: Which elements share a scale, in formats that prescribe none.

    Returns:
        A dict of plain numbers, and whether the format is scaled.
    """
    element = format.element
    return {
        "bits": element.bits,
        "max": element.max,
        "smallest": element.smallest_subnormal,
        "smallest_normal": element.smallest_normal,
        "eps": element.eps,
        "scaled": applied_scaling(format, scaling) is not None,
    }


def describe_layer(parameter: Tensor, sampling: LayerSampling, elements: int) -> dict[str, Any]:
    """Return the shape and dtype of a layer, and how it is sampled.

    Args:
        parameter: The parameter.
        sampling: How it is observed.
        elements: Number of elements that are measured in a step.

    Returns:
        A dict that JSON can write.
    """
    return {
        "shape": tuple(parameter.shape),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "elements": elements,
        "formats": sampling.formats,
        "every_n_steps": sampling.every_n_steps,
    }
