"""`ShardSample`: the sampled elements of a layer that one of several ranks steps.

A *rank* is one process of a torch.distributed run. If ranks share a layer, each of its elements is
stepped by one of the ranks that hold it. The optimizer of a rank steps *local shards*, tensors with
the elements that the rank holds, so that torch may round the last elements of each shard in another
way (`layout` says why). Where it may, these are left out, too.

Read `layout` first; `sample` comes next, and draws the elements of whole layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from altgrad.twins.layout import CHUNK

FindPart: TypeAlias = Callable[[Tensor | None], tuple[Tensor, Tensor]]
"""A function that finds those of some elements of a layer that this rank steps.

It takes ascending indices into the flattened layer, int64 (elements) on the CPU; None for all
elements. It returns the indices that this rank steps, and the same elements as indices into the
flattened local shard.
"""


class ShardSample(NamedTuple):
    """The sampled elements of a layer that this rank steps, all of them int64 or bool (elements).

    Attributes:
        indices: The elements, as ascending indices into the flattened layer.
        local: The same elements, as indices into the flattened local shard.
        is_counted: False for elements that are stepped only because torch rounds a small shard as
            a whole. Figures do not count them.
    """

    indices: Tensor
    local: Tensor
    is_counted: Tensor

    def to(self, device: torch.device) -> ShardSample:
        """Return the sample with its tensors on a device."""
        return ShardSample(*(each.to(device) for each in self))


def cut_sample(
    drawn: Tensor, find_part: FindPart, numel: int, ends: Tensor, *, rounds_by_place: bool
) -> ShardSample:
    """Return the part of a layer's sample that this rank steps.

    Args:
        drawn: The sample of the whole layer, ascending indices, int64 (elements) on the CPU.
        find_part: Function that finds which elements this rank steps.
        numel: Number of elements of the local shard.
        ends: For each drawn element, the distance to the end of its block, int64 (elements): 1 for
            the last element, and for single elements. Elements of a block share a scale, and are
            left out together.
        rounds_by_place: True if the place of an element in the shard may decide how torch rounds
            it.

    Returns:
        The part, on the CPU. If places decide about rounding, it has no element behind the last
        full chunk of 64; a shard of fewer than 64 elements is taken whole, if any of it was drawn.
    """
    indices, local = find_part(drawn)
    counted = torch.ones_like(local, dtype=torch.bool)
    if not rounds_by_place or not len(indices):
        return ShardSample(indices, local, counted)
    if numel < CHUNK:
        every, places = find_part(None)
        return ShardSample(every, places, torch.isin(every, indices))
    within = local + ends[torch.searchsorted(drawn, indices)] <= numel - numel % CHUNK
    return ShardSample(indices[within], local[within], counted[within])
