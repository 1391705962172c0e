"""Where the weights of a model lie by magnitude, which the ranges of formats are held against."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from altgrad.distributed.peers import Peers
from altgrad.measurement.histogram import Histogram
from altgrad.monitor.elements import sample_elements
from altgrad.observation.dtensor import local_of

_FIRST, _BINS = -64, 96
_MOST_ELEMENTS = 1024


@torch.no_grad()
def weight_octaves(parameters: Mapping[str, Tensor], peers: Peers) -> Histogram:
    """Return how many weights lie in each octave of abs(w), from up to 1,024 of each parameter.

    Zeros and what is not finite are in none; the first bin and the last one have no end. It takes
    some operations for each parameter and one copy to the host; of sharded parameters also one SUM
    over all ranks.

    Args:
        parameters: By name, floating-point.
        peers: The ranks that share them.

    Raises:
        LostRankError: Not all ranks that share them have called it.
        RuntimeError: Those have not met, as they do at `attach`.
    """
    counts = peers.total(lambda: _counts(parameters, peers), _BINS)
    return Histogram(_FIRST, counts.tolist())


def _counts(parameters: Mapping[str, Tensor], peers: Peers) -> Tensor:
    """Return the estimated counts of what lies here, float64 (bins) on the host."""
    each = [_counts_of(name, p, peers) for name, p in peers.known(parameters).items()]
    if not each:
        return torch.zeros(_BINS, dtype=torch.float64)
    device = each[0].device
    return torch.stack([counts.to(device) for counts in each]).sum(0).cpu()


def _counts_of(name: str, parameter: Tensor, peers: Peers) -> Tensor:
    indices = sample_elements(name, parameter.shape, _MOST_ELEMENTS)
    count = parameter.numel() if indices is None else len(indices)
    weight = parameter.numel() / max(count, 1)
    flat = local_of(parameter.detach()).reshape(-1)
    here = peers.part(name, indices).local
    sample = flat if here is None else flat[here.to(flat.device)]
    octave = torch.frexp(sample.double()).exponent - 1
    bins = octave.clamp(_FIRST, _FIRST + _BINS - 1) - _FIRST
    counted = ((sample != 0) & sample.isfinite()).double() * weight
    zeros = torch.zeros(_BINS, dtype=torch.float64, device=flat.device)
    return zeros.scatter_add_(0, bins.long(), counted)
