"""Propose the next lines of Python: which recipe to train with, why, and with which library.

A *recipe* says how weights and optimizer states are stored and stepped. Proposed are recipes that
the run tried and that are fine. First comes the one that a library has and that needs the fewest
bytes. Float32 master weights come last: they lose nothing.

Read `library_lines` and `simulation_lines` first; `terminal_next`, `web_page` and `exports` show
the lines.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from altgrad._messages import few, format_count
from altgrad.measurement.catalogue import NOW
from altgrad.report.answers import has_verdict, is_low, list_rows
from altgrad.report.applying import can_store, group_by_pattern
from altgrad.report.judging.decimals import format_kept
from altgrad.report.judging.verdicts import RunAdvice, Verdict
from altgrad.report.library_lines import (
    EXACT,
    Lines,
    explain_no_library,
    find_library,
    write_library_lines,
    write_master_lines,
    write_small_states,
)
from altgrad.report.optimizer_lines import Maker, list_makers
from altgrad.report.records.schema import RecipeInfo, RunDescription
from altgrad.report.simulation_lines import find_module, write_simulation

if TYPE_CHECKING:
    from altgrad.report.run_report import RunReport

MASTER = "fp32"
"""The name under which float32 master weights are proposed."""
_BYTES = {"bfloat16": 6.0, "float16": 6.0}  # of a weight and two states
_FULL_BYTES = 12.0


class NextLine(NamedTuple):
    """Lines of Python to train with next.

    Attributes:
        recipe: Name of the recipe; ``fp32`` for float32 master weights.
        why: Why the recipe is proposed, in a sentence or two; the same for all lines of a recipe.
        title: The library, such as ``"torchao"``, or ``"Simulation"``.
        code: The lines. They expect the names ``model`` and ``arguments``, a dict with the
            arguments of the user's own optimizer, or those that a comment names.
    """

    recipe: str
    why: str
    title: str
    code: str


def write_next(run: RunDescription, runs: Mapping[str, RunAdvice]) -> str:
    """Write which recipe to train with next, what it keeps and saves; empty without one.

    Args:
        run: The run, or the header of its file.
        runs: Verdicts on the run, by recipe.

    Returns:
        A phrase such as ``bf16-true: fine, keeps 0.98, saves 50 %``.
    """
    line = next(iter(_Proposer(run, runs).list_lines()), None)
    if line is None:
        return ""
    rows = {each.recipe: each for each in list_rows(runs)}
    if (row := rows.get(line.recipe)) is None:  # master weights in float32
        return line.why
    advice = runs[row.recipe]
    saved = "" if math.isnan(advice.saved_share) else f", saves {row.saved}"
    count = format_count(len(advice.frozen), "layer")
    beside = f" with {count} in float32" if advice.frozen else ""
    return f"{row.recipe}{beside}: {row.word}, keeps {row.share}{saved}"


def list_next_lines(report: RunReport) -> list[NextLine]:
    """Return the lines to train with next, those that the verdicts support first.

    Without a verdict, as of a run whose weights are all NaN, there are no lines.

    Recipes, ways to store the run, that are fine come first, or those to watch if none is fine. If
    the run is stored below float32 already and loses nothing, only recipes with fewer bytes than it
    takes now are proposed.

    Args:
        report: Report of the run.
    """
    return _Proposer(report.run, report.assessment.runs).list_lines()


class _Proposer:
    """A writer of the next lines of one run.

    Args:
        run: The run, or the header of its file.
        runs: Verdicts on the run, by recipe.
    """

    def __init__(self, run: RunDescription, runs: Mapping[str, RunAdvice]) -> None:
        self._run = run
        self._runs = runs
        self._makers: Mapping[Maker, int] = list_makers(run)
        self._is_low = is_low(run.layers, runs)
        self._is_fused = run.now is not None and run.now.fused

    def list_lines(self) -> list[NextLine]:
        """Return the lines of Python for all proposed recipes, the best recipe first."""
        if not has_verdict(self._runs):
            return []
        proposed = self._find_proposed()
        each = [lines for advice in proposed if (lines := self._write(advice, proposed))]
        if not each:
            each = [lines for name in self._list_formats() if (lines := self._write_format(name))]
        each.sort(key=lambda lines: lines[0].title.startswith("Simulation"))
        reason = "" if each else _explain_no_lines(proposed)
        return [line for lines in [*each, self._write_master(reason)] for line in lines]

    def _find_proposed(self) -> list[RunAdvice]:
        """Return the verdicts on the recipes to propose: fewest bytes first, then most kept."""
        most = math.inf
        if self._is_fine_now():
            dtype = self._run.now.dtype if self._run.now is not None else None
            most = _BYTES.get(dtype or "", _FULL_BYTES)
        tried = [
            each
            for name, each in self._runs.items()
            if name in self._run.recipes
            and each.has_twin
            and find_library(self._run.recipes[name]) != MASTER
            and not self._run.recipes[name].bytes_per_parameter >= most
        ]
        for verdict in (Verdict.STORES_FINE, Verdict.WATCH):
            if found := [each for each in tried if each.verdict is verdict]:
                return sorted(found, key=self._rank)
        return []

    def _is_fine_now(self) -> bool:
        """Return True if the run is stored below float32 already, and loses nothing by that."""
        return NOW in self._runs and self._runs[NOW].verdict is Verdict.STORES_FINE

    def _rank(self, advice: RunAdvice) -> tuple[float, float]:
        size = self._run.recipes[advice.recipe].bytes_per_parameter
        return math.inf if math.isnan(size) else size, abs(advice.kept - 1)

    def _write(self, advice: RunAdvice, proposed: Sequence[RunAdvice]) -> list[NextLine]:
        """Return the lines of a recipe that was tried."""
        recipe = self._run.recipes[advice.recipe]
        stores = recipe.weights is not None or recipe.dtype is not None
        modules = {*map(find_module, advice.frozen)} if stores else set[str]()
        kept = self._find_patterns(modules)
        exact, missing = self._find_exact(recipe), ""
        library = (
            []
            if exact
            else write_library_lines(recipe, self._makers, kept, is_fused=self._is_fused)
        )
        if not library:
            missing = f" {explain_no_library(recipe, self._makers)}"
        if exact:
            missing = f" {exact} is what a library has, and has a verdict of its own."
        if self._is_with_stochastic(recipe, proposed):
            library += write_small_states(self._makers, is_fused=self._is_fused)
        simulation = write_simulation(self._run, recipe, self._makers, modules, is_low=self._is_low)
        why = f"{_describe(advice, recipe, keeps=bool(modules))}{missing}"
        return _add_why(advice.recipe, why, [*library, *simulation])

    def _find_patterns(self, modules: Iterable[str]) -> list[str]:
        """Return patterns that match the names of these modules, and of no other trained module."""
        kept = {*modules}
        every = dict.fromkeys(map(find_module, self._run.layers))
        return [*group_by_pattern({name: "kept" if name in kept else None for name in every})]

    def _find_exact(self, recipe: RecipeInfo) -> str | None:
        """Return the name of the tried recipe that a library's optimizer follows exactly, or None.

        For a recipe like ``bf16-sr`` this is ``torchao-sr``, if the run tried it.
        """
        wanted = EXACT.get(find_library(recipe) or "")
        names = (
            name
            for name, each in self._run.recipes.items()
            if name in self._runs and find_library(each) == wanted
        )
        return None if wanted is None else next(names, None)

    def _is_with_stochastic(self, recipe: RecipeInfo, proposed: Sequence[RunAdvice]) -> bool:
        """Return True if a recipe with 8-bit states can be combined with stochastic rounding.

        This holds for ``torchao-8bit``, if a recipe with stochastic rounding is proposed as well.
        """
        names = {find_library(self._run.recipes[each.recipe]) for each in proposed}
        is_packed = find_library(recipe) == "torchao-8bit"
        return is_packed and bool(names & {"bf16-sr", "torchao-sr"})

    # --- formats that were judged by single updates

    def _list_formats(self) -> list[str]:
        """Return the formats that keep single updates well, but were not tried over many steps."""
        found = [
            name
            for name, each in self._runs.items()
            if name in self._run.formats
            and each.verdict is Verdict.STORES_FINE
            and not each.has_twin
            and can_store(self._run, name)
        ]
        return sorted(found, key=lambda name: self._run.formats[name].bits)

    def _write_format(self, name: str) -> list[NextLine]:
        recipe = RecipeInfo(name, name, "nearest_even", None, {}, None, None, False, math.nan)
        lines = write_simulation(self._run, recipe, self._makers, is_low=self._is_low)
        kept = format_kept(self._runs[name].kept)
        why = (
            f"{name}: {kept} of single updates is kept. It was not tried over many steps, so that "
            "only a simulation is proposed."
        )
        return _add_why(name, why, lines)

    # --- float32 master weights

    def _write_master(self, reason: str) -> list[NextLine]:
        """Return the lines that keep float32 master weights; empty for a run that needs none.

        `reason` is a sentence on why no recipe comes before them; it may be empty.
        """
        if self._is_fine_now():
            return []
        why = "fp32: master weights in float32 lose nothing, while the loss is computed in bf16."
        why = f"{why} {reason}".rstrip()
        return _add_why(MASTER, why, write_master_lines(self._makers, is_low=self._is_low))


def _add_why(recipe: str, why: str, lines: Iterable[Lines]) -> list[NextLine]:
    return [NextLine(recipe, why, each.title, each.code) for each in lines]


def _explain_no_lines(proposed: Sequence[RunAdvice]) -> str:
    """Return in a sentence why there are no lines for a recipe that was tried."""
    fine = [each.recipe for each in proposed if each.verdict is Verdict.STORES_FINE]
    if fine:
        are = "is" if len(fine) == 1 else "are"
        known = f"No lines are known for {few(fine)}, which {are} fine"
        return f"{known}: write them as you wrote the recipe."
    return "No recipe that was tried is known to be fine."


def _describe(advice: RunAdvice, recipe: RecipeInfo, *, keeps: bool) -> str:
    """Return a sentence on the verdict, the progress kept, the bytes, and the layers that freeze.

    Args:
        advice: The verdict on the run in the recipe.
        recipe: The description of the recipe.
        keeps: True if the layers that freeze are to stay in float32.
    """
    text = f"{advice.recipe}: {advice.verdict.short}"
    if share := format_kept(advice.kept):
        text += f", keeps {share} of the progress"
    if not math.isnan(recipe.bytes_per_parameter):
        text += f" in {recipe.bytes_per_parameter:.3g} bytes per parameter"
    if not keeps:
        return f"{text}."
    count = len(advice.frozen)
    freeze = f"{format_count(count, 'layer')} freeze{'s' if count == 1 else ''}"
    return f"{text}; {freeze}: keep {'its module' if count == 1 else 'their modules'} in float32."
