"""Split tensors of one shape into chunks that fit into the kernel's memory and the CPU's cache.

Formats with blocks need whole blocks in a chunk, as the elements of a block share a scale. Read
`kernel` first, which measures a chunk; `measurer` comes next and adds chunks up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from altgrad.measurement.kernel import EverMoved, Rows


class Sample(NamedTuple):
    """A sample of a layer's elements.

    Attributes:
        shape: Shape of the whole layer.
        indices: Flat (row-major) indices into `shape`, int64 (elements), ascending.
        block: Number of neighbours along the last dimension that were drawn together.
    """

    shape: torch.Size
    indices: Tensor
    block: int = 1


def split_chunks(
    tensors: tuple[Tensor, ...], size: int, *, block: int = 1, sample: Sample | None = None
) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors of one shape into chunks, in row-major order.

    Args:
        tensors: One or more tensors of one shape and any dtype. A tensor is copied only if it is
            not contiguous.
        size: Maximum number of elements in a chunk, at least `block`.
        block: Number of neighbours along the last dimension that stay in one chunk. A block begins
            at each multiple of `block` in a row.
        sample: The sample that the tensors hold, if they are not whole layers.

    Returns:
        An iterator over chunks. A chunk is a tuple of (elements), one for each tensor, with the
        tensor's dtype.
    """
    if tensors[0].numel() == 0:
        return
    # Views, where a tensor allows them: nothing is copied in the usual case.
    flat = [each.detach().view(-1) if each.is_contiguous() else None for each in tensors]
    if block == 1 and all(each is not None for each in flat):
        yield from zip(*(torch.split(each, size) for each in flat if each is not None), strict=True)
    elif sample is not None:
        lengths = _lengths(_number_blocks(sample, block), size)
        yield from zip(*(torch.split(each.detach(), lengths) for each in tensors), strict=True)
    else:
        yield from _along_rows(tuple(each.detach() for each in tensors), size // block * block)


def as_row(flat: tuple[Tensor, ...]) -> Rows:
    """View one chunk as a single row.

    Args:
        flat: Weights before and after, and the gradient if there is one, (elements) each.

    Returns:
        The same memory, (1, 1, elements) each.
    """
    rows = [each.view(1, 1, -1) for each in flat]
    return Rows(rows[0], rows[1], rows[2] if len(rows) == 3 else None)


def slice_flags(ever: EverMoved, start: int, count: int) -> EverMoved:
    """Return a view of a chunk's ever-moved flags, which the kernel updates in place.

    Args:
        ever: Ever-moved flags of a layer as one row, bool (1, 1 or formats, elements).
        start: Position of the chunk's first element.
        count: Number of elements in the chunk.

    Returns:
        Views of the flags, bool (1, 1 or formats, `count`).
    """
    return EverMoved(*(each[..., start : start + count] for each in ever))


def _along_rows(tensors: tuple[Tensor, ...], size: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield whole rows of the last dimension; split a row only if it is longer than `size`."""
    first = tensors[0]
    if first.numel() <= size:
        yield tuple(each.reshape(-1) for each in tensors)
        return
    # As many slices along the first dimension as fit. If not even one does, split inside a slice.
    length = max(size * first.shape[0] // first.numel(), 1) if first.dim() > 1 else size
    for parts in zip(*(torch.split(each, length) for each in tensors), strict=True):
        one_row = length == 1 and first.dim() > 1
        yield from _along_rows(tuple(p.squeeze(0) if one_row else p for p in parts), size)


def _number_blocks(sample: Sample, block: int) -> Tensor:
    """Number the blocks of a layer, and return the number of each element's block on the CPU."""
    indices, length = sample.indices.cpu(), sample.shape[-1]
    # The last block of a row may be shorter, so that a row has ⌈length / block⌉ of them.
    return indices // length * -(-length // block) + indices % length // block


def _lengths(blocks: Tensor, size: int) -> list[int]:
    """Return the lengths of chunks of up to `size` elements that do not divide a block."""
    ends = [*((blocks[1:] != blocks[:-1]).nonzero().flatten() + 1).tolist(), len(blocks)]
    lengths, start, last = [], 0, 0  # `last`: where the latest block that fits ends
    for end in ends:
        if end - start > size:
            lengths.append(last - start)
            start = last
        last = end
    return [*lengths, last - start]
