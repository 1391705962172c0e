"""Short names of recipes, near matches, and the recipes that are tried by default."""

from __future__ import annotations

import re

import pytest
import torch

from altgrad import FloatFormat, Recipe
from altgrad.quantization import BLOCK_FORMATS, FORMATS
from altgrad.recipes import find_default_recipes, get_recipes


def test_each_short_name_is_the_name_of_its_recipe() -> None:
    formats = [*FORMATS, *(name for name in BLOCK_FORMATS if name != "nvfp4")]
    names = [f"{format}{way}" for format in formats for way in ("", "-sr", "-kahan")]
    names += ["fp32", "bf16-true", "fp16-true", "bf16-true-fused", "fp16-true-fused"]
    recipes = get_recipes(names)
    assert [recipe.name for recipe in recipes] == names
    assert len({*recipes}) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", name) for name in names)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fp32", Recipe("fp32")),
        ("bf16", Recipe("bf16", weights="bf16")),
        ("E4M3-sr", Recipe("e4m3fn-sr", weights="e4m3fn", rounding="stochastic")),
        ("mxfp8-kahan", Recipe("mxfp8_e4m3-kahan", weights="mxfp8", compensation="kahan")),
        ("bf16-true", Recipe("bf16-true", dtype=torch.bfloat16)),
        ("fp16-true-fused", Recipe("fp16-true-fused", dtype=torch.float16, fused=True)),
    ],
)
def test_a_short_name_stands_for_a_recipe(name, expected) -> None:
    assert get_recipes(name) == (expected,)


def test_recipes_and_names_can_be_mixed() -> None:
    mine = Recipe("mine", states={"*": "bf16"})
    assert get_recipes(mine) == (mine,)
    assert get_recipes([mine, "fp32"]) == (mine, Recipe("fp32"))
    assert get_recipes(()) == ()


@pytest.mark.parametrize(
    ("recipes", "error", "message"),
    [
        ("bf16-st", ValueError, "recipes='bf16-st': expected a short name; nearest: .*bf16-sr"),
        ("bf16_sr", ValueError, "recipes='bf16_sr': expected a short name; nearest: .*bf16-sr"),
        ("fp16-ture", ValueError, "nearest: .*fp16-true"),
        ("adam8bit", ValueError, "recipes='adam8bit': expected a short name; nearest: "),
        ("nvfp4", ValueError, "weights='nvfp4' has scales that are not powers of two"),
        (
            ["bf16", "bfloat16"],
            ValueError,
            "expected different names.* 'bf16' occurs more than once",
        ),
        ([torch.bfloat16], TypeError, "torch.bfloat16, .*: expected short names and Recipes; wri"),
        (5, TypeError, "recipes=5: expected short names and Recipes; pass a list"),
        (torch.bfloat16, TypeError, "recipes=torch.bfloat16: expected short names and Recipes"),
        (None, TypeError, "recipes=None: expected short names and Recipes"),
        (Recipe("bf16", weights="fp16"), ValueError, "expected a name other than this short name"),
    ],
)
def test_a_wrong_recipe_is_an_error_that_says_what_to_do(recipes, error, message) -> None:
    with pytest.raises(error, match=message):
        get_recipes(recipes)


def test_the_default_recipes_follow_the_watched_formats() -> None:
    names = [recipe.name for recipe in find_default_recipes(["bf16", "e5m2", "mxfp4", "fp16"])]
    assert names == [
        *("bf16", "bf16-sr", "bf16-true", "e5m2", "e5m2-sr", "mxfp4", "mxfp4-sr"),
        *("fp16", "fp16-sr", "fp16-true"),
    ]
    assert find_default_recipes("nvfp4") == ()


def test_names_of_formats_are_made_safe_for_log_keys() -> None:
    mine = FloatFormat("my.format", 4, 5, 7)
    assert [each.name for each in find_default_recipes(mine)] == ["my_format", "my_format-sr"]


def test_formats_of_one_name_have_the_recipes_of_the_last() -> None:
    other = FloatFormat("my_format", 4, 4, 7)
    recipes = find_default_recipes([FloatFormat("my.format", 4, 5, 7), other])
    assert [each.weights for each in recipes] == [other, other]


def test_a_format_with_the_name_of_a_known_one_has_recipes_of_its_own() -> None:
    mine = FloatFormat("e4m3fn", 4, 3, 8)
    assert find_default_recipes(mine)[0].weights == mine
