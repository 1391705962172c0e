"""`Layout`: where the sampled elements of each layer lie in one flat tensor.

A *twin* steps a *sample* of each layer: up to 256 elements, drawn once. The samples lie one after
another in a flat tensor, so that a twin's optimizer steps many layers with few operations. Layers
that step alike share a `Bucket`, which is one parameter of that optimizer. Layers begin to differ
when one of them has no gradient in a step; their bucket is then split, because optimizers count the
steps of each parameter::

    bucket 0: attn.weight mlp.weight      bucket 1: norm.weight       bucket 2: bias (own shape)
    |---256---|---256---|                 |---64---|                  |-10-|

Read `altgrad.recipes.names` first; `shard_sample` comes next.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

CHUNK = 64
"""Number of elements in a chunk; flat tensors are padded to a multiple of it.

Vectorised loops of torch treat the full chunks and the *tail* of a tensor, which is the rest, by
different code that may round differently in 16 bits. Samples of large layers therefore come from
full chunks alone. A chunk of 64 is a multiple of every vector of 16-bit numbers:
aten/src/ATen/cpu/vec.
"""


@dataclass(frozen=True)
class Bucket:
    """The samples of layers that step alike: together one parameter of an optimizer.

    That optimizer steps a *twin*: up to 256 elements of each layer of the training.

    Attributes:
        group: Index of the layers' parameter group in the training's optimizer.
        counts: Number of sampled elements of each layer, by name, in the order of the parameter.
        shape: Shape of the only layer, if it has fewer than 64 elements and must be stepped in its
            own shape to be rounded as in the training. None for a flat parameter, whose length is a
            multiple of 64.
        least: Fewest elements of a flat parameter, a multiple of 64. Optimizers that pack states in
            blocks do so from a certain number of elements on.
    """

    group: int
    counts: Mapping[str, int]
    shape: torch.Size | None = None
    least: int = 0

    @cached_property
    def length(self) -> int:
        """The number of elements, with padding to a multiple of 64 unless `shape` is given."""
        count = sum(self.counts.values())
        if self.shape is not None:
            return count
        return max(-(-count // CHUNK) * CHUNK, self.least)

    def split(self, names: Sequence[str], group: int) -> Bucket:
        """Return a new bucket that has the samples of only some of the layers.

        Args:
            names: The layers.
            group: Index of the parameter group that they have now.
        """
        counts = {name: self.counts[name] for name in names}
        return Bucket(group, counts, self.shape, self.least)


@dataclass(frozen=True)
class Layout:
    """The places of the samples of all layers in a flat tensor: one bucket after another.

    A *bucket* has the samples of layers that step alike, and begins at a multiple of 64 elements.

    Attributes:
        buckets: The buckets; none is empty, and no two have the same layer.
    """

    buckets: tuple[Bucket, ...] = ()

    @cached_property
    def length(self) -> int:
        """The number of elements of the flat tensor."""
        return sum(self._room(bucket) for bucket in self.buckets)

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        """The slice of the flat tensor that each bucket has, in the order of `buckets`."""
        slices, start = [], 0
        for bucket in self.buckets:
            slices.append(slice(start, start + bucket.length))
            start += self._room(bucket)
        return tuple(slices)

    @cached_property
    def places(self) -> dict[str, slice]:
        """The slice of the flat tensor that has each layer's sampled elements, by layer name."""
        places = {}
        for bucket, within in zip(self.buckets, self.slices, strict=True):
            start = within.start
            for name, count in bucket.counts.items():
                places[name] = slice(start, start + count)
                start += count
        return places

    @cached_property
    def bucket_numbers(self) -> dict[str, int]:
        """The index in `buckets` of each layer's bucket, by name of the layer."""
        each = enumerate(self.buckets)
        return {name: number for number, bucket in each for name in bucket.counts}

    def find_sources(self, later: Layout, begun: Collection[str] = ()) -> Tensor:
        """Return the position in this layout of each element of a later one, to carry numbers over.

        Args:
            later: The other layout.
            begun: Names of the layers with another sample in the later layout. Nothing is carried
                over for them.

        Returns:
            int64 (later.length) on the CPU; −1 for elements that only the later layout has.
        """
        sources = torch.full((later.length,), -1, dtype=torch.int64, device="cpu")
        for name, place in later.places.items():
            mine = None if name in begun else self.places.get(name)
            if mine is not None:
                sources[place] = torch.arange(mine.start, mine.stop, device="cpu")
        return sources

    def find_rows(self, names: Sequence[str], columns: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return indices that turn a flat tensor into a matrix with each layer's sample as a row.

        Args:
            names: The layers.
            columns: For each layer, the columns of its elements in the row, ascending, int64
                (elements).

        Returns:
            Positions in the flat tensor, int64 (layers, width), and a mask, bool (layers, width).
            Where a row has no element, the position is 0 and the mask False. Both are on the CPU.
        """
        width = max((int(own[-1]) + 1 for own in columns), default=0)
        rows = torch.zeros((len(names), width), dtype=torch.int64, device="cpu")
        mask = torch.zeros_like(rows, dtype=torch.bool)
        for number, (name, own) in enumerate(zip(names, columns, strict=True)):
            place = self.places[name]
            rows[number, own] = torch.arange(place.start, place.stop, device="cpu")
            mask[number, own] = True
        return rows, mask

    @staticmethod
    def _room(bucket: Bucket) -> int:
        """Return the number of elements between the beginnings of a bucket and of the next one.

        Each bucket, the samples of layers that step alike, begins at a multiple of 64 elements, so
        that vectorised loops treat it as a tensor of its own.
        """
        return -(-bucket.length // CHUNK) * CHUNK
