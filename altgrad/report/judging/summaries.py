"""Write the verdicts on a run in words: a sentence for each recipe, and a paragraph for all.

A *recipe* says how weights and optimizer states are stored. `write_sentence` writes the first line
that users read of a recipe; reports, loggers and the run file have the same.

`judge` calls `summarize`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from altgrad._messages import few, format_count, format_percent
from altgrad.measurement.catalogue import NOW
from altgrad.report.judging.calibration import calibration
from altgrad.report.judging.decimals import (
    format_error,
    format_interval,
    format_kept,
    format_lost,
)
from altgrad.report.judging.verdicts import Advice, RunAdvice, Verdict

_LIMITS = calibration().thresholds
NO_VERDICTS = (
    "No step was observed, or the monitor has neither formats nor recipes: there are no verdicts."
)
"""The text in place of verdicts, if it is unknown why there are none."""


def summarize(runs: Mapping[str, RunAdvice], advice: Sequence[Advice]) -> str:
    """Return a paragraph with a sentence on each recipe, and on layers with NaN or inf.

    Args:
        runs: Verdicts on the run, by recipe.
        advice: Verdicts on the layers.
    """
    if not advice:
        return NO_VERDICTS
    sentences = [write_sentence(each) for each in runs.values()]
    shares = {each.layer: each.nonfinite for each in advice if each.nonfinite}
    return " ".join(filter(None, [write_nonfinite(shares, advice), *sentences]))


def write_sentence(advice: RunAdvice) -> str:
    """Return a sentence on a run in one recipe: the verdict, the progress kept, and what to do."""
    if advice.verdict is Verdict.NOT_JUDGED:
        why = advice.to_do or "No step has moved a layer that it could lose."
        return f"{advice.recipe}: not judged. {why}"
    return " ".join(
        filter(
            None,
            (
                f"{advice.recipe}: {write_word(advice)}{_mark_early(advice)}.",
                _write_progress(advice),
                _write_standing(advice),
                advice.to_do,
            ),
        )
    )


def _mark_early(advice: RunAdvice) -> str:
    return f" ({write_early(advice)})" if advice.is_early else ""


def write_early(advice: RunAdvice) -> str:
    """Write that a verdict rests on few observed steps: “3 steps observed: early”."""
    return f"{format_count(advice.steps, 'step')} observed: early"


def write_word(advice: RunAdvice) -> str:
    """Return the verdict on a run in a word or two, such as “watch” or “loses 0.97 now”."""
    verdict = advice.verdict
    if advice.recipe != NOW:
        return verdict.short
    is_loss = verdict in (Verdict.WATCH, Verdict.NEEDS_REMEDY)
    if is_loss and math.isnan(advice.kept):
        return "partly frozen now"
    if is_loss and advice.kept < _LIMITS.stores_fine:
        return f"loses {format_lost(advice.kept)} now"
    return verdict.short if verdict is Verdict.NOT_JUDGED else f"{verdict.short} now"


def write_kept(advice: RunAdvice) -> str:
    """Return a phrase on the share of the progress that is kept, and on its interval.

    The share is what twins keep, and the interval that of real runs, in which it need not lie:
    ``1.01 of the progress is kept by twins, 0.90 to 0.98 by 80 % of real runs``. A share of single
    updates has the interval of its sample in brackets.
    """
    share, interval = format_kept(advice.kept), format_interval(*advice.interval)
    if not advice.has_twin:
        interval = f" ({interval})" if interval else ""
        return f"{share}{interval} of the update is kept, step by step"
    by = "" if advice.recipe == NOW else " by twins"
    runs = f", {interval} by 80 % of real runs" if interval else ""
    return f"{share} of the progress is kept{by}{runs}"


def _write_progress(advice: RunAdvice) -> str:
    if math.isnan(advice.kept):
        return ""
    text = write_kept(advice)
    if advice.weight_error > _LIMITS.weight_error and advice.kept >= _LIMITS.stores_fine:
        text += f", and weights are off by {format_error(advice.weight_error)} of their size"
    if hides_layers(advice):
        behind = format_percent(advice.behind_share)
        text += f", but layers with {behind} of the weights keep less than half of theirs"
    return f"{text}; {advice.evidence}." if advice.evidence else f"{text}."


def hides_layers(advice: RunAdvice) -> bool:
    """Return True if a run keeps its progress as a whole, but many of its layers keep little."""
    return advice.behind_share > _LIMITS.left_behind and advice.kept >= _LIMITS.needs_remedy


def _write_standing(advice: RunAdvice) -> str:
    """Return a sentence on the layers that stand still; empty without any."""
    if not advice.frozen:
        return ""
    share, layers = format_percent(advice.frozen_share), format_count(len(advice.frozen), "layer")
    are = "Frozen now" if advice.recipe == NOW else "Would freeze"
    return f"{are}: {layers} ({share} of the weights: {few(advice.frozen)})."


def write_nonfinite(shares: Mapping[str, float], advice: Sequence[Advice]) -> str:
    """Write which layers have elements that are NaN or inf; empty without such layers.

    Args:
        shares: Largest nonfinite_frac, the share of the elements, by name of the layer.
        advice: Verdicts on the layers, which say whether the run itself has become NaN or inf.

    Returns:
        A sentence or two.
    """
    if not shares:
        return ""
    layers = few([f"{name} ({format_percent(share)})" for name, share in shares.items()])
    counted = f"NaN or inf in elements (nonfinite_frac), which no figure counts: {layers}."
    lost = [each for each in advice if each.is_lost]
    if not lost:
        return counted
    is_judged = any(each.verdict not in (Verdict.NOT_JUDGED, Verdict.BREAKS) for each in lost)
    so = ", and its verdicts are on the steps before" if is_judged else " before it could be judged"
    return f"This run became NaN or inf{so}. {counted}"
