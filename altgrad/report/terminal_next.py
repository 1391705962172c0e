"""Print in a terminal the lines of Python to train with next: those of the first proposal.

Read `next_lines` and `printing` first; `terminal` comes next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from altgrad.report.next_lines import NextLine, list_next_lines, write_next
from altgrad.report.printing import print_line, print_text, style_text

if TYPE_CHECKING:
    from rich.console import Console

    from altgrad.report.run_report import RunReport

MOST_LINES = 12
"""Number of lines that are printed by default."""


def print_next(report: RunReport, console: Console, most: int | None = MOST_LINES) -> None:
    """Print which recipe to train with next, why, and the lines of Python.

    A *recipe* says how weights and optimizer states are stored.

    Lines of Python are printed completely or not at all. A last line names what is left out.

    Args:
        report: Report of the run.
        console: Console to print on.
        most: Maximum number of printed lines. None prints the lines of all proposed recipes.
    """
    lines = list_next_lines(report)
    if not lines:
        return
    shown = lines if most is None else _choose_fitting(lines, console, most)
    recipe = None
    for line in shown or lines[:1]:
        if line.recipe != recipe:
            if recipe is not None:
                console.print()
            heading = _write_heading(line) if recipe is None else f"Or: {line.why}"
            print_text(console, heading, "bold")
            recipe = line.recipe
        if shown:
            print_text(console, f"# {line.title}", "dim")
            for code in _list_code(line):
                print_line(code, console)
    if others := _name_others(lines, shown):
        print_text(console, others)


def print_next_recipe(report: RunReport, console: Console) -> None:
    """Print which recipe to train with next, in a line without Python.

    A *recipe* says how weights and optimizer states are stored.

    Args:
        report: Report of the run.
        console: Console to print on.
    """
    if next_recipe := write_next(report.run, report.assessment.runs):
        print_text(console, f"Next: {next_recipe}", "bold")


def _choose_fitting(lines: Sequence[NextLine], console: Console, most: int) -> list[NextLine]:
    """Return the lines of the first recipe that fit into a number of printed lines."""
    first = [line for line in lines if line.recipe == lines[0].recipe]
    left = most - _count_wrapped(_write_heading(lines[0]), console)
    left -= _count_wrapped(_name_others(lines, []), console)  # at its longest
    shown = []
    for line in first:
        size = 1 + len(_list_code(line))
        if size <= left:
            shown.append(line)
            left -= size
    return shown


def _write_heading(line: NextLine) -> str:
    return f"Next: {line.why}"


def _list_code(line: NextLine) -> list[str]:
    """Return the lines of Python without the empty ones."""
    return [code for code in line.code.splitlines() if code]


def _count_wrapped(text: str, console: Console) -> int:
    return len(style_text(text).wrap(console, console.width))


def _name_others(lines: Sequence[NextLine], shown: Sequence[NextLine]) -> str:
    """Return a sentence on the lines that are not shown; empty without any."""
    first = lines[0].recipe
    titles = [line.title for line in lines if line.recipe == first and line not in shown]
    recipes = dict.fromkeys(line.recipe for line in lines if line not in shown)
    others = [name for name in recipes if name != first]
    if not (titles or others):
        return ""
    more = [*(["a simulation"] if any("Simulation" in title for title in titles) else []), *others]
    return f"More in --html and --json{': ' if more else ''}{', '.join(more)}."
