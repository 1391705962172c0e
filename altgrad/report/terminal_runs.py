"""Print in a terminal what each recipe would make of a run: the first part of a report.

A *recipe* says how weights and optimizer states are stored and stepped.

Read `answers` and `printing` first; `terminal` comes next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from altgrad.report.answers import (
    INTERVAL,
    STEP_BY_STEP,
    RunRow,
    has_intervals,
    list_actions,
    list_rows,
    write_evidence,
    write_now,
    write_storage,
    write_visible,
)
from altgrad.report.cells import COLOURS
from altgrad.report.judging.summaries import write_nonfinite
from altgrad.report.names import shorten_names
from altgrad.report.printing import (
    add_tall_column,
    make_table,
    measure_columns,
    print_text,
    style_text,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from altgrad.report.run_report import RunReport

_KEPT, _KEPT_BY_RUNS = ("progress", "kept"), ("progress kept", "(80 % of real runs)")
_OTHERS = (("layers", "freeze"), ("saves",), ("such runs", "lost >10 %"), ("never", "move"))
_EVIDENCE = 4  # index of the column “such runs”
_LEAST_WIDTH = 10  # characters of a recipe's name


def print_runs(report: RunReport, console: Console, most_actions: int | None = None) -> None:
    """Print how a run is stored, a table of what each recipe would keep of it, and what to do.

    Args:
        report: Report of the run.
        console: Console to print on. Columns that do not fit its width are left out; what became of
            such runs is then a sentence.
        most_actions: Maximum number of sentences on what to do. None prints all.
    """
    runs = report.assessment.runs
    print_text(console, _write_steps(report), "dim")
    if heading := write_now(runs) if runs else report.answer:
        print_text(console, heading, "bold")
    if broken := write_nonfinite(report.nonfinite, report.assessment.advice):
        print_text(console, broken, "yellow")
    if not runs:
        return
    print_text(console, write_storage(report.run, runs, report.visible))
    rows = list_rows(runs)
    console.print(_make_table(report, rows, console.width))
    if _count_fitting(rows, console.width) <= _EVIDENCE:
        print_text(console, write_evidence(rows), "dim")
    for action in list_actions(runs)[:most_actions]:
        print_text(console, action)


def _write_steps(report: RunReport) -> str:
    """Return a line on the observed steps and elements, and on skipped steps if there are any."""
    reasons = (f"{count:,} {reason}" for reason, count in report.skipped.items())
    skipped = f"; skipped steps: {', '.join(reasons)}" if report.skipped else ""
    return f"{report.steps}; {report.measured}{skipped}"


def print_legends(report: RunReport, console: Console) -> None:
    """Print what the figures of recipes mean, and what a forward pass sees of the updates.

    Args:
        report: Report of the run.
        console: Console to print on.
    """
    rows = list_rows(report.assessment.runs)
    if has_intervals(rows):
        print_text(console, INTERVAL, "dim")
    if any(row.is_step_by_step for row in rows):
        print_text(console, STEP_BY_STEP, "dim")
    if visible := write_visible(report.visible):
        print_text(console, visible)


def _make_table(report: RunReport, rows: Sequence[RunRow], width: int) -> Table:
    columns = _list_columns(rows)[: _count_fitting(rows, width)]
    names = shorten_names([row.recipe for row in rows], _measure_free_width(columns, width))
    table = make_table(["recipe"])
    for heading, _ in columns:
        add_tall_column(table, heading)
    for row, (name, recipe) in enumerate(zip(names, report.recipes, strict=True)):
        word, *others = (texts[row] for _, texts in columns)
        colour = COLOURS[report.assessment.runs[recipe].verdict]
        table.add_row(style_text(name), style_text(word, colour), *map(style_text, others))
    return table


_Column = tuple[tuple[str, ...], Sequence[str]]
"""The lines of a heading, and the texts of its cells."""


def _list_columns(rows: Sequence[RunRow]) -> list[_Column]:
    """Return the columns behind the names of recipes, the most important first."""
    each = [(row.word, row.kept, row.frozen, row.saved, row.evidence, row.never) for row in rows]
    kept = _KEPT_BY_RUNS if has_intervals(rows) else _KEPT
    verdict = ("early", "verdict") if any(row.is_early for row in rows) else ("verdict",)
    return [*zip((verdict, kept, *_OTHERS), zip(*each, strict=True), strict=True)]


def _count_fitting(rows: Sequence[RunRow], width: int) -> int:
    """Return how many of the columns fit beside short names of recipes, at least two."""
    columns = _list_columns(rows)
    least = max(min(len(row.recipe), _LEAST_WIDTH) for row in rows)
    fitting = [k for k in range(len(columns) + 1) if _measure_width(columns[:k]) + least <= width]
    return max(*fitting, 2)


def _measure_free_width(columns: Sequence[_Column], width: int) -> int:
    return max(width - _measure_width(columns), _LEAST_WIDTH)


def _measure_width(columns: Sequence[_Column]) -> int:
    """Return the number of characters that columns take, with a gap before each."""
    return measure_columns([[*heading, *texts] for heading, texts in columns])
