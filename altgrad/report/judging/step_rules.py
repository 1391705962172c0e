"""Judge a layer in a number format from single steps, where no twin stores the layer so.

A *twin* is a sample of the layer that is stored in the format and stepped beside the training.
Formats whose scales are not powers of two, and runs without recipes, have none. What a format would
keep of each observed step then says less, since it does not know what earlier steps lost.

Read `tallies` first; `twin_rules` comes next, the rules for layers that have a twin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from altgrad._messages import format_percent
from altgrad.report.judging.calibration import calibration
from altgrad.report.judging.decimals import format_kept
from altgrad.report.judging.tallies import KEPT, NEVER_MOVED, RANGE, STALL
from altgrad.report.judging.verdicts import Interval, Verdict

_LIMITS = calibration().step_thresholds
# If no weight of a sample ever moved, the share is 1. Its interval then begins at 0.9 for 35
# elements, or 35 clusters of blocks, and at 0.99 only from 381 elements on. A twin has fewer: for a
# layer to be frozen at all, 35 have to be enough.
LEAST_UNANIMOUS = 0.9


def judge_steps(
    figures: Mapping[str, float], intervals: Mapping[str, Interval], *, needs_scale: bool
) -> tuple[Verdict, str]:
    """Return the verdict on a layer in a format, and its reason, by the first rule that applies.

    Args:
        figures: Figures of the layer in the format, by metric: means over single steps.
        intervals: Confidence intervals of 95 % around the figures, by metric.
        needs_scale: True if a scale would help weights that are out of the format's range.

    Returns:
        The verdict, and its reason in one sentence.
    """
    kept, never_moved = figures[KEPT], figures[NEVER_MOVED]
    if math.isnan(kept):
        return Verdict.NOT_JUDGED, (
            "no observed step had an update that the format could lose: no weight moved, or the "
            "weights are stored no finer than the format (then read moved_since_start_frac/now)"
        )
    share = f"{write_percent(never_moved, intervals[NEVER_MOVED])} of the weights that had updates"
    is_frozen = reaches(never_moved, intervals[NEVER_MOVED], _LIMITS.frozen)
    if is_frozen is None:
        return Verdict.UNCERTAIN, f"{share} would never have moved, which could be “frozen” or not"
    if is_frozen:
        return Verdict.FROZEN, f"{share} would never have moved"
    by_range = judge_range(figures, intervals) if needs_scale else None
    if kept < _LIMITS.stores_fine and by_range is not None:
        return by_range, (
            f"{describe_range(figures, intervals)}, and {write_figure(kept, intervals[KEPT])} of "
            "the update is kept"
        )
    return _judge_by_kept(kept, intervals[KEPT], figures[STALL])


def reaches(share: float, interval: Interval, limit: float) -> bool | None:
    """Return True if a share of weights is at least a limit near 1; None if its sample cannot tell.

    The true share lies in the interval around the measured one. If the limit lies inside of it, the
    answer is open. A measured share of exactly 1 reaches the limit, unless the sample is tiny.

    Args:
        share: The share, 0 to 1.
        interval: Its confidence interval of 95 %; NaN if it cannot be trusted.
        limit: The limit.
    """
    low, high = interval
    is_unanimous = share == 1 and low >= LEAST_UNANIMOUS
    spans = low < limit <= high and not is_unanimous
    if spans or (share >= limit and math.isnan(low)):
        return None
    return share >= limit


def judge_range(figures: Mapping[str, float], intervals: Mapping[str, Interval]) -> Verdict | None:
    """Return RANGE if too many weights are stored as 0 or lie beyond a format's largest value.

    Args:
        figures: Figures of the layer in the format, by metric.
        intervals: Confidence intervals of 95 % around the figures, by metric.

    Returns:
        The verdict: UNCERTAIN if the sample leaves open whether a share reaches its threshold, None
        if both shares are below their thresholds.
    """
    limits = zip(RANGE, (_LIMITS.underflow, _LIMITS.saturated), strict=True)
    found = None
    for metric, limit in limits:
        low, high = intervals[metric]
        if low >= limit:
            return Verdict.RANGE
        # A sample without any such element is no reason to doubt, however small it is.
        if figures[metric] > 0 and not high < limit:
            found = Verdict.UNCERTAIN
    return found


def describe_range(figures: Mapping[str, float], intervals: Mapping[str, Interval]) -> str:
    """Return a phrase on the shares of weights that are out of a format's range.

    Args:
        figures: Figures of a layer in the format, by metric.
        intervals: Confidence intervals of 95 % around the figures, by metric.
    """
    zero, beyond = (write_percent(figures[metric], intervals[metric]) for metric in RANGE)
    return f"{zero} of the weights are stored as 0 and {beyond} lie beyond the top"


def _judge_by_kept(kept: float, interval: Interval, stall: float) -> tuple[Verdict, str]:
    if math.isnan(interval[0]):
        return Verdict.UNCERTAIN, (
            f"the sample keeps {format_kept(kept)} of the update, but too few of its elements "
            "carry the update to estimate the error"
        )
    low, high = map(classify_steps, interval)
    stalled = format_percent(stall)
    share = f"{write_figure(kept, interval)} of the update is kept and {stalled} of updates stall"
    if low is not high:
        return Verdict.UNCERTAIN, f"{share}, which could be “{low.short}” or “{high.short}”"
    return low, f"{share} on average"


def classify_steps(kept: float) -> Verdict:
    """Return the verdict for a share of single updates kept, by comparing it with thresholds."""
    if kept >= _LIMITS.stores_fine:
        return Verdict.STORES_FINE
    return Verdict.WATCH if kept >= _LIMITS.needs_remedy else Verdict.NEEDS_REMEDY


def write_percent(share: float, interval: Interval) -> str:
    """Return a share as text in percent, with its confidence interval if there is one.

    Args:
        share: The share, 0 to 1.
        interval: Its confidence interval. One without a width is left out.
    """
    if not interval[0] < interval[1]:
        return format_percent(share)
    low, high = (f"{100 * end:.3g}" for end in interval)
    return f"{format_percent(share)} ({low} to {high} %)"


def write_figure(value: float, interval: Interval) -> str:
    """Return a share that is kept as text, with ``±`` half of its interval: ``0.50 ± 0.02``.

    Args:
        value: The share.
        interval: Its confidence interval. If all elements were measured it has no width, and the
            share stands alone.
    """
    half = (interval[1] - interval[0]) / 2
    text = format_kept(value)
    return f"{text} ± {half:.1g}" if half > 0 else text
