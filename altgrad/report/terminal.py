"""Print the report of a run in a terminal.

`print_first_screen` prints in 24 lines what a decision needs, and `print_report` prints all. Tables
are split and names are shortened to fit the width of the console.

Read `printing`, `terminal_runs`, `layer_table` and `terminal_next` first.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from altgrad.report.cells import KEPT_MEANING
from altgrad.report.layer_table import print_layers
from altgrad.report.memory_table import print_memory
from altgrad.report.printing import indent, print_line, print_meaning, print_text, style_text
from altgrad.report.terminal_next import print_next, print_next_recipe
from altgrad.report.terminal_runs import print_legends, print_runs

if TYPE_CHECKING:
    from rich.console import Console

    from altgrad.report.run_report import RunReport

_WIDTH, _HEIGHT = 80, 24  # of a small terminal
_MOST_ACTIONS = 3  # sentences of the first screen


def print_first_screen(report: RunReport, console: Console, most_layers: int | None = None) -> None:
    """Print what each recipe would make of a run, what to do, and the layers that keep least.

    A *recipe* says how weights and optimizer states are stored.

    Args:
        report: Report of the run.
        console: Console to print on; tables fit its width.
        most_layers: Maximum number of layers in the table. None shows as many as fit into 24 lines,
            the height of a small terminal; without room for one there is no table. In less than 80
            columns it has one layer at least.
    """
    print_runs(report, console, _MOST_ACTIONS)
    if most_layers is None:
        least = 0 if console.width >= _WIDTH else 1
        most_layers = max(_HEIGHT - _count_other_lines(report, console), least)
    print_layers(report, console, most_layers, most_tables=1)
    print_next_recipe(report, console)
    _print_notes(report, console)
    print_line(_write_command(report), console)


def _write_command(report: RunReport) -> str:
    return f"All layers, and code: altgrad report {report.run.path} --all"


def _count_other_lines(report: RunReport, console: Console) -> int:
    """Return the number of lines of the first screen, but for the layers in its table."""
    with console.capture() as capture:
        print_runs(report, console, _MOST_ACTIONS)
        print_layers(report, console, 1, most_tables=1)
        print_next_recipe(report, console)
        _print_notes(report, console)
    command = math.ceil(len(_write_command(report)) / console.width)  # the terminal wraps it
    return capture.get().count("\n") - 1 + command  # without the one layer


def print_report(report: RunReport, console: Console, most_layers: int | None = None) -> None:
    """Print the whole report of a run: whether it would still train if it were stored otherwise.

    First come the observed steps and what each recipe, a way to store the run, would keep. Then
    come a table of layers and recipes, what its words mean, the lines of Python to train with next,
    and notes.

    Args:
        report: Report of the run.
        console: Console to print on; tables fit its width.
        most_layers: Maximum number of layers in the table, those that keep least. None shows all.
    """
    print_runs(report, console)
    print_layers(report, console, most_layers)
    _print_legend(report, console)
    print_legends(report, console)
    print_memory(report, console)
    print_next(report, console, most=None)
    _print_notes(report, console)


def _print_legend(report: RunReport, console: Console) -> None:
    legend = report.legend
    width = max((len(each.word) for each in legend), default=0)
    for each in legend:
        print_meaning(console, each.word, each.text, width)
    console.print(indent(style_text(KEPT_MEANING, "dim"), 2))


def _print_notes(report: RunReport, console: Console) -> None:
    for note in report.notes:
        print_text(console, f"Note: {note}", "yellow")
