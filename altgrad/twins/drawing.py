"""`Drawing`: how many neighbouring elements of a layer a recipe needs to be drawn together.

A *twin* steps a sample of a layer as the recipe says. Elements of a block share a scale, so that a
sample has whole blocks.

Read `twin_source` first; `layer_plan` comes next.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from altgrad.quantization.formats import Scaling
from altgrad.quantization.number_format import get_applied_scaling
from altgrad.recipes.packed_states import PackedStates
from altgrad.recipes.recipe import Recipe


class Drawing(NamedTuple):
    """The number of neighbouring elements that are drawn together into the sample of a layer.

    A *recipe* says in which formats weights and optimizer states are stored. Where a block of
    elements shares a scale, the sample has whole blocks, since the scale depends on all of them.

    Attributes:
        block: Number of elements along the last dimension that share a scale of a format; 1 for
            single elements.
        packed: How the recipe's optimizer keeps states in blocks of the flattened layer; None if it
            does not.
    """

    block: int = 1
    packed: PackedStates | None = None

    def find_block(self, numel: int) -> int:
        """Return the number of elements that are drawn together in a layer of `numel` elements."""
        if self.packed is not None and self.packed.packs(numel):
            return self.packed.block
        return self.block


def find_drawing(recipe: Recipe, scaling: Scaling | None) -> Drawing:
    """Return how many neighbouring elements to draw together, so that blocks are whole.

    The elements of a block share a scale in a format of the recipe, or in the states of its
    optimizer. The least common multiple of several sizes is drawn.

    Args:
        recipe: The recipe.
        scaling: The elements that share a scale, as in `altgrad.measure`.

    Raises:
        ValueError: A format and the states of the optimizer have blocks.
    """
    formats = [
        each for each in (recipe.weights_format, *recipe.state_formats.values()) if each is not None
    ]
    applied = [get_applied_scaling(format, scaling) for format in formats]
    block = math.lcm(*(each[1] for each in applied if isinstance(each, tuple)))
    packed = None if recipe.maker is None else recipe.maker.packed
    if packed is not None and block > 1:
        raise ValueError(
            f"the recipe {recipe.name} has formats with scales for blocks of {block}, and an "
            f"optimizer with packed states: expected blocks in one of both; leave out weights= and "
            "states=, or choose another scaling="
        )
    return Drawing(block, packed)


def rank_drawing(drawing: Drawing) -> tuple[bool, int]:
    """Return a key that sorts samples of single elements first, and those of packed states last."""
    return drawing.packed is not None, drawing.block
