"""Judge what a recipe would make of a whole run, from the verdicts on its layers.

A *recipe* says how weights and optimizer states are stored. The share of the progress that a run
would keep is that of all layers together. A layer counts with its energy, the square of the way
that float32 moved it, over all of its elements: a sample stands for its whole layer.

Read `twin_rules` and `families` first; `judge` comes next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from altgrad.report.judging.calibration import calibration
from altgrad.report.judging.families import find_family
from altgrad.report.judging.tallies import FROZEN
from altgrad.report.judging.twin_rules import classify
from altgrad.report.judging.verdicts import (
    PROGRESS,
    STEP_KEPT,
    Advice,
    Interval,
    RunAdvice,
    Verdict,
)
from altgrad.report.records.schema import RecipeInfo

_LIMITS = calibration().thresholds
_FEW_WEIGHTS = 0.05
"""Largest share of the weights that can stay in float32 at a small price."""
_STANDING = (Verdict.FROZEN, Verdict.STUCK)
_FAR_STATE = 1.5


@dataclass(frozen=True)
class LayerShare:
    """A layer's contribution to the run.

    Attributes:
        advice: The verdict on the layer.
        size: Number of elements of the layer.
        moved: Root mean square of the movement in float32; NaN if unknown.
        weights: Root mean square of the weights; NaN if unknown.
        weight_error: Distance of the weights from those in float32, over `weights`; NaN if unknown.
    """

    advice: Advice
    size: float
    moved: float
    weights: float = math.nan
    weight_error: float = math.nan

    @property
    def energy(self) -> float:
        return self.size * self.moved * self.moved


def judge_recipe(name: str, family: str | None, layers: Sequence[LayerShare]) -> RunAdvice:
    """Return the verdict of a recipe on a whole run, without what to do.

    Args:
        name: Name of the recipe; ``now`` for the run itself.
        family: Family of the recipe, a key of `FAMILIES`; None if no such run was tested.
        layers: The layers that the recipe was judged for.
    """
    has_twin = any(layer.advice.has_twin for layer in layers)
    # Movements since the start are not comparable with those of single steps.
    kept, error = _join_kept([each for each in layers if each.advice.has_twin == has_twin])
    weight_error = _join_weight_errors(layers)
    size = math.fsum(layer.size for layer in layers)
    standing = [layer for layer in layers if layer.advice.verdict in _STANDING]
    share = math.fsum(layer.size for layer in standing) / size if size else math.nan
    verdicts = [layer.advice.verdict for layer in layers]
    verdict = _find_verdict(kept, weight_error, share, verdicts, has_twin=has_twin)
    return RunAdvice(
        name,
        verdict,
        kept,
        find_kept_interval(kept, error, has_twin=has_twin),
        weight_error,
        _average(layers, FROZEN),
        [layer.advice.layer for layer in standing],
        share,
        len(layers),
        calibration().count_runs(family, verdict.name),
        "",
        has_twin,
    )


def _find_verdict(
    kept: float,
    weight_error: float,
    standing: float,
    layers: Sequence[Verdict],
    *,
    has_twin: bool,
) -> Verdict:
    if Verdict.BREAKS in layers:
        return Verdict.BREAKS
    if math.isnan(kept):
        return Verdict.FROZEN if standing >= _LIMITS.run_frozen else Verdict.NOT_JUDGED
    if kept < _LIMITS.frozen_kept and standing >= _LIMITS.run_frozen:
        return Verdict.FROZEN
    if not has_twin:
        limits = calibration().step_thresholds
        if kept >= limits.stores_fine:
            return Verdict.STORES_FINE
        return Verdict.WATCH if kept >= limits.needs_remedy else Verdict.NEEDS_REMEDY
    return classify(kept, weight_error)


def _join_kept(layers: Sequence[LayerShare]) -> tuple[float, float]:
    """Return the share of the progress that all layers together keep, and its standard error.

    The error is that of what each layer keeps. What a sample leaves open of how far a layer moved
    is not known here; it adds to the error where layers keep very different shares.
    """
    known = [each for each in layers if math.isfinite(each.energy * each.advice.kept)]
    energy = sum(layer.energy for layer in known)  # inf where fsum would raise an error
    if not energy > 0:
        return math.nan, math.nan
    kept = sum(layer.energy * layer.advice.kept for layer in known) / energy
    return kept, math.hypot(*(each.energy * _find_error(each.advice) for each in known)) / energy


def _join_weight_errors(layers: Sequence[LayerShare]) -> float:
    """Return the distance of all weights from those in float32, as a share of the size of these."""
    known = [
        (each.size * each.weights * each.weights, each.weight_error)
        for each in layers
        if math.isfinite(each.weights * each.weight_error)
    ]
    size = sum(square for square, _ in known)
    apart = sum(square * error * error for square, error in known)
    return math.sqrt(apart / size) if size else math.nan


def _find_error(advice: Advice) -> float:
    """Return the standard error of the share kept; a sample too small to tell may be all wrong."""
    error = advice.errors[PROGRESS if advice.has_twin else STEP_KEPT]
    return 1.0 if math.isnan(error) else error


def _average(layers: Sequence[LayerShare], metric: str) -> float:
    """Return the mean of a share over layers, each weighted by its number of elements."""
    known = [
        (layer.size, value)
        for layer in layers
        if not math.isnan(value := layer.advice.figures.get(metric, math.nan))
    ]
    size = math.fsum(each for each, _ in known)
    return math.fsum(each * value for each, value in known) / size if size else math.nan


def find_kept_interval(kept: float, error: float, *, has_twin: bool) -> Interval:
    """Return the interval of 80 % in which the share kept by the real run lies.

    Twins get the gradients of a run in float32, and those of the real run differ: where its weights
    stay behind, its gradients stay large and make up for a part.

    Args:
        kept: The share that the twins predict, or that single steps keep.
        error: The standard error of `kept`, as a sample of each layer has it.
        has_twin: True if `kept` is of twins. No real run says how far single steps are off, whose
            interval is that of the sample alone.
    """
    if math.isnan(kept):
        return math.nan, math.nan
    low, high = calibration().find_offsets(kept) if has_twin else (0.0, 0.0)
    half = 1.2816 * error  # the quantile of 90 % of the normal distribution
    return kept + low - half, kept + high + half


# --- what to do


def add_remedies(
    runs: Mapping[str, RunAdvice],
    recipes: Mapping[str, RecipeInfo],
    layers: Mapping[str, Sequence[LayerShare]],
) -> dict[str, RunAdvice]:
    """Return the verdicts on a run, each with a sentence on what to do.

    Args:
        runs: Verdicts on the run, by recipe.
        recipes: Descriptions of the recipes, by name.
        layers: For each recipe, the layers that it was judged for.

    Returns:
        The same verdicts, by recipe, with the attribute `RunAdvice.to_do`.
    """
    return {
        name: advice._replace(to_do=_find_remedy(advice, runs, recipes, layers))
        for name, advice in runs.items()
    }


def _find_remedy(
    advice: RunAdvice,
    runs: Mapping[str, RunAdvice],
    recipes: Mapping[str, RecipeInfo],
    layers: Mapping[str, Sequence[LayerShare]],
) -> str:
    verdict, recipe = advice.verdict, recipes.get(advice.recipe)
    if verdict is Verdict.NOT_JUDGED:
        return ""
    if verdict is Verdict.BREAKS:
        return _avoid_breaking(recipe)
    is_nearly_fine = verdict in (Verdict.STORES_FINE, Verdict.WATCH)
    tried = [runs[name] for name in _list_remedies(advice.recipe, recipes) if name in runs]
    better = [each for each in tried if each.verdict is Verdict.STORES_FINE]
    best = min(better, key=lambda each: abs(each.kept - 1), default=None)
    if is_nearly_fine and advice.frozen and advice.frozen_share <= _FEW_WEIGHTS:
        keep = f"Keep {'it' if len(advice.frozen) == 1 else 'those'} in float32"
        return f"{keep}." if best is None else f"{keep}, or use {_name_remedy(best, layers)}."
    if verdict is Verdict.STORES_FINE and not advice.frozen:
        return "Nothing is lost that matters."
    is_by_states = verdict is Verdict.OVERSHOOTS and _has_small_states(recipe)
    if is_by_states or find_family(advice.recipe, recipe) == "states":
        states = [state for state in (recipe.states if recipe else {}) if state != "*"]
        return f"Store {' and '.join(states) or 'the optimizer states'} in more bits."
    if best is None and not is_nearly_fine:
        watched = [each for each in tried if each.verdict is Verdict.WATCH]
        best = min(watched, key=lambda each: abs(each.kept - 1), default=None)
    if best is None:
        return _propose_remedies(runs, find_format(recipe) if recipe else None)
    return f"Use {_name_remedy(best, layers)}."


def _name_remedy(advice: RunAdvice, layers: Mapping[str, Sequence[LayerShare]]) -> str:
    """Return the name of a remedy with what it keeps and what it costs."""
    word = " (watch)" if advice.verdict is Verdict.WATCH else ""
    cost = _name_cost(layers[advice.recipe])
    return f"{advice.recipe}, which keeps {advice.kept:.3g}{word}{cost}"


def _has_small_states(recipe: RecipeInfo | None) -> bool:
    """Return True unless a recipe keeps the optimizer states in float32.

    The states of ``now``, the run itself, are unknown: True.
    """
    return recipe is None or bool(recipe.states or recipe.dtype or recipe.optimizer)


def _avoid_breaking(recipe: RecipeInfo | None) -> str:
    if recipe is None or recipe.dtype == "float16":
        return "Use bf16 in place of fp16, or keep the optimizer states in float32."
    if _has_small_states(recipe):
        return "Keep the optimizer states in float32."
    return "Use a format with larger numbers."


def _propose_remedies(runs: Mapping[str, RunAdvice], format: str | None) -> str:
    """Return a sentence on remedies in a format, bf16 if None, that the run has not tried."""
    untried = [name for end in ("sr", "kahan") if (name := f"{format or 'bf16'}-{end}") not in runs]
    if not untried:
        return "No remedy that was tried stores it fine: keep the weights in float32."
    recipes, remedies = (
        ("recipes", "these remedies") if len(untried) > 1 else ("recipe", "this remedy")
    )
    return f"Add the {recipes} {' and '.join(untried)} to see what {remedies} would keep."


def _list_remedies(name: str, recipes: Mapping[str, RecipeInfo]) -> list[str]:
    """Return the names of the recipes that round stochastically or keep rounding errors.

    If some have the format of the recipe `name`, only these are returned.
    """
    remedies = [
        other
        for other, info in recipes.items()
        if find_family(other, info) in ("stochastic", "kahan")
    ]
    format = find_format(recipes[name]) if name in recipes else None
    return [other for other in remedies if recipes[other].weights == (format or "bf16")] or remedies


def find_format(recipe: RecipeInfo) -> str | None:
    """Return the name of the format in which a recipe stores weights; None for float32."""
    return recipe.weights or {"bfloat16": "bf16", "float16": "fp16"}.get(recipe.dtype or "")


def _name_cost(layers: Sequence[LayerShare]) -> str:
    """Return a phrase on a second moment that a remedy leaves too high; empty without one."""
    ratio = _average(layers, "exp_avg_sq_ratio")
    if not ratio >= _FAR_STATE:
        return ""
    return f", but leaves exp_avg_sq at {ratio:.2g} times that of float32"
