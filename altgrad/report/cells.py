"""Texts and colours of verdicts in tables of the terminal, the HTML page and the loggers.

A verdict says whether a layer would make its progress if it were stored as a *recipe* says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from altgrad.report.colours import STYLES
from altgrad.report.judging.calibration import calibration
from altgrad.report.judging.decimals import format_kept
from altgrad.report.judging.summaries import hides_layers
from altgrad.report.judging.verdicts import (
    FEW_STEPS,
    Advice,
    Assessment,
    RunAdvice,
    Verdict,
)
from altgrad.report.ranking import LOST

_LIMITS, _STEP_LIMITS = calibration().thresholds, calibration().step_thresholds

COLOURS = STYLES
"""Colour of each verdict, as a style of the library rich."""

MEANINGS = {
    Verdict.STORES_FINE: f"at least {_LIMITS.stores_fine:g} of the progress is kept, weights are "
    f"off by at most {100 * _LIMITS.weight_error:g} %",
    Verdict.WATCH: f"{_LIMITS.needs_remedy:g} to {_LIMITS.stores_fine:g} is kept, or weights are "
    "further off",
    Verdict.NEEDS_REMEDY: f"below {_LIMITS.needs_remedy:g}: stochastic rounding, Kahan, or fp32 "
    "master weights",
    Verdict.FROZEN: f"at least {100 * _LIMITS.frozen:g} % of the weights that float32 moved "
    "never moved",
    Verdict.STUCK: "moved at first, and no longer does",
    Verdict.OVERSHOOTS: f"moves more than {_LIMITS.overshoots:g} times as far as float32",
    Verdict.BREAKS: "becomes NaN or inf",
    Verdict.RANGE: "weights fall out of the format's range, and a scale would help",
    Verdict.UNCERTAIN: "the sample cannot tell: observe more steps, or raise twin_elements "
    "(max_elements without a twin)",
    Verdict.NOT_JUDGED: "nothing moved that the recipe could lose, weights are stored no finer, or "
    "no twin can follow the optimizer",
}
"""Meaning of each verdict in a few words, for the legend of a table."""

STEP_MEANINGS = {
    Verdict.STORES_FINE: f"at least {_STEP_LIMITS.stores_fine:g} of single updates is kept",
    Verdict.WATCH: f"{_STEP_LIMITS.needs_remedy:g} to {_STEP_LIMITS.stores_fine:g} of single "
    "updates is kept",
    Verdict.NEEDS_REMEDY: f"below {_STEP_LIMITS.needs_remedy:g} of single updates: stochastic "
    "rounding, Kahan, or fp32 master weights",
    Verdict.FROZEN: f"at least {100 * _STEP_LIMITS.frozen:g} % of the weights with updates would "
    "never have moved",
}
"""Meaning of the verdicts whose thresholds differ if there is no twin, but only single steps.

A *twin* is a sample of the layers that is stored and stepped as a recipe says.
"""
STEP_MARK = "*"
"""Mark behind a share of single updates."""


EARLY = "early"
"""Mark of a verdict on a run that rests on few steps."""
_NONFINITE, _ALL_NONFINITE, _NOISY, _BEHIND = "NaN", "all NaN", "noisy", "behind"
_MARKS = {
    _NONFINITE: "elements were NaN or inf in an observed step: no figure counts these",
    _ALL_NONFINITE: "all elements are NaN or inf: nothing is left to judge",
    _NOISY: "the progress is kept, but weights differ from those in float32 by more than "
    f"{100 * _LIMITS.weight_error:g} % of their size",
    EARLY: f"fewer than {FEW_STEPS} steps were observed: later ones may change the verdict",
    _BEHIND: f"layers with more than {100 * _LIMITS.left_behind:g} % of the weights keep less than "
    "half of their progress",
}
"""Meanings of the words behind the share of a cell, or in its place."""
_SHORT_MARKS = {
    STEP_MARK: "of single updates",
    "?": "unsure",
    "~": "noisy",
    "!": "some NaN",
    "^": "too far",
}
"""Meanings of the marks behind the share in a narrow cell."""
UNMOVED = "unmoved"
"""Heading of a column with the mean unmoved_frac of each layer."""
UNMOVED_MEANING = (
    "unmoved_frac, the share of single updates that moved no weight; high without a loss under "
    "stochastic rounding or Kahan: “now” counts, or moved_since_start_frac/now without twins"
)
"""Meaning of the column `UNMOVED`, for legends."""
KEPT_MEANING = (
    "The number is progress_kept since the start, 1 all and 0 nothing; with * kept_update_ratio, "
    "of single updates, as no twin was stored in this format."
)
"""Meaning of the number in a cell, for legends."""


class Meaning(NamedTuple):
    """An entry of the legend of a table: a word of its cells, and what it means.

    Attributes:
        word: The word or mark.
        text: Its meaning in a few words.
        verdict: The verdict that the word stands for; None for other words.
    """

    word: str
    text: str
    verdict: Verdict | None = None


def list_legend(assessment: Assessment) -> list[Meaning]:
    """Return the legend of the tables of a run and its layers: verdicts first, then marks."""
    shown: list[Advice | RunAdvice] = [*assessment.runs.values()]
    shown += assessment.advice
    return [*list_meanings(shown), *list_marks(shown)]


def list_meanings(advice: Iterable[Advice | RunAdvice]) -> list[Meaning]:
    """Return the legend of a table: the meanings of the verdicts in it.

    A verdict from single steps has an entry of its own with a ``*``, because its thresholds differ
    from those of a verdict from twins, samples that were stored and stepped as a recipe says.
    """
    by_twins: set[Verdict] = set()
    by_steps: set[Verdict] = set()
    for each in advice:
        is_by_steps = not each.has_twin and each.verdict in STEP_MEANINGS
        (by_steps if is_by_steps else by_twins).add(each.verdict)
    whole = [Meaning(v.short, text, v) for v, text in MEANINGS.items() if v in by_twins]
    return whole + [
        Meaning(v.short + STEP_MARK, text, v) for v, text in STEP_MEANINGS.items() if v in by_steps
    ]


def list_marks(advice: Iterable[Advice | RunAdvice]) -> list[Meaning]:
    """Return the legend of the marks that cells of these verdicts have, such as ``NaN``."""
    each = [*advice]
    seen = {find_mark(one) for one in each}
    if any(isinstance(one, RunAdvice) and one.is_early for one in each):
        seen.add(EARLY)
    return [Meaning(mark, text) for mark, text in _MARKS.items() if mark in seen]


def find_mark(advice: Advice | RunAdvice) -> str:
    """Return the mark of a verdict in a cell; empty without one.

    It is ``NaN`` or ``all NaN`` if elements of the layer are NaN or inf, and the verdict does not
    say so. It is ``noisy`` if the progress is kept and weights are nevertheless far from those in
    float32, and ``behind`` if a run keeps its progress, and many of its layers keep little.
    """
    if isinstance(advice, RunAdvice):
        if hides_layers(advice):
            return _BEHIND
        is_noisy = advice.verdict is Verdict.WATCH and advice.weight_error > _LIMITS.weight_error
        return _NOISY if is_noisy and advice.kept >= _LIMITS.stores_fine else ""
    nonfinite = advice.nonfinite
    if nonfinite and advice.verdict is not Verdict.BREAKS:
        is_whole = nonfinite == 1 and advice.verdict is Verdict.NOT_JUDGED
        return _ALL_NONFINITE if is_whole else _NONFINITE
    is_kept = advice.has_twin and advice.kept >= _LIMITS.stores_fine
    return _NOISY if is_kept and advice.verdict is Verdict.WATCH else ""


def write_short_cell(advice: Advice | None) -> str:
    """Return the text of a narrow cell, such as ``0.99?`` or ``frozen``.

    It is the share of the progress that is kept, with the marks that `write_short_legend` explains.
    Layers that stand still, or become NaN, and layers without a share have a word. The text is
    empty if `advice` is None.
    """
    if advice is None:
        return ""
    kept = format_kept(advice.kept)
    if advice.verdict in (*LOST, Verdict.NOT_JUDGED) or not kept:
        return find_mark(advice) if find_mark(advice) == _ALL_NONFINITE else advice.verdict.short
    return kept + _find_short_marks(advice)


def write_short_legend(advice: Sequence[Advice]) -> str:
    """Return the meaning of the cells of `write_short_cell` in a line."""
    seen = set("".join(map(_find_short_marks, advice)))
    marks = [f"{mark} {text}" for mark, text in _SHORT_MARKS.items() if mark in seen]
    is_sample = any(each.has_twin for each in advice)
    kept = f"Share kept{' by a sample' if is_sample else ''}"
    return kept + (f" ({', '.join(marks)})" if marks else "")


def _find_short_marks(advice: Advice) -> str:
    mark = find_mark(advice)
    applies = {
        STEP_MARK: not (advice.has_twin or math.isnan(advice.kept)),
        "?": advice.verdict is Verdict.UNCERTAIN,
        "~": mark == _NOISY,
        "!": mark == _NONFINITE,
        "^": advice.verdict is Verdict.OVERSHOOTS,
    }
    return "".join(mark for mark in _SHORT_MARKS if applies[mark])


def cell_text(advice: Advice | None) -> str:
    """Return the text of a table's cell for a layer in a recipe, such as ``fine 0.99``.

    The text is empty if `advice` is None. Otherwise it has the verdict in one word, the share of
    the progress that is kept, and the mark of `find_mark`. A ``*`` follows a share of single
    updates.
    """
    if advice is None:
        return ""
    mark = find_mark(advice)
    if mark == _ALL_NONFINITE:
        return mark
    kept = format_kept(advice.kept)
    share = kept + STEP_MARK if kept and not advice.has_twin else kept
    return " ".join(filter(None, (advice.verdict.short, share, mark)))
