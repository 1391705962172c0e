"""The family of each recipe, whose real runs are evidence for it."""

import math
from typing import Any

import pytest
import torch

from altgrad import Recipe
from altgrad.monitor.header import describe_recipe
from altgrad.quantization.block_formats import BLOCK_FORMATS, get_formats
from altgrad.quantization.formats import FORMATS
from altgrad.recipes import get_recipes
from altgrad.recipes.libraries import LIBRARY_RECIPES
from altgrad.report.judging.families import FAMILIES, as_recipe, find_family, is_stochastic
from altgrad.report.records.schema import RecipeInfo
from tests.report.twin_runs import make_recipe


def describe(recipe: Recipe) -> RecipeInfo:
    """Return the description of a recipe as a run file has it."""
    return RecipeInfo(recipe.name, **describe_recipe(recipe, "tensor"))


def find(recipe: Recipe) -> str | None:
    return find_family(recipe.name, describe(recipe))


TRUE = {
    "fp32": None,
    "bf16-true": "true",
    "bf16-true-fused": "true",
    "fp16-true": None,
    "fp16-true-fused": None,
}
LIBRARIES = {
    "torchao-sr": "stochastic",
    "torchao-8bit": "states",
    "torchao-fp8": "states",
    "optimi-kahan": "kahan",
    "bnb-8bit": "states",
}
STORED = [each.name for each in get_formats((*FORMATS, *BLOCK_FORMATS)) if each.power_of_two]
OF_16_BITS = ("bf16", "fp16")


@pytest.mark.parametrize("name", STORED)
def test_weights_in_a_format_are_sorted_by_bits_and_rounding(name: str) -> None:
    recipes = get_recipes([name, f"{name}-sr", f"{name}-kahan"])
    nearest = "nearest-16" if name in OF_16_BITS else "nearest-8"
    assert [find(recipe) for recipe in recipes] == [nearest, "stochastic", "kahan"]
    assert find_family(name, None) == nearest  # judged from single steps


@pytest.mark.parametrize(("name", "family"), TRUE.items())
def test_tensors_in_bf16_are_a_family(name: str, family: str | None) -> None:
    assert find(*get_recipes(name)) == family


@pytest.mark.parametrize("name", LIBRARY_RECIPES)
def test_the_recipes_of_libraries_belong_to_what_they_do(name: str) -> None:
    assert find(LIBRARY_RECIPES[name]) == LIBRARIES[name]


def make_adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters)


@pytest.mark.parametrize(
    ("fields", "family"),
    [
        ({"states": {"exp_avg_sq": "bf16"}}, "states"),
        ({"states": {"*": "e4m3fn"}}, "states"),
        ({"weights": "e4m3fn", "rounding": "stochastic"}, "stochastic"),
        ({"weights": "bf16", "states": {"exp_avg_sq": "e5m2"}}, None),
        ({"weights": "bf16", "rounding": "stochastic", "states": {"exp_avg": "e5m2"}}, None),
        ({"weights": "bf16", "accumulate": "bf16"}, None),
        ({"optimizer": make_adam}, None),
        ({"optimizer": make_adam, "weights": "bf16"}, None),
        ({"dtype": torch.float16}, None),
        ({"dtype": torch.bfloat16}, "true"),
        ({}, None),
    ],
    ids=lambda value: str(value).partition(" at 0x")[0],  # else each process has other names
)
def test_a_recipe_of_the_user_has_the_family_of_runs_that_were_done(
    fields: dict[str, Any], family: str | None
) -> None:
    assert find(Recipe("mine", **fields)) == family


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"weights": "bf16", "rounding": "stochastic"}, True),
        ({"weights": "bf16", "rounding": "stochastic", "states": {"exp_avg": "e5m2"}}, True),
        ({"weights": "bf16", "rounding": "stochastic", "accumulate": "bf16"}, True),
        ({"weights": "bf16", "states": {"exp_avg": "e5m2"}}, False),
        ({"optimizer": make_adam}, False),
    ],
    ids=lambda value: str(value).partition(" at 0x")[0],
)
def test_a_recipe_may_round_stochastically_in_any_family(
    fields: dict[str, Any], expected: bool
) -> None:
    assert is_stochastic(describe(Recipe("mine", **fields))) is expected


def test_libraries_that_round_stochastically_are_known() -> None:
    found = {name for name, each in LIBRARY_RECIPES.items() if is_stochastic(describe(each))}
    assert found == {name for name, family in LIBRARIES.items() if family == "stochastic"} != set()
    assert not is_stochastic(None)


def test_a_format_of_the_user_has_no_family() -> None:
    info = RecipeInfo("mine", "mine", "nearest_even", None, {}, None, None, False, math.nan)
    assert find_family("mine", info) is None
    assert find_family("mine", None) is None


@pytest.mark.parametrize(
    ("dtypes", "family"),
    [
        (("bfloat16",), "now"),
        (("bfloat16", "float32"), "now"),  # norms in float32
        (("float16",), None),
        (("bfloat16", "float16"), None),
        (("float32",), None),  # rounded by a `WeightStorage`
        ((), None),
    ],
)
def test_a_run_itself_has_a_family_if_it_is_in_bf16(
    dtypes: tuple[str, ...], family: str | None
) -> None:
    assert find_family("now", None, dtypes) == family


def test_each_family_is_described() -> None:
    recipes = [*get_recipes([*STORED, *TRUE, "bf16-sr", "bf16-kahan"]), *LIBRARY_RECIPES.values()]
    found = {find(recipe) for recipe in recipes} - {None}
    assert {*FAMILIES} == found | {"now"}


@pytest.mark.parametrize(
    ("about", "family"),
    [
        ({"dtype": "bfloat16"}, "now"),
        ({"dtype": "bfloat16", "rounding": "stochastic"}, "stochastic"),
        ({"dtype": "bfloat16", "compensation": "kahan"}, "kahan"),
        ({"dtype": "float16"}, None),
        ({"weights": "bf16"}, "nearest-16"),
        ({"weights": "e4m3fn"}, "nearest-8"),
        ({"weights": "e4m3fn", "rounding": "stochastic"}, "stochastic"),
        ({"states": {"exp_avg_sq": "e5m2"}}, "states"),
    ],
)
def test_the_run_itself_belongs_to_runs_that_are_stored_alike(
    about: dict[str, Any], family: str | None
) -> None:
    """A run file names the optimizer of each run, and the dtype also of those in float32."""
    stored = make_recipe("now", **{"dtype": "float32", "optimizer": "torch.optim.AdamW"} | about)
    assert find_family("now", as_recipe(stored), [stored.dtype or ""]) == family
