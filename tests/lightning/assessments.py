"""Verdicts on runs and layers that are made of plain numbers."""

from collections.abc import Mapping

from altgrad.report import Advice, Assessment, RunAdvice, Verdict
from altgrad.report.judging.calibration import Outcome

FORMATS = ("bf16", "e4m3fn")
RECIPES = ("now", "bf16", "e4m3fn")
LAYERS = ("layers.0.weight", "layers.0.bias", "norm[0]|<b>.weight")


def assessment(layers: tuple[str, ...] = LAYERS) -> Assessment:
    advice = [
        make_advice(layer, recipe, {"progress_kept": k / len(layers), "frozen_frac": 1.0})
        for k, layer in enumerate(layers)
        for recipe in RECIPES
    ]
    runs = {recipe: make_run(recipe, layers[:1]) for recipe in RECIPES}
    return Assessment(runs, advice, {layers[0]: "bf16"}, "")


def make_run(recipe: str, frozen: tuple[str, ...]) -> RunAdvice:
    numbers = (0.25, (0.0, 0.5), 0.0, 0.75, frozen, 0.5, 0.0, 3)
    outcome = Outcome(2, 1)
    verdict = Verdict.NEEDS_REMEDY
    return RunAdvice(recipe, verdict, *numbers, outcome, "Use *Kahan*.", has_twin=True)


def make_advice(layer: str, format: str, figures: Mapping[str, float]) -> Advice:
    return Advice(layer, format, Verdict.FROZEN, figures, {}, "as the figures say")
