"""`sample_elements`: uniform, distinct, equal on all machines, and small in memory."""

from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from itertools import combinations
from math import comb, prod, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode  # torch has no public name for it

from altgrad.monitor.elements import sample_elements
from tests.strategies import thorough

# Seeds are fixed, so that a test at this level fails always or never.
UNLIKELY = 1e-4


def drawn(name: str, shape: tuple[int, ...], max_elements: int, **kwargs: int) -> list[int]:
    indices = sample_elements(name, shape, max_elements, **kwargs)
    assert indices is not None
    assert (indices.dtype, indices.device, indices.dim()) == (torch.int64, torch.device("cpu"), 1)
    return indices.tolist()


def list_blocks(shape: tuple[int, ...], block: int) -> list[list[int]]:
    """List all blocks of a layer by brute force."""
    rows = np.arange(prod(shape)).reshape(-1, shape[-1])
    return [
        row[start : start + block].tolist() for row in rows for start in range(0, shape[-1], block)
    ]


shapes = st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple)


@thorough
@given(shapes, st.integers(1, 200), st.integers(0, 5))
def test_indices_are_distinct_and_ascending_in_the_requested_number(
    shape, max_elements, seed
) -> None:
    elements = prod(shape)
    if elements <= max_elements:
        assert sample_elements("w", shape, max_elements, seed=seed) is None
        return
    indices = drawn("w", shape, max_elements, seed=seed)
    assert len(indices) == max_elements
    assert indices == sorted(set(indices))
    assert indices[0] >= 0
    assert indices[-1] < elements


@thorough
@given(shapes, st.integers(1, 200), st.integers(1, 15), st.integers(0, 5))
def test_drawn_blocks_are_whole_and_as_many_as_fit(shape, max_elements, block, seed) -> None:
    indices = sample_elements("w", shape, max_elements, seed=seed, block=block)
    blocks = list_blocks(shape, block)
    count = max(max_elements // min(block, shape[-1]), 1)
    if prod(shape) <= max_elements or count >= len(blocks):
        assert indices is None
        return
    assert indices is not None
    taken = set(indices.tolist())
    assert indices.tolist() == sorted(taken)
    whole = [each for each in blocks if taken & set(each)]
    assert taken == set().union(*whole)
    assert len(whole) == count
    assert len(taken) <= max(max_elements, min(block, shape[-1]))


def test_the_end_of_a_row_is_a_shorter_block() -> None:
    seen = {tuple(drawn("w", (2, 5), 3, block=3, seed=seed)) for seed in range(60)}
    assert seen == {(0, 1, 2), (3, 4), (5, 6, 7), (8, 9)}


def test_a_block_larger_than_the_sample_is_drawn_whole() -> None:
    assert drawn("w", (3, 32), 5, block=32) in list_blocks((3, 32), 32)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (0, 3), (1, 1, 1)], ids=repr)
@pytest.mark.parametrize("block", [1, 32])
def test_layers_of_0_or_1_elements_are_taken_whole(shape: tuple[int, ...], block: int) -> None:
    assert sample_elements("w", shape, 1, block=block) is None


def test_all_elements_are_taken_up_to_the_limit() -> None:
    assert sample_elements("w", torch.Size([10**6]), None) is None
    assert sample_elements("w", (10, 10), 100) is None
    assert len(drawn("w", (10, 10), 99)) == 99


def test_one_block_that_holds_the_whole_layer_is_the_whole_layer() -> None:
    assert sample_elements("w", (10,), 5, block=32) is None


# Uniform


@pytest.mark.parametrize(("elements", "count"), [(5, 2), (5, 3), (6, 3), (6, 1), (6, 5)])
def test_every_set_of_elements_is_equally_likely(elements: int, count: int) -> None:
    draws = 200 * comb(elements, count)
    seen = Counter(tuple(drawn("w", (elements,), count, seed=seed)) for seed in range(draws))
    every = list(combinations(range(elements), count))
    assert stats.chisquare([seen[each] for each in every]).pvalue > UNLIKELY


@pytest.mark.parametrize(
    ("shape", "max_elements", "block"), [((60,), 10, 1), ((60,), 45, 1), ((6, 10), 12, 4)]
)
def test_every_element_is_drawn_equally_often(shape, max_elements, block) -> None:
    draws = 2000
    counts = np.zeros(prod(shape))
    for seed in range(draws):
        counts[drawn("w", shape, max_elements, seed=seed, block=block)] += 1
    blocks = list_blocks(shape, block)
    probability = max_elements // block / len(blocks)
    deviation = sqrt(draws * probability * (1 - probability))
    assert np.abs(counts - draws * probability).max() < 4.5 * deviation
    # One entry per block. Without replacement, their sum is fixed: one degree of freedom less.
    per_block = np.array([counts[each[0]] for each in blocks])
    squares = ((per_block - draws * probability) ** 2).sum() / deviation**2
    squares *= (len(blocks) - 1) / len(blocks)
    assert UNLIKELY < stats.chi2.sf(squares, len(blocks) - 1) < 1 - UNLIKELY


# 3 · 2**30: a remainder of 32 random bits would draw the first third twice as often.
@pytest.mark.parametrize("elements", [300_000_000, 3 * 2**30, 2**40])
def test_every_part_of_a_large_layer_is_drawn_equally_often(elements: int) -> None:
    parts = 48
    indices = [drawn("w", (elements,), 4096, seed=seed) for seed in range(20)]
    counts = np.bincount(np.concatenate(indices) * parts // elements, minlength=parts)
    assert UNLIKELY < stats.chisquare(counts).pvalue < 1 - UNLIKELY


# Equality on all machines


@pytest.mark.parametrize(("elements", "count"), [(300_000_000, 100), (1000, 400), (2**40, 50)])
def test_a_sample_is_the_first_distinct_numbers_of_mersenne_twister(
    elements: int, count: int
) -> None:
    """numpy's generator is the reference, independent of version, machine and device of torch."""
    seed = int.from_bytes(sha256(b"7 head.weight").digest()[:4], "big")
    words = np.random.RandomState(seed)  # with the seed of torch's generator

    def stream() -> Iterator[int]:
        while True:
            high, low = (int(word) for word in words.randint(0, 2**32, 2, dtype=np.uint32))
            yield ((high << 32) | low) % 2**63 % elements

    expected: set[int] = set()
    for number in stream():
        if len(expected) == count:
            break
        expected.add(number)
    assert drawn("head.weight", (elements,), count, seed=7) == sorted(expected)


def test_samples_above_a_half_are_drawn_by_what_they_leave_out() -> None:
    assert set(range(10)) - set(drawn("w", (10,), 7)) == set(drawn("w", (10,), 3))


def test_only_equal_arguments_draw_equal_samples() -> None:
    first = drawn("a.weight", (1000, 100), 64)
    assert drawn("a.weight", (1000, 100), 64) == first
    assert drawn("a.weight", torch.Size([1000, 100]), 64, seed=0, block=1) == first
    others = [drawn("b.weight", (1000, 100), 64), drawn("a.weight", (1000, 100), 64, seed=1)]
    others += [drawn("a.weight", (1000, 100), 64, seed=-1), drawn("1 a.weight", (10**5,), 64)]
    assert all(len(set(first) & set(other)) < 8 for other in others)


def test_names_need_not_be_ascii() -> None:
    assert len(drawn("größe.重み", (1000,), 10)) == 10


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_torch_defaults_and_global_generators_do_not_matter(device: str) -> None:
    expected = {block: drawn("w", (50, 10), 300, block=block) for block in (1, 4)}
    state = torch.get_rng_state()
    with torch.device(device), torch.inference_mode():
        assert {block: drawn("w", (50, 10), 300, block=block) for block in (1, 4)} == expected
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert not torch.equal(torch.get_rng_state(), state)
    assert drawn("w", (50, 10), 300) == expected[1]


# Memory


class Largest(TorchDispatchMode):
    """A recorder of the largest number of elements that an operation returned."""

    elements = 0
    operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, (tuple, list)) else (result,)
        sizes = [each.numel() for each in results if isinstance(each, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        self.operations += 1
        return result


def test_the_harness_sees_a_large_tensor() -> None:
    with Largest() as largest:
        torch.randperm(100_000)[:10].sort()
    assert largest.elements == 100_000


@pytest.mark.parametrize("block", [1, 32])
@pytest.mark.parametrize(
    "shape", [(2**20, 2**20), (300_000, 1000), (100, 100), (90, 91), (4200,)], ids=repr
)
def test_no_tensor_is_larger_than_twice_the_sample(shape: tuple[int, ...], block: int) -> None:
    with Largest() as largest:
        assert sample_elements("w", shape, 4096, block=block) is not None
    assert 4096 // block <= largest.elements <= 2 * 4096


def test_operations_do_not_grow_with_the_layer() -> None:
    with Largest() as largest:
        sample_elements("w", (2**20, 2**20), 4096)
    assert largest.operations < 12


# Arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("w", (4, 4), 0), ValueError, "max_elements=0: expected 1 or more"),
        (("w", (4, 4), "all"), TypeError, "max_elements='all': expected int, got str"),
        (("w", (4, 4), True), TypeError, "max_elements=True: expected int, got bool"),
        (("w", (4, -1), 2), ValueError, "shape: each size=-1: expected 0 or more"),
        (("w", (4.0,), 2), TypeError, "shape: each size=4.0: expected int, got float"),
        ((b"w", (4, 4), 2), TypeError, "name=b'w': expected str, got bytes"),
    ],
)
def test_errors_name_the_wrong_argument(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        sample_elements(*arguments)


@pytest.mark.parametrize("max_elements", [2, None])
def test_errors_name_wrong_blocks_and_seeds(max_elements: int | None) -> None:
    with pytest.raises(ValueError, match="block=0: expected 1 or more"):
        sample_elements("w", (4, 4), max_elements, block=0)
    with pytest.raises(TypeError, match=r"seed=0\.5: expected int, got float"):
        sample_elements("w", (4, 4), max_elements, seed=0.5)
