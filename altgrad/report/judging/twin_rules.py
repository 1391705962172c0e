"""Judge a layer in a recipe from its twin, by the first rule that applies.

A *recipe* says how weights and optimizer states are stored. A *twin* is a sample of the layer that
is stored so and stepped beside the training, at every step. It is compared with the same sample in
float32, which gets the same gradients.

A layer is frozen only if what it loses matters: float32 moved it, and the recipe keeps little of
this movement. Of an embedding most rows may never move, since no batch has their words; if the rows
that are used keep their progress, the layer is fine.

Read `step_rules` first; `run_rules` comes next, which judges whole runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from altgrad._messages import format_percent
from altgrad.measurement.catalogue import NOW
from altgrad.measurement.intervals import find_interval
from altgrad.report.judging.calibration import calibration
from altgrad.report.judging.decimals import format_error, format_kept
from altgrad.report.judging.step_rules import reaches, write_figure, write_percent
from altgrad.report.judging.tallies import FROZEN, MOVED, STILL, TwinTally
from altgrad.report.judging.verdicts import PROGRESS, Interval, Verdict

_LIMITS = calibration().thresholds
_FEWEST_STILL = 2
"""Fewest observed steps in which a layer stands still, for the verdict “stuck”."""
_BY_CHANCE = "stochastic rounding moves a weight by chance: more steps, or more elements, will tell"
_FAR_RATIO = 1.25
"""Ratio of an optimizer state to float32 from which a reason mentions it; 1 / 1.25 counts, too."""


def judge_twin(tally: TwinTally, range_reason: str = "", *, drawn: int = 0) -> tuple[Verdict, str]:
    """Return the verdict on a layer in a recipe, and its reason.

    Args:
        tally: Summary of the twin's figures.
        range_reason: Phrase on the weights that are out of the range of the recipe's format, if
            these are too many and a scale would help; otherwise empty.
        drawn: Number of sampled elements if the recipe rounds each stochastically, otherwise 0.
            Then no layer is frozen or stuck: a weight that has not moved may move in the next step.
            Harm that may be the chance of the draws is uncertain.

    Returns:
        The verdict, and its reason in one sentence.
    """
    kept, frozen = tally.figure(PROGRESS), tally.figure(FROZEN)
    intervals = find_twin_intervals(tally)
    with_chance = find_twin_intervals(tally, drawn)[PROGRESS]
    if tally.broken > 0:
        have = "are" if tally.recipe == NOW else "would become"
        return Verdict.BREAKS, f"{format_percent(tally.broken)} of the weights {have} NaN or inf"
    if math.isnan(kept):
        return _judge_without_fp32(tally, intervals)
    progress = f"{write_figure(kept, with_chance)} of the progress is kept"
    never = "have never moved" if tally.recipe == NOW else "would never have moved"
    share = f"{write_percent(frozen, intervals[FROZEN])} of the weights that float32 moved {never}"
    if reaches(frozen, intervals[FROZEN], _LIMITS.frozen) and kept < _LIMITS.frozen_kept:
        if drawn:
            return Verdict.UNCERTAIN, f"{share}, but {_BY_CHANCE}"
        if has_moved(tally):
            return Verdict.FROZEN, share
        return Verdict.NEEDS_REMEDY, (
            f"{share}, but float32 moved them by less than {100 * _LIMITS.moved:g} % of their size "
            "so far"
        )
    if is_stuck(tally) and not drawn:
        return Verdict.STUCK, (
            f"stuck since step {tally.still_since:,}: since then nearly no weight moved, and "
            f"{progress}, {format_kept(tally.kept_before)} at that step"
        )
    is_behind = classify(kept, tally.weight_error) in (Verdict.WATCH, Verdict.NEEDS_REMEDY)
    if range_reason and is_behind:
        return Verdict.RANGE, f"{range_reason}, and {progress}"
    reason = _write_reason(tally, progress, share)
    if drawn and may_be_chance(kept, with_chance):
        return Verdict.UNCERTAIN, f"{reason}, which may be the chance of stochastic rounding"
    return _judge_by_kept(kept, intervals[PROGRESS], tally.weight_error, reason)


def _write_reason(tally: TwinTally, progress: str, share: str) -> str:
    """Return the reason of a verdict that follows from what a layer keeps.

    Args:
        tally: Summary of the figures.
        progress: Phrase on the share of the progress that is kept.
        share: Phrase on the weights that never moved.
    """
    kept, frozen = tally.figure(PROGRESS), tally.figure(FROZEN)
    reason = progress + _describe_states(tally.figures)
    if frozen >= _LIMITS.frozen and kept >= _LIMITS.needs_remedy:
        reason += f"; {share}, and what they lose is little (rows that no batch uses, for example)"
    if tally.weight_error > _LIMITS.weight_error and kept >= _LIMITS.stores_fine:
        reason += f"; weights are off by {format_error(tally.weight_error)} of their size"
    return reason


def may_be_chance(kept: float, interval: Interval) -> bool:
    """Return True if the share kept is out of the fine range, but may be so by chance.

    This is so if its confidence interval overlaps the fine range.

    Args:
        kept: Share of the progress kept, of a layer or a run; above 1 it moves too far.
        interval: Its confidence interval, which includes the chance of stochastic rounding.
    """
    low, high = interval
    is_fine = _LIMITS.stores_fine <= kept <= _LIMITS.overshoots
    return not is_fine and low <= _LIMITS.overshoots and high >= _LIMITS.stores_fine


def find_errors(tally: TwinTally, drawn: int = 0) -> dict[str, float]:
    """Return the standard errors of a twin's figures, by metric; NaN if unknown.

    Stochastic rounding adds an error to progress_kept: each weight is off by a random distance of
    mean 0. For n elements its standard error is drift / √n, where the metric drift is the distance
    of the weights from those in float32, relative to how far these moved. While nearly no weight
    has moved, drift cannot tell how far weights jump, and the error is NaN.

    Args:
        tally: Summary of the figures.
        drawn: Number of sampled elements that are rounded stochastically; 0 for another rounding.

    Returns:
        The errors by metric.
    """
    errors = tally.errors
    if drawn:
        stands_still = tally.figure(FROZEN) >= _LIMITS.frozen
        is_open = stands_still and tally.figure(PROGRESS) < _LIMITS.frozen_kept
        chance = math.nan if is_open else tally.figure("drift") / math.sqrt(drawn)
        errors[PROGRESS] = math.hypot(errors[PROGRESS], chance)
    return errors


def find_twin_intervals(tally: TwinTally, drawn: int = 0) -> dict[str, Interval]:
    """Return the confidence intervals of 95 % of the figures that have one, by metric.

    Args:
        tally: Summary of the figures.
        drawn: Number of sampled elements that are rounded stochastically; 0 for another rounding.

    Returns:
        The lower and the upper end by metric.
    """
    return {
        metric: find_interval(metric, tally.figure(metric), error)
        for metric, error in find_errors(tally, drawn).items()
    }


def has_moved(tally: TwinTally) -> bool:
    """Return True if float32 moved the layer by more than a small share of its size."""
    return not tally.figure(MOVED) <= _LIMITS.moved * tally.weight_rms  # True if one is unknown


def is_stuck(tally: TwinTally) -> bool:
    """Return True if a layer moved at first, then stopped, and has lost progress since.

    False if few elements of the sample carry the progress: that these stand still says little about
    the layer.
    """
    lost = abs(1 - tally.figure(PROGRESS)) - abs(1 - tally.kept_before)
    return (
        not math.isnan(tally.errors[PROGRESS])
        and tally.still_since is not None
        and tally.still_steps >= _FEWEST_STILL
        and lost >= _LIMITS.stuck_loss
    )


def classify(kept: float, weight_error: float) -> Verdict:
    """Return the verdict that follows from two figures of a layer or a run.

    Args:
        kept: Share of the progress kept.
        weight_error: Distance of the weights from those in float32, as a share of the size of
            these; NaN if unknown. Stochastic rounding keeps the progress on average, but leaves
            weights in few bits far off.
    """
    if kept > _LIMITS.overshoots:
        return Verdict.OVERSHOOTS
    if kept >= _LIMITS.stores_fine and not weight_error > _LIMITS.weight_error:
        return Verdict.STORES_FINE
    return Verdict.WATCH if kept >= _LIMITS.needs_remedy else Verdict.NEEDS_REMEDY


def _judge_without_fp32(tally: TwinTally, intervals: Mapping[str, Interval]) -> tuple[Verdict, str]:
    """Judge a layer of which no float32 copy could be stepped, as under Muon or Adafactor.

    It is frozen if nearly no weight has moved, since the last observed step and since the start.
    Otherwise there is no verdict.

    Args:
        tally: Summary of the figures.
        intervals: Confidence intervals of 95 %, by metric.

    Returns:
        The verdict, and its reason in one sentence.
    """
    moved, still = tally.figure("moved_since_start_frac"), tally.figure(STILL)
    if math.isnan(still) or math.isnan(moved):
        return Verdict.NOT_JUDGED, "no step has moved the layer in float32 yet"
    share = f"{write_percent(still, intervals[STILL])} of the weights with a gradient stood still"
    if moved <= 1 - _LIMITS.frozen and reaches(still, intervals[STILL], _LIMITS.frozen):
        return (
            Verdict.FROZEN,
            f"{share}, and {format_percent(moved)} of all have ever moved",
        )
    return Verdict.NOT_JUDGED, (
        f"{share} since the last observed step; without a twin, what they lose is unknown"
    )


def _judge_by_kept(
    kept: float, interval: Interval, weight_error: float, reason: str
) -> tuple[Verdict, str]:
    if math.isnan(interval[0]):
        return Verdict.UNCERTAIN, (
            f"the sample keeps {format_kept(kept)} of the progress, but too few of its elements "
            "carry it to estimate the error"
        )
    low, high = (classify(end, weight_error) for end in interval)
    if low is not high:
        return Verdict.UNCERTAIN, f"{reason}, which could be “{low.short}” or “{high.short}”"
    return low, reason


def _describe_states(figures: Mapping[str, float]) -> str:
    """Return phrases on the optimizer states that are far from those in float32; may be empty."""
    text = ""
    for metric, value in figures.items():
        is_far = value < 1 / _FAR_RATIO or value > _FAR_RATIO
        if metric.endswith("_ratio") and is_far:
            text += f"; {metric.removesuffix('_ratio')} is {value:.2g} times that of float32"
        if metric.endswith("_zero_frac") and value > 0:
            state = metric.removesuffix("_zero_frac")
            text += f"; {format_percent(value)} of {state} is stored as 0"
    return text
