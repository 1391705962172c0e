"""Sort recipes into families, whose real runs are evidence for each other.

A *recipe* says how weights and optimizer states are stored. Evidence for a verdict on a recipe are
real runs of its family alone: what became of weights in 8 bits that were rounded to nearest says
nothing about bf16. The remedies, stochastic rounding and Kahan summation, are a family each, in all
formats.

`run_rules` quotes the evidence of a family.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from altgrad.measurement.catalogue import NOW
from altgrad.quantization.block_formats import get_formats
from altgrad.report.records.schema import RecipeInfo

FAMILIES = {
    "now": "runs in bf16, watched as they were",
    "true": "runs with all tensors in bf16",
    "nearest-16": "runs with weights in 16 bits, rounded to nearest",
    "nearest-8": "runs with weights in 8 bits or fewer, rounded to nearest",
    "stochastic": "runs with stochastic rounding",
    "kahan": "runs with Kahan summation",
    "states": "runs with optimizer states in 16 bits or fewer",
}
"""The real runs of each family, in words."""
_FEW_BITS = 8
_FULL = ("float32", "float64")
_LIBRARIES = {
    "make_torchao_sr": "stochastic",
    "make_optimi_kahan": "kahan",
    "make_torchao_8bit": "states",
    "make_torchao_fp8": "states",
    "make_bnb_8bit": "states",
}
"""Families of the recipes of other libraries, by the function that makes the optimizer."""


def as_recipe(storage: RecipeInfo) -> RecipeInfo:
    """Return the description of how a run itself is stored, in the form of a tried recipe.

    A tried recipe has None for a dtype of float32 or float64, and for the run's own optimizer.
    """
    dtype = None if storage.dtype in _FULL else storage.dtype
    return replace(storage, dtype=dtype, optimizer=None)


def is_stochastic(recipe: RecipeInfo | None) -> bool:
    """Return True if a recipe rounds weights stochastically, by itself or in its optimizer.

    This holds for any recipe, also for one that belongs to no family of tested recipes.

    Args:
        recipe: The recipe's description in the run file; None if it has none.
    """
    if recipe is None:
        return False
    optimizer = (recipe.optimizer or "").rpartition(".")[2]
    return recipe.rounding == "stochastic" or _LIBRARIES.get(optimizer) == "stochastic"


def find_family(name: str, recipe: RecipeInfo | None, dtypes: Collection[str] = ()) -> str | None:
    """Return the family of a recipe, a key of `FAMILIES`.

    Args:
        name: Name of the recipe. Without a description it is that of a number format in which
            weights are rounded to nearest.
        recipe: The recipe's description in the run file; None if it has none. For ``now``, it is
            that of `as_recipe`.
        dtypes: Names of the dtypes of the run's layers, such as ``"bfloat16"``, for ``now``.

    Returns:
        The family; None if no real run was done with such a recipe.
    """
    if name == NOW and (recipe is None or _is_plain(recipe)):
        return "now" if "bfloat16" in dtypes and "float16" not in dtypes else None
    if recipe is None:
        return _sort_by_bits(name)
    if recipe.accumulate is not None or (recipe.weights is not None and recipe.states):
        return None
    if recipe.optimizer is not None:
        return _LIBRARIES.get(recipe.optimizer.rpartition(".")[2])
    if recipe.compensation is not None:
        return "kahan"
    if recipe.rounding == "stochastic":
        return "stochastic"
    if recipe.dtype is not None:
        return "true" if recipe.dtype == "bfloat16" else None
    if recipe.weights is None:
        return "states" if recipe.states else None
    return _sort_by_bits(recipe.weights)


def _is_plain(recipe: RecipeInfo) -> bool:
    """Return True if all tensors have one dtype, and weights are rounded to nearest."""
    is_changed = recipe.weights or recipe.states or recipe.compensation
    return recipe.rounding == "nearest_even" and not is_changed


def _sort_by_bits(format: str) -> str | None:
    """Return the family of weights that are rounded to nearest in a format, by its name."""
    try:
        (found,) = get_formats(format)
    except ValueError:  # a format that the user has defined
        return None
    return "nearest-8" if found.element.bits <= _FEW_BITS else "nearest-16"
