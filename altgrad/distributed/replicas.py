"""Whether replicas of a layer have the same values on all ranks that should have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from altgrad.distributed.ranks import Ranks
from altgrad.distributed.shards import Shard
from altgrad.observation.dtensor import to_local_tensors

_SAMPLED = 16
_TOLERANCE = 0.01
"""Of the largest: replicas that each rank steps by itself may drift in their last digits."""


@torch.no_grad()
def different_replicas(
    parameters: Mapping[str, Tensor], shards: Callable[[str], Shard], ranks: Ranks
) -> list[str]:
    """Return the layers of which ranks have different replicas; equal on all ranks.

    So are layers of which each rank has an expert or a model of its own, which nothing says. A few
    values of each are compared, in one MAX, if there are any replicas.

    Args:
        parameters: By name, alike on all ranks.
        shards: Returns what lies here of each, by name.
        ranks: The ranks.
    """
    copied = {name: each for name, each in parameters.items() if shards(name).part[1] < ranks.size}
    if not copied:
        return []
    parts = [shards(name).part for name in copied]
    slots = sum(count for _, count in parts)

    def take() -> Tensor:
        said = torch.full((3, slots), -torch.inf, dtype=torch.float64, device="cpu")
        first = 0
        for (own, count), values in zip(parts, _sampled(copied), strict=True):
            said[:, first + own] = torch.stack((values.sum(), -values.sum(), values.abs().max()))
            first += count
        return said.flatten()

    largest, minus_smallest, magnitude = ranks.maximum(take, 3 * slots).view(3, slots)
    differ = largest + minus_smallest > _TOLERANCE * magnitude
    by_name = torch.split(differ, [count for _, count in parts])
    return [name for name, each in zip(copied, by_name, strict=True) if each.any()]


def _sampled(parameters: Mapping[str, Tensor]) -> list[Tensor]:
    """Return some elements of what lies here of each, float64 on the host, and a 0."""
    flat = [each.detach().reshape(-1) for each in to_local_tensors(parameters.values())]
    some = [each[:: max(1, -(-len(each) // _SAMPLED))].double() for each in flat]
    on_host = torch.cat([each.to(some[0].device) for each in some]).cpu()
    finite = on_host.nan_to_num(0.0, 0.0, 0.0)
    return [torch.cat((each, each.new_zeros(1))) for each in torch.split(finite, [*map(len, some)])]
