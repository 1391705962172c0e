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
from altgrad.report.judging.verdicts import Advice, RunAdvice, Verdict

_LIMITS = calibration().thresholds


def summarize(runs: Mapping[str, RunAdvice], advice: Sequence[Advice]) -> str:
    """Return a paragraph with a sentence on each recipe, and on layers with NaN or inf.

    Args:
        runs: Verdicts on the run, by recipe.
        advice: Verdicts on the layers.
    """
    if not advice:
        return "No step was observed: there are no verdicts."
    sentences = [write_sentence(each) for each in runs.values()]
    shares = {each.layer: each.nonfinite for each in advice if each.nonfinite}
    return " ".join(filter(None, [*sentences, write_nonfinite(shares)]))


def write_sentence(advice: RunAdvice) -> str:
    """Write the verdict of a recipe on a run: word, share of the progress, evidence, what to do."""
    if advice.verdict is Verdict.NOT_JUDGED:
        why = advice.to_do or "No step has moved a layer that it could lose."
        return f"{advice.recipe}: not judged. {why}"
    return " ".join(
        filter(
            None,
            (
                f"{advice.recipe}: {write_word(advice)}.",
                _write_progress(advice),
                _write_standing(advice),
                advice.to_do,
            ),
        )
    )


def write_word(advice: RunAdvice) -> str:
    """Return the verdict on a run in a word or two, such as “watch” or “loses 0.97 now”."""
    verdict = advice.verdict
    if advice.recipe != NOW:
        return verdict.short
    is_loss = verdict in (Verdict.WATCH, Verdict.NEEDS_REMEDY)
    if is_loss and math.isnan(advice.kept):
        return "partly frozen now"
    if is_loss and advice.kept < _LIMITS.stores_fine:
        return f"loses {1 - advice.kept:.2g} now"
    return f"{verdict.short} now"


def write_kept(advice: RunAdvice) -> str:
    """Return the share of the progress kept, with its interval: ``0.87 (0.85 to 0.97)``."""
    low, high = advice.interval
    text = f"{advice.kept:.3g}"
    return f"{text} ({low:.2g} to {high:.2g})" if low < high else text


def _write_progress(advice: RunAdvice) -> str:
    if math.isnan(advice.kept):
        return ""
    basis = "progress is kept" if advice.has_twin else "update is kept, step by step"
    text = f"{write_kept(advice)} of the {basis}"
    if advice.weight_error > _LIMITS.weight_error and advice.kept >= _LIMITS.stores_fine:
        text += f", and weights are off by {advice.weight_error:.2g} of their size"
    if advice.behind_share > _LIMITS.left_behind and advice.kept >= _LIMITS.needs_remedy:
        behind = format_percent(advice.behind_share)
        text += f", but layers with {behind} of the weights keep less than half of theirs"
    return f"{text}; {advice.evidence}." if advice.evidence else f"{text}."


def _write_standing(advice: RunAdvice) -> str:
    """Return a sentence on the layers that stand still; empty without any."""
    if not advice.frozen:
        return ""
    share, layers = format_percent(advice.frozen_share), format_count(len(advice.frozen), "layer")
    are = "Frozen now" if advice.recipe == NOW else "Would freeze"
    return f"{are}: {layers} ({share} of the weights: {few(advice.frozen)})."


def write_nonfinite(shares: Mapping[str, float]) -> str:
    """Write which layers have elements that are NaN or inf; empty without such layers.

    Args:
        shares: Largest nonfinite_frac, the share of the elements, by name of the layer.

    Returns:
        A sentence.
    """
    if not shares:
        return ""
    layers = few([f"{name} ({format_percent(share)})" for name, share in shares.items()])
    return f"NaN or inf in some elements (nonfinite_frac), which no figure counts: {layers}."
