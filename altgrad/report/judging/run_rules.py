"""Judge what a recipe would make of a whole run, from the verdicts on its layers.

A *recipe* says how weights and optimizer states are stored. The share of the progress that a run
would keep is that of all layers together. A layer counts with its energy, the square of the way
that float32 moved it, over all of its elements: a sample stands for its whole layer.

Read `twin_rules` and `families` first; `remedies` comes next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from altgrad.report.judging.calibration import calibration
from altgrad.report.judging.step_rules import classify_steps
from altgrad.report.judging.tallies import FROZEN
from altgrad.report.judging.twin_rules import classify, may_be_chance
from altgrad.report.judging.verdicts import (
    PROGRESS,
    STEP_KEPT,
    Advice,
    Interval,
    RunAdvice,
    Verdict,
)

_LIMITS = calibration().thresholds
_STANDING = (Verdict.FROZEN, Verdict.STUCK)
_HARMED = (Verdict.NEEDS_REMEDY, Verdict.OVERSHOOTS)
_OPEN = 0.5
"""Half of the width of an interval of 80 % that leaves open what a run keeps."""
_QUANTILE = 1.2816  # of 90 % of the normal distribution


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

    @property
    def is_left_behind(self) -> bool:
        """True if float32 moved the layer and less than half of that is kept."""
        # False if the movement or the size is unknown.
        is_still = self.moved == 0 or self.moved <= _LIMITS.moved * self.weights
        return self.advice.kept < _LIMITS.frozen_kept and not is_still


def judge_recipe(
    name: str, family: str | None, layers: Sequence[LayerShare], *, is_stochastic: bool = False
) -> RunAdvice:
    """Judge what becomes of a whole run that is stored as a recipe says.

    Layers count by how far float32 moved them. `remedies.add_remedies` adds what to do.

    Args:
        name: Name of the recipe; ``now`` for the run itself.
        family: Family of the recipe, a key of `FAMILIES`; None if no such run was tested.
        layers: The layers that the recipe was judged for.
        is_stochastic: True if the recipe rounds stochastically. Then harm that may be the chance of
            the draws is uncertain.

    Returns:
        The verdict with its figures; `RunAdvice.to_do` is empty.
    """
    has_twin = any(layer.advice.has_twin for layer in layers)
    # Movements since the start are not comparable with those of single steps.
    kept, error = _join_kept([each for each in layers if each.advice.has_twin == has_twin])
    standing = [layer for layer in layers if layer.advice.verdict in _STANDING]
    behind = [layer for layer in layers if layer.is_left_behind]
    advice = RunAdvice(
        name,
        Verdict.NOT_JUDGED,
        kept,
        find_kept_interval(kept, error, has_twin=has_twin),
        _join_weight_errors(layers),
        join_shares(layers, FROZEN),
        [layer.advice.layer for layer in standing],
        find_share(standing, layers),
        find_share(behind, layers),
        len(layers),
        None,
        "",
        has_twin,
    )
    verdict = _find_verdict(advice, [layer.advice.verdict for layer in layers], error)
    reach = _QUANTILE * error
    if is_stochastic and verdict in _HARMED:
        may_be_fine = may_be_chance(kept, (kept - reach, kept + reach))
        verdict = Verdict.UNCERTAIN if may_be_fine else verdict
    # Real runs were judged by the progress that they kept.
    outcome = None if math.isnan(kept) else calibration().count_runs(family, verdict.name)
    names = [layer.advice.layer for layer in layers if layer.advice.verdict not in _STANDING]
    return advice._replace(verdict=verdict, outcome=outcome, others=names)


def is_fine_beside(
    advice: RunAdvice, layers: Sequence[LayerShare], untouched: Sequence[LayerShare]
) -> bool:
    """Return True if a recipe would be fine for a run that leaves some layers in float32.

    Args:
        advice: The verdict on the run with all layers stored as the recipe says.
        layers: The layers that the recipe was judged for.
        untouched: Those of `layers` that would stay in float32, where they lose nothing.
    """
    names = {each.advice.layer for each in untouched}
    rest = [_store_in_float32(x) if x.advice.layer in names else x for x in layers]
    return judge_recipe(advice.recipe, None, rest).verdict is Verdict.STORES_FINE


def _store_in_float32(layer: LayerShare) -> LayerShare:
    """Return a copy of a layer's verdict and figures as they would be in float32: all is kept."""
    own = layer.advice
    metric = PROGRESS if own.has_twin else STEP_KEPT
    fine = own._replace(
        verdict=Verdict.STORES_FINE,
        figures={**own.figures, metric: 1.0},
        errors={**own.errors, metric: 0.0},
    )
    return replace(layer, advice=fine, weight_error=0.0)


def find_share(own: Sequence[LayerShare], layers: Sequence[LayerShare]) -> float:
    """Return the number of weights in some layers, divided by that in all layers.

    Args:
        own: Some layers.
        layers: All layers.

    Returns:
        The share, 0 to 1; NaN if there are no weights.
    """
    size = math.fsum(layer.size for layer in layers)
    return math.fsum(layer.size for layer in own) / size if size else math.nan


def _find_verdict(run: RunAdvice, layers: Sequence[Verdict], error: float) -> Verdict:
    """Return the verdict on a run by the first rule that applies.

    Args:
        run: Figures of the run.
        layers: The verdicts on its layers.
        error: Standard error of the share of the progress kept.
    """
    if Verdict.BREAKS in layers:
        return Verdict.BREAKS
    if math.isnan(run.kept):
        return _judge_by_standing(run.frozen_share)
    verdict = classify(run.kept, run.weight_error) if run.has_twin else classify_steps(run.kept)
    if verdict is Verdict.OVERSHOOTS:
        return verdict
    if _QUANTILE * error >= _OPEN:
        return Verdict.UNCERTAIN
    if run.kept < _LIMITS.frozen_kept and run.frozen_share >= _LIMITS.run_frozen:
        return Verdict.FROZEN
    # A layer that moves far may hide that the rest keeps nothing.
    return Verdict.NEEDS_REMEDY if run.behind_share > _LIMITS.left_behind else verdict


def _judge_by_standing(share: float) -> Verdict:
    """Judge a run of which nothing is known but the share of its weights that stands still."""
    if not share > 0:
        return Verdict.NOT_JUDGED
    return Verdict.FROZEN if share >= _LIMITS.run_frozen else Verdict.NEEDS_REMEDY


def _join_kept(layers: Sequence[LayerShare]) -> tuple[float, float]:
    """Return the share of the progress that all layers together keep, and its standard error.

    The share is a mean over layers, weighted by how far float32 moved them. The error includes the
    errors of the layers' shares, and leaves out the unknown errors of the weights. It is therefore
    too small if layers keep very different shares.
    """
    weighted = [(each.energy, each.advice) for each in layers]
    if all(math.isnan(energy) for energy, _ in weighted):  # in checkpoints of version 0.1.0
        weighted = [(each.size, each.advice) for each in layers]
    known = [(energy, each) for energy, each in weighted if math.isfinite(energy * each.kept)]
    total = sum(energy for energy, _ in known)  # inf where fsum would raise an error
    if not total > 0:
        return math.nan, math.nan
    kept = sum(energy * each.kept for energy, each in known) / total
    return kept, math.hypot(*(energy * _find_error(each) for energy, each in known)) / total


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
    """Return the standard error of the share kept; 1 if unknown, as for a sample too small."""
    error = advice.errors[PROGRESS if advice.has_twin else STEP_KEPT]
    return 1.0 if math.isnan(error) else error


def join_shares(layers: Sequence[LayerShare], metric: str) -> float:
    """Return the mean of a share over layers, each weighted by its number of elements.

    Args:
        layers: The layers.
        metric: Metric of the share; layers without a value are left out.

    Returns:
        The mean; NaN if no layer has a value.
    """
    known = [
        (layer.size, value)
        for layer in layers
        if not math.isnan(value := layer.advice.figures.get(metric, math.nan))
    ]
    size = math.fsum(each for each, _ in known)
    return math.fsum(each * value for each, value in known) / size if size else math.nan


def find_kept_interval(kept: float, error: float, *, has_twin: bool) -> Interval:
    """Return the interval in which 8 of 10 real runs with such a prediction lay.

    A prediction is off since twins, samples of a run, get the gradients of that run. In a real run
    whose weights stay behind, gradients stay large, and make up for a part of the loss.

    Args:
        kept: The share that the twins predict, or that single steps keep.
        error: The standard error of `kept`, as a sample of each layer has it.
        has_twin: True if `kept` is of twins. No real run says how far single steps are off, whose
            interval is that of the sample alone.
    """
    if math.isnan(kept):
        return math.nan, math.nan
    low, high = calibration().find_offsets(kept) if has_twin else (0.0, 0.0)
    half = _QUANTILE * error
    return kept + low - half, kept + high + half
