"""Split large tensors into chunks that fit into the CPU's cache and the memory of `kernel`.

The kernel measures a chunk at a time. A chunk consists of whole blocks if a format has one scale
for each block of neighbours.

Read `kernel` first, which measures a chunk; `measurer` comes next and adds the sums of chunks up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from altgrad.measurement.kernel import EverMoved, Rows


class Sample(NamedTuple):
    """The elements of a layer that are measured, if not all are.

    Attributes:
        shape: Shape of the whole layer.
        indices: Indices into the flattened (row-major) layer, int64 (elements), ascending.
        block: Number of neighbours along the last dimension that were drawn together; 1 for single
            elements.
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
        block: Number of neighbours that stay in one chunk, as they share a scale. Blocks are
            counted from the start of each row, that is along the last dimension of the layer.
        sample: The elements of the layer that the tensors hold; None if they hold all.

    Returns:
        An iterator over chunks; empty if the tensors are. A chunk has a flat tensor (elements) for
        each tensor, with that tensor's dtype.
    """
    if tensors[0].numel() == 0:
        return
    # A contiguous tensor has a flat view: nothing is copied in the usual case.
    flat = [each.detach().view(-1) if each.is_contiguous() else None for each in tensors]
    if block == 1 and all(each is not None for each in flat):
        yield from zip(*(torch.split(each, size) for each in flat if each is not None), strict=True)
    elif sample is not None:
        lengths = _lengths(_number_blocks(sample, block), size)
        yield from zip(*(torch.split(each.detach(), lengths) for each in tensors), strict=True)
    else:
        yield from _along_rows(tuple(each.detach() for each in tensors), size // block * block)


def as_row(flat: tuple[Tensor, ...]) -> Rows:
    """View one chunk of a large tensor as a single row, the form that the kernel measures.

    Args:
        flat: Weights before the step, weights after it, and the gradient if there is one,
            (elements) each.

    Returns:
        Views of the same memory, (1, 1, elements) each.
    """
    rows = [each.view(1, 1, -1) for each in flat]
    return Rows(rows[0], rows[1], rows[2] if len(rows) == 3 else None)


def slice_flags(ever: EverMoved, start: int, count: int) -> EverMoved:
    """Return the ever-moved flags of a chunk as views, so that the kernel can update them.

    The flags say which elements have had an update so far, and of which updates each format would
    have kept a part.

    Args:
        ever: Ever-moved flags of all measured elements of a layer, bool (1, 1, elements) and bool
            (1, formats, elements).
        start: Position of the chunk's first element.
        count: Number of elements in the chunk.

    Returns:
        Views of the flags, bool (1, 1, `count`) and bool (1, formats, `count`).
    """
    return EverMoved(*(each[..., start : start + count] for each in ever))


def _along_rows(tensors: tuple[Tensor, ...], size: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield flat chunks of up to `size` elements: rows (last dimension) or parts of a row."""
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
    """Return the index of the block that each sampled element is in, int64 (elements) on the CPU.

    A block has `block` neighbours along the last dimension; the blocks of a layer are counted from
    0, row by row.
    """
    indices, length = sample.indices.cpu(), sample.shape[-1]
    # The last block of a row may be shorter: a row has ⌈length / block⌉ blocks.
    return indices // length * -(-length // block) + indices % length // block


def _lengths(blocks: Tensor, size: int) -> list[int]:
    """Return the lengths of chunks of up to `size` elements that split no block.

    Args:
        blocks: Index of the block that each element is in, ascending, int64 (elements).
        size: Maximum number of elements in a chunk.
    """
    ends = [*((blocks[1:] != blocks[:-1]).nonzero().flatten() + 1).tolist(), len(blocks)]
    lengths, start, last = [], 0, 0  # `last`: where the latest block that fits ends
    for end in ends:
        if end - start > size:
            lengths.append(last - start)
            start = last
        last = end
    return [*lengths, last - start]
