"""`Shard`: the elements of a parameter that one rank holds, read from a DTensor's placements.

A sample has the elements that all ranks together measure. Shards and samples are described by flat
indices into the whole parameter, in row-major order. Each element of a sample is measured by one of
the ranks that hold the element. Read `Shard.read` first; `layers` comes next, which keeps the
shards of a whole model.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from altgrad.observation.dtensor import is_sharded, to_local_tensor

Held = range | Tensor
"""Ascending indices along one dimension of a parameter: a range, or a tensor int64 (indices)."""


class Part(NamedTuple):
    """The elements that one rank measures, among the measured elements of a parameter.

    Attributes:
        indices: Index of each element in the flattened whole parameter, int64 (elements). None for
            the whole parameter.
        local: Index of each element in the flattened local shard, int64 (elements). None for the
            whole shard.
        positions: Position of each element among the elements that all ranks together measure,
            int64 (elements). None for all positions.
    """

    indices: Tensor | None
    local: Tensor | None
    positions: Tensor | None


def empty_part() -> Part:
    """Return the `Part` of a rank that measures no elements: three tensors int64 (0) on the CPU."""
    return Part(*[torch.empty(0, dtype=torch.int64, device="cpu")] * 3)


class _Cut(NamedTuple):
    """A division of one dimension of a DTensor between the ranks along one mesh dimension.

    Attributes:
        parts: Size of the mesh dimension, which is the number of parts of the tensor dimension.
        own: Number of the part that this rank holds, from 0.
        pieces: The ``split_factor`` of torch's ``_StridedShard``, otherwise 1. The dimension is cut
            into this number of pieces first, and each piece into `parts`.
    """

    parts: int
    own: int
    pieces: int = 1


class Shard(NamedTuple):
    """A description of a local shard: which elements of a parameter one rank holds.

    Attributes:
        shape: Shape of the whole parameter.
        held: For each dimension the indices along the dimension that this rank holds.
        counts: True if this rank measures the shard; False on other ranks that hold a replica.
        last_cuts: The divisions of the last dimension between ranks, one for each mesh dimension
            that divides it.
        part: Number of this shard, from 0, and number of all shards. Ranks with the same number
            hold replicas.
    """

    shape: torch.Size
    held: tuple[Held, ...]
    counts: bool
    last_cuts: tuple[_Cut, ...] = ()
    part: tuple[int, int] = (0, 1)

    @classmethod
    def read(cls, name: str, parameter: Any, rank: int) -> Shard:
        """Find which elements of a parameter this rank holds; of a plain tensor these are all.

        Args:
            name: Name of the layer, for errors.
            parameter: The parameter, a DTensor or a plain tensor.
            rank: The number of this rank.

        Returns:
            The indices that this rank holds along each dimension, and whether this rank measures
            them, or another rank that holds a replica.

        Raises:
            ValueError: The mesh leaves this rank out, a placement is ``Partial``, or the local
                tensor has another shape than the placements say.
        """
        shape = parameter.shape
        if not is_sharded(parameter):
            return cls(shape, tuple(range(length) for length in shape), rank == 0)
        mesh, placements = parameter.device_mesh, parameter.placements
        coordinate = mesh.get_coordinate()
        known = all(p.is_replicate() or _dimension(p) is not None for p in placements)
        if coordinate is None:
            raise ValueError(
                f"{name}: expected a device_mesh with every rank, got ranks "
                f"{mesh.mesh.flatten().tolist()} without rank {rank}; leave {name} out of the "
                "optimizer, or extend the mesh"
            )
        if not known:
            raise ValueError(
                f"{name}.placements={placements}: expected shards and replicas, since a Partial "
                "tensor has no elements before it is reduced; redistribute it, or leave it out of "
                "the optimizer"
            )
        if not shape.numel():  # torch shards what is empty as it likes
            return cls(shape, tuple(range(length) for length in shape), rank == 0)
        cuts = _cuts(shape, placements, mesh.shape, coordinate)
        held = tuple(_held(size, own) for size, own in zip(shape, cuts, strict=True))
        if tuple(map(len, held)) != tuple(to_local_tensor(parameter.detach()).shape):
            raise ValueError(
                f"{name}.placements={placements}: expected a local shard of shape "
                f"{tuple(map(len, held))} from {tuple(shape)} on a mesh of {tuple(mesh.shape)}, "
                f"got {tuple(to_local_tensor(parameter.detach()).shape)}; leave {name} out of the "
                "optimizer"
            )
        first = all(c == 0 for c, p in zip(coordinate, placements, strict=True) if p.is_replicate())
        # Where each mesh has its own ranks, a mesh without rank 0 holds a replica.
        counts = first and bool((mesh.mesh == 0).any())
        along = zip(mesh.shape, coordinate, placements, strict=True)
        part = 0, 1
        for parts, own, placement in along:
            if not placement.is_replicate():
                part = part[0] * parts + own, part[1] * parts
        return cls(shape, held, counts, cuts[-1] if cuts else (), part)

    def find_part(self, indices: Tensor | None) -> Part:
        """Return which of the given elements this rank measures.

        Args:
            indices: Ascending indices into the flattened whole parameter, int64 (elements) on the
                CPU. None for all elements.

        Returns:
            For each element its index in the flattened parameter, its index in the flattened local
            shard, and its position in `indices`. Empty if another rank measures this replica.
        """
        if not self.counts:
            return empty_part()
        if indices is None:
            flat = self._flat()
            return Part(flat, None, flat)
        rest, local, stride = indices, torch.zeros_like(indices), 1
        is_here = torch.ones_like(indices, dtype=torch.bool)
        for size, held in zip(reversed(self.shape), reversed(self.held), strict=True):
            place, found = _find(rest % size, held)
            is_here &= found
            local += place * stride
            rest, stride = rest // size, stride * len(held)
        positions = is_here.nonzero().flatten()
        return Part(indices[positions], local[positions], positions)

    def tears(self, block: int) -> bool:
        """Return whether several ranks hold parts of one block of neighbours in the last dimension.

        The result is the same on all ranks.

        Args:
            block: Number of elements in a block.
        """
        each = [[cut._replace(own=own) for own in range(cut.parts)] for cut in self.last_cuts]
        held = [_held(self.shape[-1], cuts) for cuts in itertools.product(*each)]
        edges = {edge for h in held if len(h) for edge in (int(h[0]), int(h[-1]) + 1)}
        if any(not isinstance(h, range) for h in held):
            return True
        return any(edge % block for edge in edges - {self.shape[-1]}) if self.shape else False

    def _flat(self) -> Tensor:
        """Return the flat indices of the shard's elements in the whole parameter, int64."""
        flat = torch.zeros(1, dtype=torch.int64, device="cpu")
        for size, held in zip(self.shape, self.held, strict=True):
            along = (
                torch.arange(held.start, held.stop, device="cpu")
                if isinstance(held, range)
                else held
            )
            flat = (flat[:, None] * size + along).flatten()
        return flat


def _dimension(placement: Any) -> int | None:
    """Return the tensor dimension that a placement divides; None for a replica.

    The result is read from the attribute `dim`, because `fully_shard` after tensor parallelism uses
    a placement of a private class, which has this attribute like the public ones.
    """
    if placement.is_partial():
        return None
    dimension: int | None = getattr(placement, "dim", None)
    return dimension


def _cuts(
    shape: torch.Size, placements: Sequence[Any], mesh: Sequence[int], coordinate: Sequence[int]
) -> list[tuple[_Cut, ...]]:
    """Return, for each tensor dimension, its divisions between ranks, in the order of the mesh."""
    cuts: list[list[_Cut]] = [[] for _ in shape]
    for placement, parts, own in zip(placements, mesh, coordinate, strict=True):
        dimension = _dimension(placement)
        if dimension is not None:
            cuts[dimension].append(_Cut(parts, own, int(getattr(placement, "split_factor", 1))))
    return [tuple(each) for each in cuts]


def _held(size: int, cuts: Sequence[_Cut]) -> Held:
    """Return which indices along a dimension of length `size` a rank holds after its divisions."""
    held: Held = range(size)
    for cut in cuts:
        if cut.pieces == 1:
            held = _chunk(held, cut.parts, cut.own)
            continue
        pieces = (_chunk(held, cut.pieces, piece) for piece in range(cut.pieces))
        chunks = (_chunk(piece, cut.parts, cut.own) for piece in pieces)
        held = torch.tensor(
            [*itertools.chain.from_iterable(map(list, chunks))], dtype=torch.int64, device="cpu"
        )
    if isinstance(held, Tensor) and len(held) and int(held[-1] - held[0]) == len(held) - 1:
        return range(int(held[0]), int(held[-1]) + 1)
    return held


def _chunk(held: Held, parts: int, own: int) -> Held:
    """Return chunk number `own`, from 0, of the `parts` chunks that torch.chunk makes of `held`."""
    length = -(-len(held) // parts)
    return held[min(own * length, len(held)) : min((own + 1) * length, len(held))]


def _find(indices: Tensor, held: Held) -> tuple[Tensor, Tensor]:
    """Return for each index its position in `held`, and whether `held` contains the index."""
    if isinstance(held, range):
        return indices - held.start, (indices >= held.start) & (indices < held.stop)
    if not len(held):
        return torch.zeros_like(indices), torch.zeros_like(indices, dtype=torch.bool)
    place = torch.searchsorted(held, indices).clamp(max=len(held) - 1)
    return place, held[place] == indices
