"""Draw the elements of a layer that are observed: a uniform sample, equal on all ranks.

Standard errors assume a uniform sample without replacement, of elements or of blocks. Ranks do not
communicate about samples, so that each has to draw the same one.

Read `layer_settings` next, which decides the size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import sha256

import torch
from torch import Tensor

from altgrad._messages import check_int, check_type

SAMPLING_VERSION = 1
"""Version of `sample_elements`: raised whenever equal arguments begin to give other elements."""

_CPU = torch.device("cpu")  # named because the user may have set another default device


def sample_elements(
    name: str,
    shape: Sequence[int],
    max_elements: int | None,
    *,
    seed: int = 0,
    block: int = 1,
) -> Tensor | None:
    """Draw elements of a layer uniformly, without replacement.

    - Equal arguments give equal samples on every rank, machine, device and run. The state of
      torch's global random generators is neither read nor changed.
    - Time and memory grow with `max_elements` (or `block`, if larger), regardless of the shape.
    - Each element is drawn with equal probability, to within ``numel / 2**63``. The elements of one
      block are drawn together.

    Args:
        name: Name of the layer. Layers of one shape with different names get different samples.
        shape: Shape of the layer.
        max_elements: Maximum number of elements to draw, at least 1. None for every element.
        seed: Seed of the sample, any int.
        block: Number of neighbours along the last dimension that are drawn together, at least 1.
            The last block of a row may be shorter; no block is longer than a row. At least one
            block is drawn, also if it exceeds `max_elements`.

    Returns:
        Indices into the flattened (row-major) layer, int64 (elements) on the CPU, ascending. None
        if every element is taken.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: `max_elements` or `block` is below 1, or a size is below 0.

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
    # Blocks are numbered row by row; drawing a block is drawing its number.
    row = shape[-1]
    block = min(block, row)
    blocks_in_row = -(-row // block)
    blocks = elements // row * blocks_in_row
    count = max(max_elements // block, 1)
    if count >= blocks:
        return None
    drawn = _draw(blocks, count, _generator(name, seed))
    return drawn if block == 1 else _list_elements(drawn, row, block, blocks_in_row)


def _generator(name: str, seed: int) -> torch.Generator:
    """Make a generator whose seed is a hash of a name and a seed."""
    # Not Python's `hash`: that of a str differs from process to process.
    digest = sha256(f"{seed} {name}".encode()).digest()
    # torch's generator on the CPU is Mersenne Twister, which takes 32 bits of a seed.
    return torch.Generator(_CPU).manual_seed(int.from_bytes(digest[:4], "big"))


def _draw(population: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw distinct whole numbers from 0 to `population` - 1; every set is equally likely.

    Args:
        population: How many numbers there are to draw from.
        count: How many numbers to draw, at most `population`.
        generator: The source of random numbers.

    Returns:
        The numbers, int64 (count) on the CPU, ascending.
    """
    if count <= population // 2:
        return _first_distinct(population, count, generator)
    # Above a half, most draws would repeat earlier ones: draw the numbers to leave out instead.
    left_out = _first_distinct(population, population - count, generator)
    kept = torch.ones(population, dtype=torch.bool, device=_CPU)
    kept[left_out] = False
    return kept.nonzero().flatten()


def _first_distinct(population: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw uniform numbers below `population` until `count` differ; return these, ascending."""
    # Each round draws as many numbers as are missing, so that every distinct one is kept: a choice
    # among them would have to be random again.
    distinct = torch.empty(0, dtype=torch.int64, device=_CPU)
    while len(distinct) < count:
        more = torch.empty(count - len(distinct), dtype=torch.int64, device=_CPU)
        # random_ draws 63 bits. torch.randint takes the remainder of 32 bits for bounds below
        # 2**32, and would favour some elements of a large layer by 7 % and more.
        more.random_(generator=generator).remainder_(population)
        distinct = torch.unique_consecutive(torch.cat([distinct, more]).sort().values)
    return distinct


def _list_elements(blocks: Tensor, row: int, block: int, blocks_in_row: int) -> Tensor:
    """Return the indices of all elements that lie in the given blocks.

    A row of a layer runs along its last dimension, and is divided into blocks of neighbours.

    Args:
        blocks: Numbers of the blocks, counted row by row, int64 (blocks).
        row: Number of elements in a row.
        block: Number of elements in a block. The last block of a row may be shorter.
        blocks_in_row: Number of blocks in a row.

    Returns:
        Indices into the flattened layer, int64 (elements).
    """
    columns = blocks.remainder(blocks_in_row)[:, None] * block + torch.arange(block, device=_CPU)
    rows = blocks.div(blocks_in_row, rounding_mode="floor")[:, None]
    return (rows * row + columns)[columns < row]  # the last block of a row may be shorter
