"""`cut_sample`: which elements of a layer's sample a rank steps."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from altgrad.twins.shard_sample import ShardSample, cut_sample
from tests.strategies import thorough


def cut(drawn: list[int], held: list[int], *, rounds_by_place: bool, block: int = 1) -> ShardSample:
    """Return the sample of a rank that holds some elements of a layer, in this order."""

    def find_part(indices: Tensor | None) -> tuple[Tensor, Tensor]:
        wanted = held if indices is None else [each for each in indices.tolist() if each in held]
        return torch.tensor(wanted).long(), torch.tensor([held.index(e) for e in wanted]).long()

    indices = torch.tensor(drawn).long()
    ends = block - indices % block
    return cut_sample(indices, find_part, len(held), ends, rounds_by_place=rounds_by_place)


@thorough
@given(
    st.lists(st.integers(0, 399), unique=True).map(sorted),
    st.lists(st.integers(1, 399), unique=True, max_size=3).map(sorted),
    st.booleans(),
)
def test_ranks_together_step_each_element_once_but_for_tails(drawn, cuts, rounds_by_place) -> None:
    edges = [0, *cuts, 400]
    shards = [[*range(a, b)] for a, b in itertools.pairwise(edges)]
    counted = []
    for held in shards:
        sample = cut(drawn, held, rounds_by_place=rounds_by_place)
        assert [held[k] for k in sample.local.tolist()] == sample.indices.tolist()
        own = sample.indices[sample.is_counted].tolist()
        full = len(held) - len(held) % 64 if rounds_by_place and len(held) >= 64 else len(held)
        assert own == [each for each in drawn if each in held[:full]]
        counted += own
    if not rounds_by_place:
        assert counted == drawn


def test_a_small_shard_is_stepped_whole_where_its_shape_decides_about_rounding() -> None:
    sample = cut([3, 5, 60], [*range(40)], rounds_by_place=True)
    assert sample.indices.tolist() == [*range(40)]
    assert sample.indices[sample.is_counted].tolist() == [3, 5]
    assert len(cut([60], [*range(40)], rounds_by_place=True).indices) == 0


@pytest.mark.parametrize(("numel", "last"), [(120, 63), (128, 127)])
def test_a_block_that_ends_in_the_tail_is_left_out_whole(numel: int, last: int) -> None:
    sample = cut([*range(32, 128)], [*range(numel)], rounds_by_place=True, block=32)
    assert sample.indices.tolist() == [*range(32, last + 1)]
