"""Chunks join to the tensor, are not too long, and keep blocks together."""

import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from altgrad.measurement.chunks import Sample, as_row, slice_flags, split_chunks
from altgrad.measurement.kernel import EverMoved
from tests.strategies import thorough


def numbered(shape: tuple[int, ...], layout: str) -> Tensor:
    """Return 0, 1, 2, … in row-major order, with some layout in memory."""
    x = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
    if layout == "turned":
        backwards = [*reversed(range(x.dim()))]
        return x.permute(backwards).contiguous().permute(backwards)
    if layout == "apart":
        return torch.stack((x, -x), -1)[..., 0]
    return x


def find_block(index: int, length: int, block: int) -> tuple[int, int]:
    """Return the block that an element belongs to."""
    return index // length, index % length // block


def torn(chunks: list[list[int]], length: int, block: int) -> list[tuple[int, int]]:
    """Return the blocks that are in more than one chunk."""
    seen: dict[tuple[int, int], int] = {}
    parts = [(number, index) for number, chunk in enumerate(chunks) for index in chunk]
    return [
        find_block(index, length, block)
        for number, index in parts
        if seen.setdefault(find_block(index, length, block), number) != number
    ]


shapes = st.lists(st.integers(1, 7), max_size=3).map(tuple)
layouts = st.sampled_from(["contiguous", "turned", "apart"])


@thorough
@given(st.data(), shapes, st.integers(1, 8), st.lists(layouts, min_size=1, max_size=3))
def test_chunks_join_to_the_tensor_in_row_major_order(
    data: st.DataObject, shape: tuple[int, ...], block: int, several: list[str]
) -> None:
    size = data.draw(st.integers(block, 3 * block + 20))
    tensors = tuple(numbered(shape, layout) for layout in several)
    chunks = [*split_chunks(tensors, size, block=block)]
    for number in range(len(tensors)):
        tensor_chunks = [chunk[number] for chunk in chunks]
        assert all(each.dim() == 1 and 0 < len(each) <= size for each in tensor_chunks)
        assert torch.cat(tensor_chunks).tolist() == [*range(math.prod(shape))]
    ours = [chunk[0].int().tolist() for chunk in chunks]
    assert not torn(ours, shape[-1] if shape else 1, block)
    assert all(chunk[0].tolist() == each.tolist() for chunk in chunks for each in chunk)


@thorough
@given(st.data(), shapes.filter(bool), st.integers(1, 8))
def test_chunks_of_a_sample_join_to_the_sample(
    data: st.DataObject, shape: tuple[int, ...], block: int
) -> None:
    size = data.draw(st.integers(block, 2 * block + 10))
    indices = sorted(data.draw(st.sets(st.integers(0, math.prod(shape) - 1), min_size=1)))
    chosen = torch.tensor(indices)
    pair = (chosen.float(), chosen.float() + 0.5)
    chunks = [*split_chunks(pair, size, block=block, sample=Sample(torch.Size(shape), chosen))]
    assert torch.cat([each for each, _ in chunks]).tolist() == indices
    assert all(torch.equal(one + 0.5, other) for one, other in chunks)
    assert all(0 < len(each) <= size for each, _ in chunks)
    assert not torn([each.int().tolist() for each, _ in chunks], shape[-1], block)


def test_a_chunk_holds_as_many_whole_blocks_as_fit() -> None:
    whole = numbered((2, 10), "contiguous")
    lengths = [len(each) for (each,) in split_chunks((whole,), 7, block=3)]
    assert lengths == [6, 4, 6, 4]  # a row is longer than a chunk, and its last block is shorter
    wide = [len(each) for (each,) in split_chunks((numbered((5, 10), "contiguous"),), 29, block=3)]
    assert wide == [20, 20, 10]  # whole rows
    sample = Sample(torch.Size((2, 10)), torch.tensor([0, 1, 2, 4, 9, 10, 11, 12, 13]))
    sample_chunks = split_chunks((sample.indices.float(),), 4, block=3, sample=sample)
    assert [each.int().tolist() for (each,) in sample_chunks] == [
        [0, 1, 2, 4],
        [9, 10, 11, 12],
        [13],
    ]


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3)])
@pytest.mark.parametrize("block", [1, 4])
def test_an_empty_tensor_has_no_chunks(shape: tuple[int, ...], block: int) -> None:
    assert not [*split_chunks((torch.ones(shape),), 10, block=block)]


def test_contiguous_tensors_are_not_copied_and_record_no_gradient() -> None:
    x = torch.randn(4, 25, requires_grad=True)
    for block in (1, 5):
        start = x.data_ptr()
        for (each,) in split_chunks((x,), 10, block=block):
            assert each.data_ptr() == start
            assert not each.requires_grad
            start += each.nbytes
        assert start == x.data_ptr() + x.nbytes


def test_as_row_returns_one_row_with_an_optional_gradient() -> None:
    w, v, g = torch.randn(3, 5)
    with_gradient, without = as_row((w, v, g)), as_row((w, v))
    assert [each.shape for each in with_gradient[:3]] == [(1, 1, 5)] * 3
    assert torch.equal(torch.cat(with_gradient[:3]).squeeze(1), torch.stack((w, v, g)))
    assert torch.equal(torch.cat(without[:2]).squeeze(1), torch.stack((w, v)))
    assert without.gradient is without.together is with_gradient.together is None


def test_writes_to_sliced_flags_reach_the_whole() -> None:
    ever = EverMoved(torch.zeros(1, 1, 6, dtype=torch.bool), torch.zeros(1, 2, 6, dtype=torch.bool))
    part = slice_flags(ever, 2, 3)
    assert (part.moved.shape, part.effective.shape) == ((1, 1, 3), (1, 2, 3))
    part.moved.fill_(True)
    part.effective[:, 1].fill_(True)
    there = [False, False, True, True, True, False]
    assert ever.moved.tolist() == [[there]]
    assert ever.effective.tolist() == [[[False] * 6, there]]
