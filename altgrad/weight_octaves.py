"""Where the weights of a model lie by magnitude, which the ranges of formats are held against."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from altgrad.figures import Histogram
from altgrad.sampling import sample_elements

_FIRST, _BINS = -64, 96
_MOST_ELEMENTS = 1024


@torch.no_grad()
def weight_octaves(parameters: Mapping[str, Tensor]) -> Histogram:
    """How many weights lie in each octave of abs(w), estimated from up to 1,024 of each parameter.

    Zeros and what is not finite are in none; the first bin and the last one have no end. It takes
    some operations for each parameter and one copy to the host.

    Args:
        parameters: By name, floating-point.
    """
    of_each = [_of_one(name, parameter.detach()) for name, parameter in parameters.items()]
    if not of_each:
        return Histogram(_FIRST, [0.0] * _BINS)
    device = of_each[0].device
    counts = torch.stack([each.to(device) for each in of_each]).sum(0)
    return Histogram(_FIRST, counts.tolist())


def _of_one(name: str, parameter: Tensor) -> Tensor:
    flat = parameter.reshape(-1)
    indices = sample_elements(name, parameter.shape, _MOST_ELEMENTS)
    sample = flat if indices is None else flat[indices.to(flat.device)]
    weight = flat.numel() / max(sample.numel(), 1)
    octave = torch.frexp(sample.double()).exponent - 1
    bins = octave.clamp(_FIRST, _FIRST + _BINS - 1) - _FIRST
    counted = ((sample != 0) & sample.isfinite()).double() * weight
    zeros = torch.zeros(_BINS, dtype=torch.float64, device=flat.device)
    return zeros.scatter_add_(0, bins.long(), counted)
