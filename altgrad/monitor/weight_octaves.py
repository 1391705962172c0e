"""Where the weights of a model lie by magnitude, which the ranges of formats are held against."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from altgrad.distributed.layers import ShardedLayers
from altgrad.measurement.histogram import Histogram
from altgrad.monitor.elements import sample_elements

_FIRST, _BINS = -64, 96
_MOST_ELEMENTS = 1024


@torch.no_grad()
def weight_octaves(
    parameters: Mapping[str, Tensor], sharded: ShardedLayers | None = None
) -> Histogram:
    """How many weights lie in each octave of abs(w), estimated from up to 1,024 of each parameter.

    Zeros and what is not finite are in none; the first bin and the last one have no end. It takes
    some operations for each parameter and one copy to the host.

    Args:
        parameters: By name, floating-point.
        sharded: What knows where they are, if they are shards: then one SUM over all processes.

    Raises:
        LostRankError: Not all processes that share them have called it.
        RuntimeError: Those have not met, as they do at `attach`.
    """
    if sharded is not None:
        counts = sharded.ranks.total(lambda: _counts(parameters, sharded), _BINS)
    else:
        counts = _counts(parameters, None)
    return Histogram(_FIRST, counts.tolist())


def _counts(parameters: Mapping[str, Tensor], sharded: ShardedLayers | None) -> Tensor:
    of_each = [_of_one(name, parameter, sharded) for name, parameter in parameters.items()]
    if not of_each:
        return torch.zeros(_BINS, dtype=torch.float64)
    device = of_each[0].device
    return torch.stack([each.to(device) for each in of_each]).sum(0).cpu()


def _of_one(name: str, parameter: Tensor, sharded: ShardedLayers | None) -> Tensor:
    indices = sample_elements(name, parameter.shape, _MOST_ELEMENTS)
    count = parameter.numel() if indices is None else len(indices)
    weight = parameter.numel() / max(count, 1)
    flat = parameter.detach() if sharded is None else sharded.here(parameter)
    flat = flat.reshape(-1)
    if sharded is not None:
        indices = sharded.part_of(name, indices).local
    sample = flat if indices is None else flat[indices.to(flat.device)]
    octave = torch.frexp(sample.double()).exponent - 1
    bins = octave.clamp(_FIRST, _FIRST + _BINS - 1) - _FIRST
    counted = ((sample != 0) & sample.isfinite()).double() * weight
    zeros = torch.zeros(_BINS, dtype=torch.float64, device=flat.device)
    return zeros.scatter_add_(0, bins.long(), counted)
