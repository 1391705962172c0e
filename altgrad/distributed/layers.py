"""`ShardedLayers`: find which elements of each layer of a model this rank holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from altgrad.distributed.shards import Part, Shard, empty_part
from altgrad.distributed.step_message import Expected


class ShardedLayers:
    """The local shards of all layers of a model: which of their elements this rank holds.

    A layer is one parameter tensor. `read` finds its shard from the placements of its DTensor, and
    the other methods look it up. No method communicates with other ranks.

    Args:
        choose_indices: Function that takes a layer's name and shape, and returns the elements that
            all ranks together measure. The result is int64 (elements) on the CPU, indices into the
            flattened layer, or None for all elements.
        rank: The number of this rank.
    """

    def __init__(
        self, choose_indices: Callable[[str, torch.Size], Tensor | None], rank: int
    ) -> None:
        self._choose_indices = choose_indices
        self._rank = rank
        self._shards: dict[str, Shard] = {}
        self._placed: dict[str, tuple[Any, ...]] = {}  # as each was when its shard was read
        self._expected: dict[str, Expected] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._shards

    def shard(self, name: str) -> Shard:
        """Return which elements of a layer this rank holds, as `read` found them."""
        return self._shards[name]

    def read(self, parameters: Mapping[str, Tensor]) -> None:
        """Find which elements this rank holds of parameters that are new or placed differently.

        The results are kept for the other methods.

        Args:
            parameters: Parameters by name.

        Raises:
            ValueError: The placements of a parameter do not say which elements this rank holds: see
                `Shard.read`.
        """
        for name, parameter in parameters.items():
            placed = _placed(parameter)
            if self._placed.get(name) != placed:
                shard = Shard.read(name, parameter, self._rank)
                self._shards[name], self._placed[name] = shard, placed
                self._expected.pop(name, None)

    def known(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return those of the given parameters that have not changed since `read` was last called.

        `read` finds which elements of a parameter this rank holds. The result may be another one
        after a change of shape, dtype, DTensor placements or device mesh.

        Args:
            parameters: Parameters by name.

        Returns:
            The parameters by name, without those that were never given to `read`.
        """
        placed = self._placed
        return {n: p for n, p in parameters.items() if placed.get(n) == _placed(p)}

    def describe(self, name: str) -> str:
        """Return the DTensor placements of a layer, such as its shard dimension, as a text."""
        return str(self._placed[name][2])

    def part(self, name: str, indices: Tensor | None) -> Part:
        """Return the elements among `indices` that this rank measures.

        Args:
            name: Name of the layer.
            indices: Elements that all ranks together measure, as indices into the flattened layer,
                int64 (elements). None for all elements.

        Returns:
            For each element its index in the flattened layer, its index in the flattened local
            shard, and its position in `indices`. Empty for a layer that has not been read.
        """
        return self._shards[name].find_part(indices) if name in self else empty_part()

    def measured_part(self, name: str) -> Part:
        """Return which of a layer's elements from `choose_indices` this rank measures.

        Returns:
            For each element its index in the flattened layer, its index in the flattened local
            shard, and its position in the result of `choose_indices`.
        """
        return self.part(name, self._choose_indices(name, self._shards[name].shape))

    def expected(self, names: Iterable[str]) -> dict[str, Expected]:
        """Return by name the size of each layer, and how many elements all ranks measure of it."""
        for name in names:
            if name not in self._expected:
                shape = self._shards[name].shape
                indices = self._choose_indices(name, shape)
                elements = shape.numel() if indices is None else len(indices)
                self._expected[name] = Expected(shape.numel(), elements)
        return {name: self._expected[name] for name in names}

    def torn(self, names: Iterable[str], block_sizes: Sequence[int]) -> list[str]:
        """Return the names of layers in which elements that share a scale lie on several ranks.

        Args:
            names: Names of the layers to check.
            block_sizes: Sizes of the blocks that share a scale, in elements along the last
                dimension.
        """
        return [n for n in names if any(self._shards[n].tears(size) for size in block_sizes)]

    def channels_here(self, name: str) -> slice | Tensor:
        """Return the indices along a layer's first dimension that this rank holds.

        Returns:
            A slice, or int64 (indices).
        """
        held = self._shards[name].held
        if not held:
            return slice(None)
        return slice(held[0].start, held[0].stop) if isinstance(held[0], range) else held[0]


def _placed(parameter: Any) -> tuple[Any, ...]:
    """Return shape, dtype, placements and mesh, which decide which elements this rank holds."""
    mesh = getattr(parameter, "device_mesh", None)
    return parameter.shape, parameter.dtype, getattr(parameter, "placements", None), mesh
