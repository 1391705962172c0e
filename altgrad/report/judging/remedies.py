"""Say what to do about the verdict on a run, for each recipe.

A *recipe* says how weights and optimizer states are stored. Its remedies are the recipes that round
stochastically or keep rounding errors (Kahan summation). Those that the run tried are named with
what they keep and cost.

Read `run_rules` first; `judge` comes next.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from altgrad._messages import few
from altgrad.measurement.catalogue import NOW
from altgrad.report.judging.decimals import format_kept
from altgrad.report.judging.families import find_family
from altgrad.report.judging.run_rules import (
    LayerShare,
    find_share,
    is_fine_beside,
    join_shares,
)
from altgrad.report.judging.verdicts import RunAdvice, Verdict
from altgrad.report.records.schema import RecipeInfo

_FEW_WEIGHTS = 0.05
"""Largest share of the weights that can stay in float32 at a small price."""
_FAR_STATE = 1.5
"""Ratio of exp_avg_sq to its value in float32 from which a sentence on a remedy mentions it."""
_ENDS = {"sr": "stochastic", "kahan": "kahan"}
"""The two remedies: by the end of a recipe's name, as in ``bf16-sr``, the family of the recipe."""


def add_remedies(
    runs: Mapping[str, RunAdvice],
    recipes: Mapping[str, RecipeInfo],
    layers: Mapping[str, Sequence[LayerShare]],
) -> dict[str, RunAdvice]:
    """Return the verdicts on a run, each with a sentence on what to do.

    Args:
        runs: Verdicts on the run, by recipe.
        recipes: Descriptions of the recipes, by name. The run itself may be among them, under the
            name ``now``.
        layers: For each recipe, the layers that it was judged for.

    Returns:
        The same verdicts, by recipe, with the attribute `RunAdvice.to_do`. Where there is no
        verdict, it says why.
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
    own_layers = layers[advice.recipe]
    if verdict is Verdict.NOT_JUDGED:
        return _explain_silence(own_layers)
    if verdict is Verdict.UNCERTAIN:
        return "Observe more steps, or raise twin_elements."
    if verdict is Verdict.BREAKS:
        return _avoid_breaking(advice.recipe, recipe)
    is_nearly_fine = verdict in (Verdict.STORES_FINE, Verdict.WATCH)
    own, others = _list_remedies(advice.recipe, recipes)
    best = _find_best(Verdict.STORES_FINE, own, runs) or _find_best(
        Verdict.STORES_FINE, others, runs
    )
    # Layers that are frozen, or keep little.
    slow = [x for x in own_layers if x.is_left_behind or x.advice.layer in advice.frozen]
    behind = [x.advice.layer for x in slow if x.advice.layer not in advice.frozen]
    words = _describe_behind(behind) if is_nearly_fine or verdict is Verdict.OVERSHOOTS else ""
    is_few = bool(slow) and find_share(slow, own_layers) <= _FEW_WEIGHTS
    if is_nearly_fine and is_few and is_fine_beside(advice, own_layers, slow):
        keep = f"{words}Keep {'it' if len(slow) == 1 else 'those'} in float32"
        return f"{keep}." if best is None else f"{keep}, or use {_name_remedy(best, layers)}."
    if verdict is Verdict.STORES_FINE and not slow:
        return "Nothing is lost that matters."
    is_by_states = verdict is Verdict.OVERSHOOTS and _has_small_states(recipe)
    if is_by_states or find_family(advice.recipe, recipe) == "states":
        states = [state for state in (recipe.states if recipe else {}) if state != "*"]
        return f"{words}Store {' and '.join(states) or 'the optimizer states'} in more bits."
    if best is None and (scale := _propose_scale(advice.recipe, recipe, own_layers)):
        return words + scale
    if best is None and not is_nearly_fine:
        best = _find_best(Verdict.WATCH, [*own, *others], runs)
    if best is None:
        return words + _propose_remedies(advice, recipes, runs)
    return f"{words}Use {_name_remedy(best, layers)}."


def _propose_scale(name: str, recipe: RecipeInfo | None, layers: Sequence[LayerShare]) -> str:
    """Return a sentence on a scale if many weights are out of a format's range; otherwise empty."""
    out = [layer for layer in layers if layer.advice.verdict is Verdict.RANGE]
    if not find_share(out, layers) > _FEW_WEIGHTS:
        return ""
    format = name if recipe is None else recipe.weights
    return f"Weights are out of the range of {format}: give it a scale, as scaling='tensor' does."


def _describe_behind(names: Sequence[str]) -> str:
    """Return a sentence on layers that keep less than half of their progress, and a space.

    Without such layers it is empty.
    """
    if not names:
        return ""
    keep = "keeps less than half of its" if len(names) == 1 else "keep less than half of their"
    return f"{few(names)} {keep} progress. "


def _name_remedy(advice: RunAdvice, layers: Mapping[str, Sequence[LayerShare]]) -> str:
    """Return the name of a remedy, a recipe, with the progress that it keeps and what it costs."""
    word = " (watch)" if advice.verdict is Verdict.WATCH else ""
    cost = _name_cost(layers[advice.recipe])
    return f"{advice.recipe}, which keeps {format_kept(advice.kept)}{word}{cost}"


def _explain_silence(layers: Sequence[LayerShare]) -> str:
    """Return why there is no verdict on a run; empty if no step has moved a layer."""
    if all(layer.advice.nonfinite == 1 for layer in layers):
        return "All weights are NaN or inf."
    if any(layer.advice.figures.get("moved_since_start_frac", 0.0) > 0 for layer in layers):
        return "No twin can follow the optimizer, so that what is lost is unknown."
    return ""


def _find_best(
    verdict: Verdict, names: Iterable[str], runs: Mapping[str, RunAdvice]
) -> RunAdvice | None:
    """Return, among the remedies with a given verdict, that whose share kept is nearest to 1.

    Args:
        verdict: The verdict.
        names: Names of remedies: recipes with stochastic rounding or Kahan summation.
        runs: Verdicts on the run, by recipe.

    Returns:
        The verdict on the run in this recipe; None if no remedy has the given verdict.
    """
    found = [runs[name] for name in names if name in runs and runs[name].verdict is verdict]
    return min(found, key=lambda each: abs(each.kept - 1), default=None)


def _has_small_states(recipe: RecipeInfo | None) -> bool:
    """Return True unless a recipe keeps the optimizer states in float32; True if unknown."""
    return recipe is None or bool(recipe.states or recipe.dtype or recipe.optimizer)


def _avoid_breaking(name: str, recipe: RecipeInfo | None) -> str:
    dtype = recipe.dtype if recipe is not None else None
    if dtype == "float16":
        return "Use bf16 in place of fp16, or keep the optimizer states in float32."
    # bf16 has the range of float32.
    is_wide = recipe is None or (recipe.weights in (None, "bf16") and not recipe.states)
    if is_wide and (name == NOW or (recipe is not None and recipe.weights)):
        return "Look for the cause in the loss, the data or the learning rate."
    if _has_small_states(recipe):
        return "Keep the optimizer states in float32."
    return "Use a format with larger numbers."


def _propose_remedies(
    advice: RunAdvice, recipes: Mapping[str, RecipeInfo], runs: Mapping[str, RunAdvice]
) -> str:
    """Return a sentence on remedies for a recipe that the run has not tried.

    They are in the recipe's own format, or in bf16 if it has none.

    Args:
        advice: The verdict on the run in the recipe.
        recipes: Descriptions of the recipes, by name.
        runs: Verdicts on the run, by recipe.
    """
    tried = [runs[name] for name in recipes if name != NOW and name in runs]
    has_twins = not recipes.keys() - {NOW} or any(each.has_twin for each in tried)
    if not has_twins:  # they cannot follow the optimizer
        return "Round stochastically or with Kahan summation, or keep the weights in float32."
    recipe = recipes.get(advice.recipe)
    family = find_family(advice.recipe, recipe)
    format = (find_format(recipe) if recipe else None) or "bf16"
    remedies = [f"{format}-{end}" for end, other in _ENDS.items() if other != family]
    if untried := [each for each in remedies if each not in recipes]:
        they = "they" if untried[1:] else "it"
        return f"Pass {' and '.join(untried)} in recipes, too: {they} may keep more."
    if advice.verdict is Verdict.STORES_FINE:  # but for some layers, named before
        return "No other remedy that was tried is fine: keep these layers in float32."
    if advice.verdict is Verdict.WATCH:
        return "No remedy that was tried keeps more: watch the loss, or use float32."
    return "No remedy that was tried stores it fine: keep the weights in float32."


def _list_remedies(
    name: str, recipes: Mapping[str, RecipeInfo]
) -> tuple[Sequence[str], Sequence[str]]:
    """Return the names of the remedies for a recipe, in two lists: in its own format, and others.

    Remedies are recipes that round stochastically or keep rounding errors (Kahan summation).
    """
    remedies = [
        other
        for other, info in recipes.items()
        if other not in (name, NOW) and find_family(other, info) in _ENDS.values()
    ]
    format = (find_format(recipes[name]) if name in recipes else None) or "bf16"
    own = [other for other in remedies if recipes[other].weights == format]
    return own, [other for other in remedies if other not in own]


def find_format(recipe: RecipeInfo) -> str | None:
    """Return the name of the format in which a recipe stores weights; None for float32."""
    return recipe.weights or {"bfloat16": "bf16", "float16": "fp16"}.get(recipe.dtype or "")


def _name_cost(layers: Sequence[LayerShare]) -> str:
    """Return a phrase on a second moment that a remedy leaves too high; empty without one."""
    ratio = join_shares(layers, "exp_avg_sq_ratio")
    if not ratio >= _FAR_STATE:
        return ""
    return f", but leaves exp_avg_sq at {ratio:.2g} times that of float32"
