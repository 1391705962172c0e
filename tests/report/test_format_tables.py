"""The tables of formats, block formats and recipes: complete, and with the bytes of each recipe."""

import re

import pytest

from altgrad.quantization import BLOCK_FORMATS, FORMATS, get_formats
from altgrad.recipes import Recipe, get_recipes
from altgrad.recipes.libraries import LIBRARY_RECIPES
from altgrad.report.format_tables import RECIPES, RecipeLine, count_bytes, print_formats
from tests.report.shown_runs import print_to_text

SHOWN = print_to_text(print_formats, 80)
ROWS = {line.split()[0]: line.split() for line in SHOWN.splitlines() if line.strip()}


def find_recipe(name: str) -> Recipe:
    """Return a recipe by its short name; those of other libraries also if these are missing."""
    return LIBRARY_RECIPES[name] if name in LIBRARY_RECIPES else get_recipes(name)[0]


def test_the_tables_have_all_formats_and_recipes_and_nothing_is_cut() -> None:
    assert {*FORMATS, *BLOCK_FORMATS, *(line.name for line in RECIPES)} <= {*ROWS}
    assert "…" not in SHOWN
    assert {*LIBRARY_RECIPES} < {line.name for line in RECIPES}
    assert ROWS["mxfp8_e4m3_ceil"][1:4] == ["1.03", "32", "e4m3fn"]
    assert ROWS["nvfp4"][1:4] == ["0.56", "16", "e2m1"]


@pytest.mark.parametrize("line", RECIPES, ids=lambda line: line.name)
def test_each_recipe_has_the_bytes_of_its_line(line: RecipeLine) -> None:
    formats = ["bf16", "e4m3fn", "mxfp4_ceil"] if line.weight_bytes is None else [""]
    for format in formats:
        recipe = find_recipe(re.sub("^F", format, line.name))
        weight = line.weight_bytes
        if weight is None:
            weight = count_bytes(get_formats(format)[0])
        assert recipe.bytes_per_parameter == weight + line.state_bytes


def test_bytes_are_written_with_the_format_where_it_is_open() -> None:
    assert ROWS["F-kahan"][1:4] == ["F", "+", "10"]
    assert ROWS["bnb-8bit"][1] == "6.03"
    assert ROWS["fp32"][1] == "12"
