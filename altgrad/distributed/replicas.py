"""Find layers whose replicas, copies on several ranks, differ: experts or separate models."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from altgrad.distributed.ranks import Ranks
from altgrad.distributed.shards import Shard
from altgrad.observation.dtensor import to_local_tensors
from altgrad.quantization.devices import copy_to_host

_SAMPLED = 16
_TOLERANCE = 0.01
"""Largest difference between sums of replicas, as a share of the largest magnitude: replicas that
each rank steps by itself may drift a little."""


@torch.no_grad()
def find_different_replicas(
    parameters: Mapping[str, Tensor], find_shard: Callable[[str], Shard], ranks: Ranks
) -> list[str]:
    """Return the names of layers whose replicas, copies on several ranks, have different values.

    Sums over up to 16 values of each replica are compared, by one MAX all-reduce. Without replicas,
    ranks do not communicate.

    Args:
        parameters: Parameters by name, in the same order on all ranks.
        find_shard: Function that returns the local shard of a layer, given its name.
        ranks: The ranks that share the parameters.
    """
    shards = {name: find_shard(name).part for name in parameters}
    counts = {name: count for name, (_, count) in shards.items() if count < ranks.size}
    if not counts:
        return []

    def find() -> Tensor:
        """Return sum, −sum and largest magnitude of each shard; −inf for shards of other ranks."""
        each = [torch.full((3, n), -torch.inf, device="cpu").double() for n in counts.values()]
        local = _sample(to_local_tensors(parameters[name].detach() for name in counts))
        for place, name, values in zip(each, counts, local, strict=True):
            numbers = values.sum(), -values.sum(), values.abs().max()
            place[:, shards[name][0]] = torch.stack(numbers)
        return torch.cat(each, 1).flatten()

    largest, minus_smallest, size = ranks.maximum(find, 3 * sum(counts.values())).view(3, -1)
    differ = torch.split(largest + minus_smallest > _TOLERANCE * size, [*counts.values()])
    return [name for name, each in zip(counts, differ, strict=True) if each.any()]


def _sample(shards: list[Tensor]) -> list[Tensor]:
    """Return up to 16 elements of each local shard, then a 0: float64 (elements) on the host."""
    flat = [each.reshape(-1) for each in shards]
    some = [each[:: max(1, -(-len(each) // _SAMPLED))] for each in flat]
    on_host = torch.cat([each.double() for each in copy_to_host(some)])
    finite = on_host.nan_to_num(0.0, 0.0, 0.0)
    return [torch.cat((each, each.new_zeros(1))) for each in torch.split(finite, [*map(len, some)])]
