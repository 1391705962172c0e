"""The elements of one tensor, or of some of one shape, in chunks that stay in cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from altgrad.measurement.kernel import EverMoved, Rows


class Sample(NamedTuple):
    """A choice of a parameter's elements: ascending flat indices into its shape."""

    shape: torch.Size
    indices: Tensor


def chunks_of(
    tensors: tuple[Tensor, ...], size: int, *, block: int = 1, sample: Sample | None = None
) -> Iterator[tuple[Tensor, ...]]:
    """Yield all elements of equally shaped tensors in row-major order, in one dimension.

    Args:
        tensors: Copied only where they are not contiguous.
        size: How many are in one chunk at most; at least block.
        block: So many neighbours along the last dimension, from a multiple of it on, are not torn
            apart.
        sample: Where the tensors hold a sample, which elements these are.
    """
    if tensors[0].numel() == 0:
        return
    flat = [each.detach().view(-1) if each.is_contiguous() else None for each in tensors]
    if block == 1 and all(each is not None for each in flat):
        yield from zip(*(torch.split(each, size) for each in flat if each is not None), strict=True)
    elif sample is not None:
        lengths = _lengths(_blocks_of(sample, block), size)
        yield from zip(*(torch.split(each.detach(), lengths) for each in tensors), strict=True)
    else:
        yield from _along_rows(tuple(each.detach() for each in tensors), size // block * block)


def row_of(flat: tuple[Tensor, ...]) -> Rows:
    """Return one chunk as a single row."""
    rows = [each.view(1, 1, -1) for each in flat]
    return Rows(rows[0], rows[1], rows[2] if len(rows) == 3 else None)


def part_of(ever: EverMoved, start: int, count: int) -> EverMoved:
    """Return `count` elements of one row, from `start` on."""
    return EverMoved(*(each[..., start : start + count] for each in ever))


def _along_rows(tensors: tuple[Tensor, ...], size: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield whole rows of the last dimension, or where one is too long, pieces of it."""
    first = tensors[0]
    if first.numel() <= size:
        yield tuple(each.reshape(-1) for each in tensors)
        return
    length = max(size * first.shape[0] // first.numel(), 1) if first.dim() > 1 else size
    for parts in zip(*(torch.split(each, length) for each in tensors), strict=True):
        one_row = length == 1 and first.dim() > 1
        yield from _along_rows(tuple(p.squeeze(0) if one_row else p for p in parts), size)


def _blocks_of(sample: Sample, block: int) -> Tensor:
    """Return the number of the block of each element, on the CPU."""
    indices, length = sample.indices.cpu(), sample.shape[-1]
    return indices // length * -(-length // block) + indices % length // block


def _lengths(blocks: Tensor, size: int) -> list[int]:
    """Return the lengths of chunks of up to `size` elements, none of which ends within a block."""
    ends = [*((blocks[1:] != blocks[:-1]).nonzero().flatten() + 1).tolist(), len(blocks)]
    lengths, start, last = [], 0, 0
    for end in ends:
        if end - start > size:
            lengths.append(last - start)
            start = last
        last = end
    return [*lengths, last - start]
