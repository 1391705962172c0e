"""The sample of twins: full chunks alone, and whole blocks."""

import pytest
import torch

from altgrad.monitor.elements import sample_elements
from altgrad.recipes.sample import draw_sample


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
def test_a_layer_below_a_chunk_is_sampled_whole(count: int) -> None:
    assert draw((count,)).tolist() == [*range(count)]


def test_a_scalar_and_an_empty_layer_have_what_there_is() -> None:
    assert draw(()).tolist() == [0]
    assert draw((0,)).tolist() == []
    assert draw((0, 5), block=32).tolist() == []


def test_blocks_are_whole_and_begin_at_a_multiple_of_their_size() -> None:
    blocks = draw((50, 96), block=32).view(-1, 32)
    assert len(blocks) == 8
    assert (blocks[:, 0] % 32 == 0).all()
    assert (blocks - blocks[:, :1] == torch.arange(32)).all()


def test_short_blocks_at_the_end_of_rows_are_left_out() -> None:
    indices = draw((64, 50), block=32)
    assert (indices % 50 < 32).all()
    assert len(indices) == 256


def test_rows_shorter_than_a_block_are_blocks() -> None:
    blocks = draw((640, 10), block=32).view(-1, 10)
    assert (blocks[:, 0] % 10 == 0).all()


def test_samples_of_one_name_are_equal_and_of_another_differ() -> None:
    other = draw_sample(
        lambda *each: sample_elements(*each[:3], block=each[3]), "v", (1000,), 256, 1
    )
    assert torch.equal(draw((1000,)), draw((1000,)))
    assert not torch.equal(draw((1000,)), other)
