"""Conditions on which `altgrad report --fail-on` fails, such as ``lost:bf16>0.05``.

`parse_condition` reads one, and `Condition.test` returns a sentence if it holds. A *recipe* says
how weights and optimizer states are stored.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from altgrad._messages import few, format_count, format_percent
from altgrad.measurement.catalogue import NOW
from altgrad.report.answers import is_low
from altgrad.report.judging.summaries import write_word
from altgrad.report.judging.verdicts import RunAdvice, Verdict
from altgrad.report.run_report import RunReport

EXPECTED = (
    "expected frozen:RECIPE, frozen:RECIPE>SHARE, lost:RECIPE>SHARE, not-fine:RECIPE or nan, such "
    "as 'lost:bf16>0.05' in quotes"
)
"""The forms of a condition, for errors."""
_NAN = "nan"
_FORM = re.compile(r"(?P<kind>frozen|lost|not-fine):(?P<recipe>[^>]+)(?:>(?P<limit>.*))?")


@dataclass(frozen=True)
class Condition:
    """A condition on a run, as a script passes it to `altgrad report --fail-on`.

    Attributes:
        text: The condition as it was written.
        kind: ``frozen``, ``lost``, ``not-fine`` or ``nan``.
        recipe: Name of a recipe, or a pattern with ``*``; empty for ``nan``.
        limit: The share above which the condition holds; None without one.
    """

    text: str
    kind: str
    recipe: str = ""
    limit: float | None = None

    def test(self, report: RunReport) -> str:
        """Return a sentence on how the condition holds; empty if it does not hold.

        A condition that cannot be tested holds, too: where the verdict is unsure, where a recipe
        was not judged, and where no step was observed. A pattern leaves out recipes that were not
        judged, if it matches others.

        Args:
            report: The report of a run.

        Raises:
            ValueError: The run has no such recipe. The message lists those of the run.
        """
        names = [] if self.kind == _NAN else self._find_recipes(report)
        if not report.run.steps:
            return self._explain(["no step was observed"])
        if self.kind == _NAN:
            found = [*report.nonfinite]  # verdicts know only layers that were judged
            layers = format_count(len(found), "layer")
            return self._explain([f"{layers} had NaN or inf: {few(found)}"] if found else [])
        runs = report.assessment.runs
        is_judged = {n: n in runs and runs[n].verdict is not Verdict.NOT_JUDGED for n in names}
        leaves_out = "*" in self.recipe and any(is_judged.values())
        problems = [
            self._find_problem(runs[name]) if is_judged[name] else _describe_unjudged(name)
            for name in names
            if is_judged[name] or not leaves_out
        ]
        return self._explain(problems)

    def _find_recipes(self, report: RunReport) -> list[str]:
        """Return the names of the recipes that match the condition's name or pattern.

        There is none for ``now`` in a run in float32, which loses nothing as it is stored.

        Raises:
            ValueError: The run has no such recipe.
        """
        runs = report.assessment.runs
        known = [*dict.fromkeys([*runs, *report.run.recipes, *report.run.formats])]
        found = [name for name in known if _matches(name, self.recipe)]
        if found or (self.recipe == NOW and not is_low(report.run.layers, runs)):
            return found
        raise ValueError(
            f"--fail-on={self.text}: expected a recipe of the run, {_list_known(known)}; got "
            f"{self.recipe}{_suggest(self.recipe, known)}"
        )

    def _find_problem(self, advice: RunAdvice) -> str:
        """Return a phrase on how the condition holds for a verdict; empty if it does not hold."""
        if problem := _TESTS[self.kind](advice, self.limit):
            return problem
        is_unsure = advice.verdict is Verdict.UNCERTAIN
        return f"{advice.recipe} is unsure, so that this cannot be tested" if is_unsure else ""

    def _explain(self, problems: Iterable[str]) -> str:
        found = "; ".join(filter(None, problems))
        return f"--fail-on={self.text}: {found}" if found else ""


def parse_condition(text: str) -> Condition:
    """Read a condition, such as ``frozen:bf16``, ``lost:bf16*>0.05``, ``not-fine:*`` or ``nan``.

    Returns:
        The condition.

    Raises:
        ValueError: The text is no condition. The message lists the forms.
    """
    if text.strip() == _NAN:
        return Condition(text, _NAN)
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"--fail-on={text}: {EXPECTED}")
    kind, recipe, limit = match["kind"], match["recipe"].strip(), match["limit"]
    if (limit is None) if kind == "lost" else (limit is not None and kind == "not-fine"):
        raise ValueError(f"--fail-on={text}: {EXPECTED}")
    return Condition(text, kind, recipe, None if limit is None else _parse_share(text, limit))


def _parse_share(text: str, limit: str) -> float:
    """Return a share as a number from 0 to 1, without 1.

    Raises:
        ValueError: The share is no such number.
    """
    try:
        share = float(limit)
    except ValueError:
        share = math.nan
    if not 0 <= share < 1:
        raise ValueError(f"--fail-on={text}: expected a share from 0 to below 1 behind >")
    return share


def _matches(name: str, pattern: str) -> bool:
    # Only * is special: names of formats may hold ? and [.
    literal = re.sub(r"([\[?])", r"[\1]", pattern)
    return fnmatch.fnmatchcase(name, literal)


def _list_known(known: Sequence[str]) -> str:
    return ", ".join(known) or "which has none"


def _suggest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


# --- what each kind tests


def _describe_frozen(advice: RunAdvice, limit: float | None) -> str:
    if not advice.frozen or (limit is not None and not advice.frozen_share > limit):
        return ""
    are = "stand still" if advice.recipe == NOW else f"would freeze in {advice.recipe}"
    share = f"{format_percent(advice.frozen_share)} of the weights"
    return f"{format_count(len(advice.frozen), 'layer')} ({share}) {are}: {few(advice.frozen)}"


def _describe_unjudged(name: str) -> str:
    return f"{name} was not judged, so that this cannot be tested"


def _describe_lost(advice: RunAdvice, limit: float | None) -> str:
    if advice.verdict is Verdict.BREAKS:
        return f"{advice.recipe} becomes NaN or inf"
    if advice.verdict is Verdict.OVERSHOOTS:  # `kept` is then above 1
        return f"{advice.recipe} moves weights too far, so that its progress is not kept"
    lost = 1 - advice.kept
    if math.isnan(lost):
        return f"what {advice.recipe} keeps of the progress is unknown"
    if limit is None or not lost > limit:
        return ""
    updates = "progress" if advice.has_twin else "single updates"
    return f"{advice.recipe} loses {lost:.4g} of the {updates}"


def _describe_not_fine(advice: RunAdvice, _: float | None) -> str:
    unknown = (Verdict.STORES_FINE, Verdict.UNCERTAIN, Verdict.NOT_JUDGED)
    return "" if advice.verdict in unknown else f"{advice.recipe} is {write_word(advice)}"


_TESTS: Mapping[str, Callable[[RunAdvice, float | None], str]] = {
    "frozen": _describe_frozen,
    "lost": _describe_lost,
    "not-fine": _describe_not_fine,
}
"""By kind, the function that says how a condition holds; empty if it does not."""
