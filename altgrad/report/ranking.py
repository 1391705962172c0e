"""Order the layers of a run as a reader wants them: those that stand still or are NaN first.

Tables show a part of the layers, if there are many. A share alone does not say which part: a
layer that got stuck halfway keeps more than one that lags behind, and is the one to look at.

Read `judging.verdicts` first; `run_report` comes next.
"""

from __future__ import annotations

from collections.abc import Mapping

from altgrad.measurement.catalogue import NOW
from altgrad.report.judging.verdicts import Advice, Assessment, Verdict

LOST = (Verdict.FROZEN, Verdict.STUCK, Verdict.BREAKS)
"""Verdicts on layers that stand still, or become NaN."""


def rank_layers(assessment: Assessment) -> dict[str, dict[str, Advice]]:
    """Return the verdicts by layer and recipe, the layers to look at first.

    A *recipe* says how weights and optimizer states are stored.

    First come the layers of `list_lost`. Among equals, the layer that keeps the smallest share is
    first, as in `Assessment.by_layer`.

    Args:
        assessment: Verdicts on a run and its layers.

    Returns:
        By name of the layer, and then of the recipe, the verdict.
    """
    lost = {*list_lost(assessment)}
    by_layer = assessment.by_layer
    return {name: by_layer[name] for name in sorted(by_layer, key=lambda name: name not in lost)}


def list_lost(assessment: Assessment) -> list[str]:
    """Return the names of the layers that are frozen, stuck or NaN.

    If the run itself is stored below float32, its own verdict ``now`` decides. Otherwise a layer is
    listed if it would be so in any recipe, a way to store weights.

    Args:
        assessment: Verdicts on a run and its layers.
    """
    has_now = NOW in assessment.runs
    return [
        name for name, advice in assessment.by_layer.items() if _is_lost(advice, has_now=has_now)
    ]


def find_frozen(assessment: Assessment, recipe: str) -> set[str]:
    """Return the names of the layers that never move under a recipe, a way to store weights.

    Args:
        assessment: Verdicts on a run and its layers.
        recipe: Name of the recipe.
    """
    return {
        each.layer
        for each in assessment.advice
        if each.recipe == recipe and each.verdict is Verdict.FROZEN
    }


def _is_lost(advice: Mapping[str, Advice], *, has_now: bool) -> bool:
    return any(
        each.verdict in LOST for recipe, each in advice.items() if recipe == NOW or not has_now
    )
