"""`find_drawing`: how many neighbouring elements a recipe needs to be drawn together."""

from __future__ import annotations

from typing import Any

import pytest

from altgrad import Recipe
from altgrad.recipes.names import get_recipes
from altgrad.twins.drawing import Drawing, find_drawing, rank_drawing

RECIPES: dict[str, tuple[Any, int]] = {
    "single": (Recipe("a", weights="bf16"), 1),
    "blocks": (Recipe("a", weights="mxfp4"), 32),
    "tensor": (Recipe("a", weights="e4m3fn"), 1),
    "state": (Recipe("a", states={"exp_avg_sq": "mxfp8_e5m2"}), 32),
}


@pytest.mark.parametrize("name", RECIPES)
def test_blocks_of_formats_are_drawn_together(name: str) -> None:
    recipe, block = RECIPES[name]
    assert find_drawing(recipe, "tensor") == Drawing(block)


def test_blocks_of_several_sizes_have_a_common_multiple() -> None:
    recipe = Recipe("a", weights="mxfp4", states={"exp_avg": "e4m3fn"})
    assert find_drawing(recipe, ("block", 24)).block == 96
    assert find_drawing(recipe, None).block == 32


def test_packed_states_are_drawn_last_and_in_large_layers_alone() -> None:
    pytest.importorskip("torchao")
    (recipe,) = get_recipes("torchao-8bit")
    drawing = find_drawing(recipe, "tensor")
    assert drawing.packed is not None
    assert drawing.find_block(4096) == drawing.packed.block
    assert drawing.find_block(4095) == 1
    assert min(drawing, Drawing(32), Drawing(1), key=rank_drawing) == Drawing(1)
    assert max(drawing, Drawing(32), key=rank_drawing) == drawing
