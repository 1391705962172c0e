"""`get_recipes` and `find_default_recipes`: the common recipes by short names.

A recipe says in which formats weights and optimizer states are stored. Short names are `fp32`; for
each format f the names f, f-sr (stochastic rounding) and f-kahan; and `bf16-true` and `fp16-true`,
also with `-fused`. Further names stand for optimizers of other libraries.

Read `libraries` first; `altgrad.twins.layout` comes next, the first file about twins.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from altgrad.quantization.block_formats import BLOCK_FORMATS, Formats, get_formats
from altgrad.quantization.formats import FORMATS
from altgrad.quantization.number_format import NumberFormat
from altgrad.quantization.spellings import find_near
from altgrad.recipes.libraries import LIBRARY_RECIPES, import_library
from altgrad.recipes.recipe import Recipe

_WAYS: Mapping[str, Mapping[str, Any]] = {
    "": {},
    "-sr": {"rounding": "stochastic"},
    "-kahan": {"compensation": "kahan"},
}
"""The ends of short names, and the fields of `Recipe` that each stands for."""
_TRUE = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The formats with a recipe ``-true``, in which all tensors have that dtype."""


def get_recipes(recipes: str | Recipe | Sequence[str | Recipe]) -> tuple[Recipe, ...]:
    """Return the recipes with these names.

    A *recipe* says how weights and optimizer states are stored and stepped.

    The short names are, for each format f that `altgrad.quantization.get_formats` knows:

    - ``fp32``: weights and states in float32, or in float64 in a training in float64.
    - f: weights on the grid of f, rounded to nearest; states in float32.
    - ``f-sr``: the same with stochastic rounding.
    - ``f-kahan``: the same with Kahan summation.
    - ``bf16-true``, ``fp16-true``: all tensors in this dtype, as after ``model.to(dtype)``.
    - ``bf16-true-fused``, ``fp16-true-fused``: the same with the fused optimizer.
    - ``torchao-sr``: weights and states in bf16, stepped by torchao's AdamW with stochastic
      rounding.
    - ``torchao-8bit``, ``torchao-fp8``: states in 8 bits, stepped by torchao's AdamW8bit or
      AdamWFp8.
    - ``optimi-kahan``: weights and states in bf16, stepped by optimi's AdamW with Kahan summation.
    - ``bnb-8bit``: states in 8 bits, stepped by the AdamW8bit of bitsandbytes.

    Upper case and other spellings of a format are accepted: ``E4M3-sr`` is ``e4m3fn-sr``.

    Args:
        recipes: A short name, a `Recipe`, or a sequence of these.

    Returns:
        The recipes in the order given.

    Raises:
        TypeError: An item is neither a name nor a `Recipe`.
        ValueError: A name is unknown, occurs twice, or is a short name that stands for another
            recipe.
        ImportError: A name stands for an optimizer of a library that is not installed.

    Examples:
        >>> from altgrad.recipes import get_recipes
        >>> [recipe.bytes_per_parameter for recipe in get_recipes(["fp32", "bf16", "bf16-true"])]
        [12.0, 10.0, 6.0]
    """
    items = (recipes,) if isinstance(recipes, (str, Recipe)) else recipes
    if not isinstance(items, Iterable):
        raise TypeError(
            f"recipes={recipes!r}: expected short names and Recipes; pass a list such as "
            "['bf16', 'bf16-sr']"
        )
    found = tuple(map(_get_recipe, items))
    names = [recipe.name for recipe in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"recipes={names}: expected different names, because log keys contain them, and "
                f"{name!r} occurs more than once; leave one out, or rename it"
            )
    return found


def find_default_recipes(formats: Formats) -> tuple[Recipe, ...]:
    """Return the recipes that a monitor of some formats tries unless others are named.

    A *recipe* says how weights and optimizer states are stored and stepped.

    For each format f these are f and ``f-sr``, followed by ``bf16-true`` for bf16 and ``fp16-true``
    for fp16. Formats whose scales are not powers of two, such as ``nvfp4``, are left out, because
    no recipe can store weights in them. In names, ``_`` replaces characters of a format's name
    other than letters, digits, ``-`` and ``_``. If two formats have the same name, the recipes are
    those of the last one.

    Args:
        formats: The formats, as `altgrad.quantization.get_formats` accepts them.

    Returns:
        The recipes, in the order of the formats.

    Raises:
        ValueError: A format is unknown.
    """
    recipes: list[Recipe] = []
    for format in get_formats(formats):
        if format.power_of_two:
            recipes += [_make_recipe(format, "", {}), _make_recipe(format, "-sr", _WAYS["-sr"])]
            if format.name in _TRUE:
                recipes.append(_get_short(f"{format.name}-true"))
    return tuple({recipe.name: recipe for recipe in recipes}.values())


def _get_recipe(recipe: str | Recipe) -> Recipe:
    """Return a recipe by its short name, or a `Recipe` itself.

    Raises:
        TypeError: The argument is neither a name nor a `Recipe`.
        ValueError: The name is unknown, or the recipe has the short name of another one.
    """
    if isinstance(recipe, str):
        return _get_short(recipe)
    if not isinstance(recipe, Recipe):
        raise TypeError(
            f"recipes=[…, {recipe!r}, …]: expected short names and Recipes; write 'bf16', for "
            "example"
        )
    short = _list_short().get(recipe.name, recipe)
    if short != recipe:
        raise ValueError(
            f"name={recipe.name!r}: expected a name other than this short name, which stands for "
            f"{short!r}; rename {recipe!r}"
        )
    return recipe


def _get_short(name: str) -> Recipe:
    """Return the recipe with a short name, such as ``bf16-sr``.

    Raises:
        ValueError: No recipe has this name. The message lists the nearest names.
        ImportError: The recipe steps with an optimizer of a library that is not installed.
    """
    short = _list_short()
    lower = name.strip().lower()
    if lower in LIBRARY_RECIPES:
        import_library(lower)
    if lower in short:
        return short[lower]
    format, dash, way = lower.rpartition("-")
    for spelling, suffix in ((lower, ""), (format, dash + way)):
        if suffix in _WAYS and (canonical := _find_format(spelling)) is not None:
            return _make_recipe(canonical, suffix, _WAYS[suffix])
    known = {*short, *(f"mxfp8{way}" for way in _WAYS)}  # a spelling that is better known
    near = find_near(lower, known) or ["fp32", "bf16", "bf16-sr", "bf16-true"]
    raise ValueError(
        f"recipes={name!r}: expected a short name; nearest: {', '.join(near)}. For another recipe, "
        "pass a Recipe; 'altgrad formats' lists all"
    )


@functools.cache
def _list_short() -> dict[str, Recipe]:
    """Return all common recipes by short name, such as ``bf16-sr``.

    A *recipe* says how weights and optimizer states are stored and stepped. In these names each
    format has one spelling, as in ``e4m3fn-sr``; the other spelling ``e4m3-sr`` is not listed.
    """
    short = [Recipe("fp32")]
    for format in get_formats((*FORMATS, *BLOCK_FORMATS)):
        if format.power_of_two:
            short += [_make_recipe(format, suffix, way) for suffix, way in _WAYS.items()]
    for name, dtype in _TRUE.items():
        short.append(Recipe(f"{name}-true", dtype=dtype))
        short.append(Recipe(f"{name}-true-fused", dtype=dtype, fused=True))
    return {recipe.name: recipe for recipe in short} | dict(LIBRARY_RECIPES)


def _find_format(spelling: str) -> NumberFormat | None:
    """Return the format with this spelling; None if there is none."""
    try:
        (format,) = get_formats(spelling)
    except ValueError:
        return None
    return format


def _make_recipe(format: NumberFormat, suffix: str, way: Mapping[str, Any]) -> Recipe:
    """Return the recipe that stores weights in a format.

    Args:
        format: The format.
        suffix: The end of the recipe's name, such as ``-sr``.
        way: Fields of the recipe beside `name` and `weights`.
    """
    return Recipe(re.sub(r"[^A-Za-z0-9_-]", "_", format.name) + suffix, weights=format, **way)
