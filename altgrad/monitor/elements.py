"""Which elements of a layer are observed: a uniform sample that is the same everywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import sha256

import torch
from torch import Tensor

from altgrad._messages import check_int, check_type

_CPU = torch.device("cpu")  # whatever the default device is


def sample_elements(
    name: str,
    shape: Sequence[int],
    max_elements: int | None,
    *,
    seed: int = 0,
    block: int = 1,
) -> Tensor | None:
    """Draw elements of a layer uniformly, without replacement.

    - The same for equal arguments on every rank, machine, device and run. torch's global random
      numbers are neither used nor moved.
    - Time and memory grow with max_elements (or block, if larger) and not with the shape.
    - Each element is drawn with equal probability, to within ``numel / 2**63``; with blocks,
      elements of one block are drawn together.
    - None where every element is taken: also for empty shapes and for those with one element.

    Args:
        name: The layer's name: layers of one shape get different elements.
        shape: The layer's shape.
        max_elements: How many elements to draw, at least 1; None for every element.
        seed: For another sample.
        block: How many neighbours along the last dimension are drawn together, at least 1. What
            is left at the end of a row is a shorter block, and no block is longer than a row. As
            many are drawn as cannot exceed max_elements, but at least one.

    Returns:
        int64 indices into the flattened (row-major) layer, on the CPU and in ascending order; None
        for all of them.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: max_elements or block is below 1, or a size below 0.

    Examples:
        >>> sample_elements("head.weight", (1000, 300), 4)
        tensor([ 50557, 193450, 258287, 299929])
        >>> sample_elements("head.weight", (1000, 300), 4, block=2)
        tensor([ 86900,  86901, 299858, 299859])
        >>> sample_elements("head.bias", (4,), 4) is None
        True
    """
    check_type("name", name, str)
    check_type("seed", seed, int)
    check_int("block", block, 1)
    for size in shape:
        check_int("shape: each size", size, 0)
    if max_elements is None:
        return None
    check_int("max_elements", max_elements, 1)
    elements = math.prod(shape)
    if elements <= max_elements:
        return None
    row = shape[-1]
    block = min(block, row)
    blocks_in_row = -(-row // block)
    blocks = elements // row * blocks_in_row
    count = max(max_elements // block, 1)
    if count >= blocks:
        return None
    drawn = _draw(blocks, count, _generator(name, seed))
    return drawn if block == 1 else _elements_of(drawn, row, block, blocks_in_row)


def _generator(name: str, seed: int) -> torch.Generator:
    digest = sha256(f"{seed} {name}".encode()).digest()
    # torch's generator for the CPU takes no more than 32 bits of a seed.
    return torch.Generator(_CPU).manual_seed(int.from_bytes(digest[:4], "big"))


def _draw(population: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw distinct numbers below population, ascending; every set is equally likely."""
    if count <= population // 2:
        return _first_distinct(population, count, generator)
    # Most numbers would come up again and again: draw those to leave out.
    left_out = _first_distinct(population, population - count, generator)
    kept = torch.ones(population, dtype=torch.bool, device=_CPU)
    kept[left_out] = False
    return kept.nonzero().flatten()


def _first_distinct(population: int, count: int, generator: torch.Generator) -> Tensor:
    """Return the first distinct numbers of a stream of independent uniform ones, ascending.

    Each round draws no more than are missing, so that none is drawn in vain.
    """
    distinct = torch.empty(0, dtype=torch.int64, device=_CPU)
    while len(distinct) < count:
        more = torch.empty(count - len(distinct), dtype=torch.int64, device=_CPU)
        # 63 bits and the remainder: torch.randint takes the remainder of 32 where it can, and
        # would favour some elements of a large layer by 7 % and more.
        more.random_(generator=generator).remainder_(population)
        distinct = torch.unique_consecutive(torch.cat([distinct, more]).sort().values)
    return distinct


def _elements_of(blocks: Tensor, row: int, block: int, blocks_in_row: int) -> Tensor:
    """Return the elements of these blocks, which are counted row by row."""
    columns = blocks.remainder(blocks_in_row)[:, None] * block + torch.arange(block, device=_CPU)
    rows = blocks.div(blocks_in_row, rounding_mode="floor")[:, None]
    return (rows * row + columns)[columns < row]
