"""The sample of a twin: elements of full chunks alone, and whole blocks."""

import pytest
import torch

from altgrad.monitor.elements import sample_elements
from altgrad.quantization import compute_scale
from altgrad.quantization.formats import Scaling
from altgrad.twins.sample import draw_sample, find_columns, number_groups


def draw(shape: tuple[int, ...], most: int = 256, block: int = 1) -> torch.Tensor:
    return draw_sample(
        lambda *each: sample_elements(*each[:3], block=each[3]), "w", shape, most, block
    )


@pytest.mark.parametrize("shape", [(1000,), (65, 130), (3, 3, 7, 7), (127,)])
def test_no_element_lies_beyond_the_last_full_chunk(shape: tuple[int, ...]) -> None:
    numel = torch.Size(shape).numel()
    indices = draw(shape)
    assert indices.max() < numel - numel % 64
    assert len(indices) == min(256, numel - numel % 64)
    assert torch.equal(indices, indices.unique())


@pytest.mark.parametrize("count", [1, 10, 63])
@pytest.mark.parametrize("block", [1, 32])
@pytest.mark.parametrize("most", [5, 256])
def test_a_layer_below_a_chunk_is_sampled_whole(count: int, block: int, most: int) -> None:
    assert draw((count,), most, block).tolist() == [*range(count)]


def test_a_scalar_and_an_empty_layer_are_sampled_whole() -> None:
    assert draw(()).tolist() == [0]
    assert draw((0,)).tolist() == []
    assert draw((0, 5), block=32).tolist() == []


def test_blocks_are_whole_and_begin_at_a_multiple_of_their_size() -> None:
    blocks = draw((50, 96), block=32).view(-1, 32)
    assert len(blocks) == 8
    assert (blocks[:, 0] % 32 == 0).all()
    assert (blocks - blocks[:, :1] == torch.arange(32)).all()


def test_short_blocks_at_the_end_of_rows_are_blocks() -> None:
    indices = draw((64, 50), block=32)
    drawn = set(indices.tolist())
    blocks = {(index // 50, index % 50 // 32) for index in drawn}
    assert len(blocks) == 8
    assert {column for _, column in blocks} == {0, 1}
    assert drawn == {index for index in range(3200) if (index // 50, index % 50 // 32) in blocks}


@pytest.mark.parametrize("shape", [(64, 50), (9, 39), (130,)], ids=str)
def test_no_block_reaches_beyond_the_last_full_chunk(shape: tuple[int, ...]) -> None:
    numel, row = torch.Size(shape).numel(), shape[-1]
    body = numel - numel % 64
    expected = [
        index
        for index in range(numel)
        if index // row * row + min((index % row // 32 + 1) * 32, row) <= body
    ]
    assert draw(shape, most=10**6, block=32).tolist() == expected


def test_rows_shorter_than_a_block_are_blocks() -> None:
    blocks = draw((640, 10), block=32).view(-1, 10)
    assert (blocks[:, 0] % 10 == 0).all()


SCALINGS: list[Scaling] = ["tensor", "channel", ("block", 4), ("block", 64)]


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize("shape", [(6, 10), (5, 3, 3), (12,), (7, 1), (1, 9), ()], ids=str)
def test_elements_of_a_group_share_the_scale_that_the_layer_has_there(
    shape: tuple[int, ...], scaling: Scaling
) -> None:
    # Each element has a magnitude of its own, so that groups with equal scales are equal groups.
    numel = torch.Size(shape).numel()
    weights = torch.exp2(torch.randperm(numel, generator=torch.Generator().manual_seed(0)) - 30.0)
    scales = compute_scale(weights.view(shape), "e4m3fn", scaling=scaling, power_of_two=False)
    expected = scales.expand(shape).flatten()
    groups = number_groups(torch.arange(numel), shape, scaling)
    same = groups[:, None] == groups
    assert torch.equal(same, expected[:, None] == expected)
    some = torch.arange(0, numel, 3)
    assert torch.equal(number_groups(some, shape, scaling), groups[some])


def test_each_block_begins_at_a_multiple_of_its_size() -> None:
    weight = torch.zeros(4, 40)
    indices = torch.tensor([*range(32, 40), *range(72, 112), *range(112, 120)])
    columns = find_columns(indices, weight.shape, 32)
    short, other = [*range(8)], [*range(32, 40)]
    assert columns.tolist() == [*short, *other, *range(64, 96), *range(96, 104)]
    rows = torch.zeros(9, 3)
    columns = find_columns(torch.arange(6, 12), rows.shape, 32)
    assert columns.tolist() == [*range(6)]


def test_samples_of_one_name_are_equal_and_of_another_differ() -> None:
    other = draw_sample(
        lambda *each: sample_elements(*each[:3], block=each[3]), "v", (1000,), 256, 1
    )
    assert torch.equal(draw((1000,)), draw((1000,)))
    assert not torch.equal(draw((1000,)), other)
