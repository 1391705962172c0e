"""Count the weights of a model by magnitude, to compare them with the ranges of formats.

`UpdateMonitor.weight_octaves` calls `weight_octaves` and needs no observed step. After an observed
step, ``figures.histogram("weights")`` has a histogram of the measured weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from altgrad.distributed.peers import Peers
from altgrad.measurement.histogram import Histogram
from altgrad.monitor.elements import sample_elements
from altgrad.observation.dtensor import to_local_tensor

# Octaves from 2**−64 to 2**32: the ranges of all narrow formats, and more than weights need.
_FIRST, _BINS = -64, 96
_MOST_ELEMENTS = 1024  # of a layer: a share is then known to 0.016 (one standard error) or better


@torch.no_grad()
def weight_octaves(parameters: Mapping[str, Tensor], peers: Peers) -> Histogram:
    """Estimate the number of weights in each octave of abs(w), from up to 1,024 of each layer.

    Weights that are 0, NaN or inf are not counted; the first and the last bin are open. The cost is
    some operations for each layer and one copy to the host. For sharded parameters, there is also
    one all-reduce.

    Args:
        parameters: Floating-point parameters, by name.
        peers: The ranks that share the parameters.

    Returns:
        The histogram, with estimated counts.

    Raises:
        LostRankError: A rank that shares the parameters has not called this function.
        RuntimeError: The ranks have not met, as they do at `attach`.
    """
    counts = peers.total(lambda: _count_local(parameters, peers), _BINS)
    return Histogram(_FIRST, counts.tolist())


def _count_local(parameters: Mapping[str, Tensor], peers: Peers) -> Tensor:
    """Estimate the counts over the local shards, float64 (bins) on the host."""
    each = [_count_parameter(name, p, peers) for name, p in peers.known(parameters).items()]
    if not each:
        return torch.zeros(_BINS, dtype=torch.float64, device="cpu")
    device = each[0].device
    return torch.stack([counts.to(device) for counts in each]).sum(0).cpu()


def _count_parameter(name: str, parameter: Tensor, peers: Peers) -> Tensor:
    """Estimate the counts over the local shard of a parameter, float64 (bins) on its device."""
    indices = sample_elements(name, parameter.shape, _MOST_ELEMENTS)
    count = parameter.numel() if indices is None else len(indices)
    weight = parameter.numel() / max(count, 1)
    flat = to_local_tensor(parameter.detach()).reshape(-1)
    here = peers.part(name, indices).local
    sample = flat if here is None else flat[here.to(flat.device)]
    # frexp writes w as m · 2**e with 0.5 <= abs(m) < 1, so that abs(w) is in octave e − 1.
    octave = torch.frexp(sample.double()).exponent - 1
    bins = octave.clamp(_FIRST, _FIRST + _BINS - 1) - _FIRST
    counted = ((sample != 0) & sample.isfinite()).double() * weight
    zeros = torch.zeros(_BINS, dtype=torch.float64, device=flat.device)
    return zeros.scatter_add_(0, bins.long(), counted)
