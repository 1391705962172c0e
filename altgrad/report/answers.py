"""The answer of a report in words: how a run is stored, what each recipe keeps, and what to do.

A *recipe* says how weights and optimizer states are stored and stepped. `list_rows` makes the table
of recipes that stands first in each report; `write_answer` is its heading, `list_actions` what to
do.

`terminal_runs`, `web_page` and the loggers show them; `summaries` has the words of a single recipe.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from altgrad._messages import few, format_count, format_percent
from altgrad.measurement.catalogue import NOW
from altgrad.report.cells import STEP_MARK, find_mark
from altgrad.report.judging.calibration import calibration
from altgrad.report.judging.decimals import (
    format_error,
    format_figure,
    format_interval,
    format_kept,
    format_lost,
)
from altgrad.report.judging.summaries import hides_layers, write_early, write_word
from altgrad.report.judging.verdicts import Assessment, RunAdvice, Verdict
from altgrad.report.memory import format_saved
from altgrad.report.names import fold_names
from altgrad.report.records.schema import LayerInfo, RecipeInfo, RunDescription

STEP_BY_STEP = (
    "* of single updates, without a twin: what is lost over many steps is unknown. An interval is "
    "that of the sample."
)
"""Meaning of the ``*`` behind a share that is kept, for a legend."""
INTERVAL = (
    "In brackets: what 80 % of those real runs kept themselves whose twins (samples that are "
    "stored so) kept as much as here. The figure need not lie in it: twins get the gradients of "
    "this run, and a real run its own."
)
"""Meaning of the interval behind a share that is kept, for a legend."""
NOTHING_TO_JUDGE = (
    "The monitor has neither formats nor recipes: there are no verdicts. Pass "
    "recipes=['bf16', 'bf16-sr'], for example, or leave both arguments out."
)
"""Heading of a report of a run that judged nothing."""
_UNKNOWN = "–"
_MOST_NAMED = 8  # recipes in a heading
_MOST_ACTIONS = 5
_MANY_UNMOVED = 0.1  # share of the weights that a heading mentions
_KEPT = (Verdict.STORES_FINE, Verdict.WATCH)
"""Verdicts with which a run may be stored as a recipe says, while single layers may freeze."""
_LOW = ("bfloat16", "float16", "float8")


class RunRow(NamedTuple):
    """The texts of one recipe in the table that stands first in a report.

    Attributes:
        recipe: Name of the recipe; ``now`` for the run itself.
        word: The verdict on the run in a word or two.
        share: Share of the progress kept; a ``*`` marks a share of single updates.
        interval: Interval of `share` in which 80 % of real runs with such a prediction lay. If
            `is_step_by_step`, the interval of the sampling error instead. May be empty.
        never: Share of the weights that would never move, although they move in float32.
        frozen: Number of layers that would freeze, with their share of the weights.
        evidence: How many real runs with this verdict lost over 10 % of the fall in loss.
        is_step_by_step: True if `share` is the mean share kept of single updates, False if it is
            the progress kept over many steps.
        saved: Share that the recipe saves of the memory of weights and optimizer states.
        is_early: True if few steps were observed, so that later ones may change the verdict.
    """

    recipe: str
    word: str
    share: str
    interval: str
    never: str
    frozen: str
    evidence: str
    is_step_by_step: bool
    saved: str
    is_early: bool

    @property
    def kept(self) -> str:
        """The share of the progress kept with its interval, as ``0.87 (0.85 to 0.97)``."""
        return f"{self.share} ({self.interval})" if self.interval else self.share


def list_rows(runs: Mapping[str, RunAdvice]) -> list[RunRow]:
    """Return the table of recipes: a row of texts for each verdict on the run."""
    return [_make_row(each) for each in runs.values()]


def has_intervals(rows: Sequence[RunRow]) -> bool:
    """Return True if a row has an interval of real runs behind the share that is kept."""
    return any(row.interval and not row.is_step_by_step for row in rows)


def _make_row(advice: RunAdvice) -> RunRow:
    is_step_by_step = not (advice.has_twin or math.isnan(advice.kept))
    frozen = f"{len(advice.frozen):,}"
    if advice.frozen:
        frozen += f" ({format_percent(advice.frozen_share)})"
    return RunRow(
        advice.recipe,
        _mark_word(advice),
        (format_kept(advice.kept) or _UNKNOWN) + (STEP_MARK if is_step_by_step else ""),
        format_interval(*advice.interval),
        _UNKNOWN if math.isnan(advice.frozen_frac) else format_percent(advice.frozen_frac),
        frozen,
        _write_outcome(advice),
        is_step_by_step,
        _UNKNOWN if math.isnan(advice.saved_share) else format_saved(advice.saved_share),
        advice.is_early,
    )


def _mark_word(advice: RunAdvice) -> str:
    """Return the verdict in a word or two, with its mark: “watch (noisy)”."""
    mark = find_mark(advice)
    return f"{write_word(advice)} ({mark})" if mark else write_word(advice)


def _write_outcome(advice: RunAdvice) -> str:
    """Return `RunAdvice.evidence` in the fewest words, such as ``8 of 66``."""
    if not advice.evidence:
        return _UNKNOWN
    if advice.outcome is None:
        return "none tested"
    runs, lost = advice.outcome
    return f"{lost} of {runs}" if runs else "no such run"


def write_evidence(rows: Sequence[RunRow]) -> str:
    """Write the column `RunRow.evidence` as a sentence, for a table without room for it."""
    recipes: dict[str, list[str]] = {}
    for row in rows:
        recipes.setdefault(row.evidence, []).append(row.recipe)
    each = [f"{evidence} ({', '.join(names)})" for evidence, names in recipes.items()]
    return f"Such runs that lost over 10 %: {'; '.join(each)}."


# --- the heading


def write_answer(runs: Mapping[str, RunAdvice]) -> str:
    """Write which recipes the run can be stored by, and what it loses now, in a line or two.

    If a run was observed and has no verdict, the line says what to pass to the monitor.

    Args:
        runs: Verdicts on the run, by recipe.

    Returns:
        A few short sentences.
    """
    if not runs:
        return NOTHING_TO_JUDGE
    others = [each for name, each in runs.items() if name != NOW]
    fine = [each.recipe for each in others if each.verdict is Verdict.STORES_FINE]
    watch = [each.recipe for each in others if each.verdict is Verdict.WATCH]
    unjudged = [each.recipe for each in others if each.verdict is Verdict.NOT_JUDGED]
    unsure = [each.recipe for each in others if each.verdict is Verdict.UNCERTAIN]
    known = {*fine, *watch, *unsure, *unjudged}
    bad = [each.recipe for each in others if each.recipe not in known]
    groups = {
        "Fine": fine,
        "Watch": watch,
        "Not fine": bad,
        "Unsure": unsure,
        "Not judged": unjudged,
    }
    sentences = [f"{word}: {_name_some(names)}." for word, names in groups.items() if names]
    early = next((f"{write_early(each)}." for each in runs.values() if each.is_early), "")
    return " ".join(filter(None, [write_now(runs), *sentences, early]))


def write_now(runs: Mapping[str, RunAdvice]) -> str:
    """Write what a run loses as it is stored; empty if unknown or if its weights are in float32.

    Args:
        runs: Verdicts on the run, by recipe; ``now`` is the run itself, if it is stored below
            float32.

    Returns:
        A sentence.
    """
    return _describe_now(runs[NOW]) if NOW in runs else ""


def _name_some(names: Sequence[str]) -> str:
    rest = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {rest:,} more" if rest > 0 else "")


def _describe_now(advice: RunAdvice) -> str:
    """Return a sentence on what a run loses now; empty if that is not known."""
    lost = _describe_loss(advice)
    sentences = {
        Verdict.STORES_FINE: "This run loses nothing now that matters.",
        Verdict.WATCH: lost,
        Verdict.NEEDS_REMEDY: lost,
        Verdict.FROZEN: f"This run is frozen now{_describe_unmoved(advice)}.",
        Verdict.OVERSHOOTS: "This run overshoots now.",
        Verdict.BREAKS: "This run breaks now: weights are NaN or inf.",
        Verdict.UNCERTAIN: "What this run loses now is unsure: the sample is too small.",
    }
    return sentences.get(advice.verdict, "")


def _describe_loss(advice: RunAdvice) -> str:
    """Return a sentence on a run that is neither fine now nor frozen as a whole."""
    if math.isnan(advice.kept):
        return f"Some layers of this run are frozen now{_describe_unmoved(advice)}."
    if advice.kept < calibration().thresholds.stores_fine:
        lost = format_lost(advice.kept)
        return f"This run loses {lost} of its progress now{_describe_unmoved(advice)}."
    if hides_layers(advice):
        share = format_percent(advice.behind_share)
        return (
            f"Layers with {share} of this run's weights keep less than half of their progress now."
        )
    return f"Weights of this run are off by {format_error(advice.weight_error)} of their size now."


def _describe_unmoved(advice: RunAdvice) -> str:
    """Return a phrase on the weights that have never moved, if they are many; otherwise empty."""
    if not advice.frozen_frac >= _MANY_UNMOVED:
        return ""
    return f": {format_percent(advice.frozen_frac)} of the weights have never moved"


# --- how the run is stored


def write_storage(
    run: RunDescription, runs: Mapping[str, RunAdvice], visible: Mapping[str, float] | None = None
) -> str:
    """Write how a run is stored, and whether anything is lost now; empty without layers.

    Args:
        run: The run, or the header of its file.
        runs: Verdicts on the run, by recipe.
        visible: For a run in float32, the metric visible_frac of the model by format: the share
            of an update that a forward pass in the format sees.

    Returns:
        A sentence or two.
    """
    if not run.layers:
        return ""
    dtypes = Counter(layer.dtype for layer in run.layers.values())
    stored = f"Weights are {_list_dtypes(dtypes)}"
    if is_low(run.layers, runs):
        if NOW not in runs:
            return (
                f"{stored}. What that loses is unknown without twins: read "
                f"moved_since_start_frac/{NOW}, or pass recipes=['bf16-sr'] to the monitor."
            )
        rounded = "" if any(map(_is_low_dtype, dtypes)) else _describe_rounding(run.now)
        return f"{stored}{rounded}. “now” is what the run keeps, the rest what it would keep."
    if runs and not has_verdict(runs):
        return f"{stored}."
    seen = _name_visible(visible or {})
    return (
        f"{stored}: nothing is lost now, also under autocast or FSDP{seen}. Recipes are what-ifs."
    )


def _name_visible(shares: Mapping[str, float]) -> str:
    """Return a phrase on the share of an update that a forward pass in bf16 sees; or empty.

    Args:
        shares: The metric visible_frac of the model by format; without bf16 there is no phrase.
    """
    share = shares.get("bf16", math.nan)
    if math.isnan(share):
        return ""
    return f" (a forward pass in bf16 sees {format_figure(share)} of each update: visible_frac)"


def _describe_rounding(now: RecipeInfo | None) -> str:
    """Return a phrase on what a run with tensors in float32 rounds after each step."""
    if now is None:
        return ", and weights or optimizer states are rounded after each step"
    states = [
        f"{'the optimizer states' if name == '*' else name} to {format}"
        for name, format in now.states.items()
    ]
    weights = [f"weights to {now.weights}"] if now.weights else []
    if not (weights or states):
        return ""
    return f"; rounded after each step: {', '.join([*weights, *states])}"


def has_verdict(runs: Mapping[str, RunAdvice]) -> bool:
    """Return True if a recipe was judged, and did not end in NaN or inf.

    Args:
        runs: Verdicts on the run, by recipe.
    """
    unknown = (Verdict.NOT_JUDGED, Verdict.BREAKS)
    return any(each.verdict not in unknown for each in runs.values())


def is_low(layers: Mapping[str, LayerInfo], runs: Mapping[str, RunAdvice]) -> bool:
    """Return True if the weights of a run, or some of them, are stored below float32.

    Args:
        layers: The observed layers, by name.
        runs: Verdicts on the run, by recipe; ``now`` is there if the run is stored below float32.
    """
    return NOW in runs or any(_is_low_dtype(layer.dtype) for layer in layers.values())


def _is_low_dtype(dtype: str) -> bool:
    return dtype.startswith(_LOW)


def _list_dtypes(dtypes: Counter[str]) -> str:
    if len(dtypes) == 1:
        return next(iter(dtypes))
    each = [f"{name} ({format_count(count, 'layer')})" for name, count in dtypes.most_common()]
    return f"{', '.join(each[:-1])} and {each[-1]}"


# --- what to do


def list_actions(runs: Mapping[str, RunAdvice]) -> list[str]:
    """Return what to do about the recipes that are not fine, a line for each group of recipes.

    Recipes with the same layers and the same remedy share a line. There are at most five lines.
    """
    recipes: dict[str, list[str]] = {}
    for name, advice in runs.items():
        if advice.to_do and (advice.frozen or advice.verdict is not Verdict.STORES_FINE):
            recipes.setdefault(_write_action(advice), []).append(name)
    lines = [f"{_name_some(names)}: {action}" for action, names in recipes.items()]
    rest = len(lines) - _MOST_ACTIONS
    return lines[:_MOST_ACTIONS] + ([f"… and {rest:,} more, in --json"] if rest > 0 else [])


def _write_action(advice: RunAdvice) -> str:
    if not advice.frozen or (advice.recipe != NOW and advice.verdict not in _KEPT):
        return advice.to_do  # the whole run is to be stored otherwise, not some of its layers
    do = "would freeze"
    if advice.recipe == NOW:
        do = "stands still" if len(advice.frozen) == 1 else "stand still"
    return f"{few(fold_names(advice.frozen, advice.others))} {do}. {advice.to_do}"


def describe_frozen_now(assessment: Assessment) -> str:
    """Write which layers of a run stand still as it is stored, and what to do; empty without any.

    A layer is frozen now if float32 would have moved it, and its stored weights have not moved.
    Under stochastic rounding or Kahan summation most such layers move in the end.

    Args:
        assessment: Verdicts on the run and its layers.

    Returns:
        A notice in a few sentences.
    """
    is_frozen = any(
        each.recipe == NOW and each.verdict is Verdict.FROZEN for each in assessment.advice
    )
    if not is_frozen:
        return ""
    now = assessment.runs[NOW]
    return (
        f"frozen layers: {few(now.frozen)} ({format_percent(now.frozen_share)} of the weights). "
        f"float32 would move their weights, and as they are stored they stand still. {now.to_do}"
    ).rstrip()


# --- what else matters


def write_visible(shares: Mapping[str, float]) -> str:
    """Write what a forward pass sees of the updates if it rounds weights; empty without a share.

    Args:
        shares: The model's visible_frac, by name of the format; NaN without a value.

    Returns:
        A sentence.
    """
    known = [
        f"{name} {format_figure(share)}" for name, share in shares.items() if not math.isnan(share)
    ]
    if not known:
        return ""
    return (
        "A forward pass that rounds weights to a format, as autocast does to bf16, sees this share "
        f"of a step's updates (visible_frac): {_name_some(known)}. The rest is not lost: the "
        "master weights add it up, until a later pass sees it."
    )
