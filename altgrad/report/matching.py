"""Find the recipe that one run tried on samples and by which another run is really stored.

A *recipe* says how weights and optimizer states are stored and stepped. A run tries recipes on
samples of its layers, the *twins*, and its file describes in the same way how the run itself is
stored. If the two descriptions agree, the twins predicted the other run.

The module `confirmation` comes next and sets the figures of both beside each other.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from altgrad.measurement.catalogue import NOW
from altgrad.report.records.run import Run
from altgrad.report.records.schema import RecipeInfo

SHARES = ("frozen_frac", "progress_kept")
"""Metrics of twins whose figures are shares, and which show that a recipe was tried.

A *twin* is a sample of the layers that is stored and stepped as a recipe says.
"""

_LOW = frozenset({"bfloat16", "float16"})
"""Dtypes in which the fused implementation of an optimizer rounds otherwise than the others."""


class _Storage(NamedTuple):
    """A way to store and step weights, in names that are equal if the ways are.

    Attributes:
        tensors: Dtype of the tensors, and True if the fused optimizer steps tensors of 16 bits.
        formats: Format of the weights, and those of the states by name, sorted.
        rounding: How weights and states are rounded, and what is kept of the rounding errors.
        optimizer: Package and class of the optimizer; None if unknown, which agrees with any.
    """

    tensors: tuple[str, bool]
    formats: tuple[str | None, tuple[tuple[str, str], ...]]
    rounding: tuple[str, str | None]
    optimizer: str | None

    def agrees(self, other: _Storage) -> bool:
        """Return True if both ways are equal, apart from an unknown optimizer."""
        is_known = None not in (self.optimizer, other.optimizer)
        return self[:3] == other[:3] and (not is_known or self.optimizer == other.optimizer)


_LIBRARIES = {
    "altgrad.recipes.libraries.make_torchao_sr": ("torchao._AdamW", ("stochastic", None)),
    "altgrad.recipes.libraries.make_optimi_kahan": ("optimi.AdamW", ("nearest_even", "kahan")),
}
"""By the function that makes a recipe's optimizer: its package and class, and how it rounds.

The recipes for states in 8 bits are left out: they keep weights in float32, and such a run has no
figures of itself.
"""


class Match(NamedTuple):
    """A recipe that one of two runs tried, and by which the other one is stored.

    Attributes:
        recipe: Name of the recipe, a way to store weights.
        is_swapped: True if the second run tried it, and the first one is stored so.
    """

    recipe: str
    is_swapped: bool


def find_match(a: Run, b: Run, recipe: str | None = None) -> Match | None:
    """Find the recipe that one of two runs tried, and by which the other one is stored.

    A *recipe* says how weights and optimizer states are stored and stepped. A run tries it on
    samples of its layers.

    Args:
        a: A run.
        b: Another one.
        recipe: Name of a recipe that one of the runs tried, to be taken however the other run is
            stored. None for the one by which the other run is stored.

    Returns:
        The recipe, of `a` if both runs tried one; None if `recipe` is None and neither did.

    Raises:
        ValueError: No run tried `recipe`, or the other run did not measure what it loses itself.
            Or `recipe` is None, and several recipes say how the other run is stored.
    """
    for predicting, real, is_swapped in ((a, b, False), (b, a, True)):
        if not has_own_figures(real):
            continue
        known = list_predicted(predicting)
        matching = [recipe] if recipe is not None else list_matches(predicting, real)
        found = [name for name in matching if name in known]
        if len(found) > 1:
            raise ValueError(
                f"{predicting.path} predicts {', '.join(found)}, and {real.path} is stored as each "
                "of them says: choose one by --recipe"
            )
        if found:
            return Match(found[0], is_swapped)
    if recipe is None:
        return None
    raise ValueError(f"--recipe={recipe}: expected {_describe_choice(a, b)}")


def describe_no_match(a: Run, b: Run) -> list[str]:
    """Describe what is missing where one run could have predicted what happened in the other.

    Args:
        a: A run, which is called A.
        b: Another one, called B, for which `find_match` found nothing.

    Returns:
        Sentences with a remedy; empty if no run has weights in low precision, or both have.
    """
    notes = []
    for letter, other, real, predicting in (("B", "A", b, a), ("A", "B", a, b)):
        if not has_own_figures(real):
            if real.now is not None and _is_low(real.now):
                notes.append(
                    f"{letter} is stored low, and was not compared with float32 (it has no "
                    f"frozen_frac/{NOW}): give its monitor a recipe, such as bf16-sr"
                )
        elif not has_own_figures(predicting) and (known := list_predicted(predicting)):
            how = f"but the file of {letter} does not say how"
            if real.now is not None:
                how = f"and {other} tried no recipe that stores it so"
            notes.append(
                f"{letter} is stored low, {how}: to see how far another recipe of {other} predicts "
                f"it, pass --recipe=NAME ({', '.join(known)})"
            )
    return notes


def has_own_figures(run: Run) -> bool:
    """Return True if a run has figures of itself, under the name ``now``, compared with float32.

    Only runs that store weights in fewer bits than float32 have them.
    """
    if run.recipes:
        return _has_figures(run, NOW)
    # Without recipes, a run in 16 bits has the keys, and no values.
    keys = [f"{metric}/{NOW}" for metric in SHARES]
    known = [key for key in keys if key in run.figure_keys]
    return bool(known) and any(
        not np.isnan(table.find_figures(key)[0]).all() for table in run.tables() for key in known
    )


def list_predicted(run: Run) -> list[str]:
    """List the recipes, ways to store weights, that a run tried on samples and has figures of."""
    return [name for name in run.recipes if _has_figures(run, name)]


def list_matches(predicting: Run, real: Run) -> list[str]:
    """List the recipes of one run that say how another run is stored.

    A *recipe* says how weights and optimizer states are stored and stepped. A run tries it on
    samples of its layers.

    Args:
        predicting: The run that tried recipes.
        real: The run that is stored in some way.

    Returns:
        Names of recipes, in the order of the run; empty if the file of `real` does not say how it
        is stored.
    """
    if real.now is None:
        return []
    stored = _describe(real.now, real.now)
    return [
        name
        for name, recipe in predicting.recipes.items()
        if recipe.accumulate is None and _describe(recipe, predicting.now).agrees(stored)
    ]


def _describe(recipe: RecipeInfo, run: RecipeInfo | None) -> _Storage:
    """Return how a recipe stores weights, in a run that is itself stored as `run` says."""
    dtype = recipe.dtype
    if dtype is None:
        dtype = "float64" if run is not None and run.dtype == "float64" else "float32"
    rounding: tuple[str, str | None] = (recipe.rounding, recipe.compensation)
    # Twins step with a copy of the run's optimizer, which is fused if that one is.
    is_fused = recipe.fused or (recipe.optimizer is None and run is not None and run.fused)
    optimizer = recipe.optimizer or (None if run is None else run.optimizer)
    if optimizer in _LIBRARIES:
        optimizer, rounding = _LIBRARIES[optimizer]
    elif optimizer is not None:
        optimizer = _shorten(optimizer)
    return _Storage(
        (dtype, is_fused and dtype in _LOW),
        (recipe.weights, tuple(sorted(recipe.states.items()))),
        rounding,
        optimizer,
    )


def _shorten(name: str) -> str:
    """Return package and class of a full name: libraries move classes from module to module."""
    return f"{name.partition('.')[0]}.{name.rpartition('.')[2]}"


def _describe_choice(a: Run, b: Run) -> str:
    """Return a phrase on the recipes that ``--recipe`` can name, or on why it can name none."""
    pairs = ((a, b), (b, a))
    known = [
        name
        for predicting, real in pairs
        if has_own_figures(real)
        for name in list_predicted(predicting)
    ]
    if known:
        return f"a recipe that one of the runs predicts: {', '.join(dict.fromkeys(known))}"
    return (
        f"a run with figures of itself, such as frozen_frac/{NOW}, beside one with recipes; a run "
        "whose weights have 16 bits, or which a WeightStorage rounds, has them if its monitor has "
        "recipes"
    )


def _is_low(storage: RecipeInfo) -> bool:
    """Return True if weights or states are stored in fewer bits than float32."""
    return storage.dtype in _LOW or storage.weights is not None or bool(storage.states)


def _has_figures(run: Run, recipe: str) -> bool:
    return any(f"{metric}/{recipe}" in run.figure_keys for metric in SHARES)
