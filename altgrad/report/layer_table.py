"""Print how well each recipe would store each layer, in tables that fit the width of a console.

`print_layers` prints a table of layers by *recipes*, ways to store and step weights and optimizer
states. Its cells are short, so that the recipes of most runs fit into one table of 80 columns.

Read `cells` and `printing` first; `first_screen` and `terminal` print with this function.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from altgrad._messages import format_count
from altgrad.measurement.catalogue import NOW
from altgrad.report.cells import COLOURS, UNMOVED, write_short_cell, write_short_legend
from altgrad.report.judging.decimals import format_kept
from altgrad.report.names import replace_unprintable, shorten_names
from altgrad.report.printing import (
    GAP,
    LEAST_WIDTH,
    add_tall_column,
    make_table,
    measure_columns,
    print_text,
    style_text,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from altgrad.report.judging.verdicts import Advice
    from altgrad.report.run_report import RunReport

_Heading = tuple[str, ...]
"""The lines of a column's heading."""
_Column = list[tuple[str, str]]
"""The cells of a column, one for each shown layer: text and style."""


def print_layers(
    report: RunReport,
    console: Console,
    most_layers: int | None = None,
    most_tables: int | None = None,
) -> None:
    """Print which share of its progress each layer would keep in each recipe.

    A *recipe* says how weights and optimizer states are stored.

    The first column is ``now`` if the run itself loses updates. Nothing is printed without layers.

    Args:
        report: Report of the run.
        console: Console to print on. There are as many tables as its width requires.
        most_layers: Maximum number of layers; the most affected are shown. None shows all.
        most_tables: Maximum number of tables; the first recipes are shown. None shows all.
    """
    shown = [*report.by_layer][:most_layers]
    if not shown:
        return
    print_text(console, _write_heading(report, len(shown)), "italic")
    columns = _list_columns(report, shown)
    groups = _group_columns(columns, shown, console.width)
    for group in groups[:most_tables]:
        console.print(_make_table(columns, group, shown, report.by_layer, console.width))
    if rest := sum(map(len, groups[len(groups[:most_tables]) :])):
        print_text(console, f"{format_count(rest, 'more column')}: --all")


def _write_heading(report: RunReport, shown: int) -> str:
    """Return a line above a table that shows the first layers of a report.

    Args:
        report: Report of the run.
        shown: Number of layers in the table.
    """
    legend = write_short_legend(report.assessment.advice)
    layers = len(report.by_layer)
    if shown == layers:
        return f"{legend}:"
    return f"{legend}, least of {format_count(layers, 'layer')}:"


def _list_columns(report: RunReport, layers: Sequence[str]) -> dict[_Heading, _Column]:
    """Return the columns behind the names of layers, by the lines of their headings."""
    by_layer = report.by_layer
    columns: dict[_Heading, _Column] = {
        (recipe,): [_make_cell(by_layer[layer].get(recipe)) for layer in layers]
        for recipe in report.recipes
    }
    if report.unmoved:
        shares = [report.unmoved.get(layer, math.nan) for layer in layers]
        unmoved: dict[_Heading, _Column] = {(UNMOVED,): [(format_kept(s), "") for s in shares]}
        now = {heading: column for heading, column in columns.items() if heading == (NOW,)}
        columns = now | unmoved | columns  # beside “now”
    return columns


def _make_cell(advice: Advice | None) -> tuple[str, str]:
    return write_short_cell(advice), "" if advice is None else COLOURS[advice.verdict]


def _group_columns(
    columns: Mapping[_Heading, _Column], layers: Sequence[str], width: int
) -> list[list[_Heading]]:
    """Return the columns in groups that fit as tables in `width`."""
    from rich.cells import cell_len

    least = min(LEAST_WIDTH, max(cell_len(replace_unprintable(layer)) for layer in layers))
    groups: list[list[_Heading]] = []
    for heading in columns:
        if groups and _measure_free_width(columns, [*groups[-1], heading], width) >= least:
            groups[-1].append(heading)
        else:
            groups.append([heading])
    return groups


def _measure_free_width(
    columns: Mapping[_Heading, _Column], headings: Sequence[_Heading], width: int
) -> int:
    """Return the number of characters that a table with these columns leaves for layers' names."""
    texts = [[*heading, *(text for text, _ in columns[heading])] for heading in headings]
    return width - GAP - measure_columns(texts)


def _make_table(
    columns: Mapping[_Heading, _Column],
    headings: Sequence[_Heading],
    layers: Sequence[str],
    among: Iterable[str],
    width: int,
) -> Table:
    table = make_table(["layer"])
    for heading in headings:
        add_tall_column(table, heading)
    free = _measure_free_width(columns, headings, width)
    names = shorten_names(layers, max(free, LEAST_WIDTH), among)
    for row, name in enumerate(names):
        table.add_row(
            style_text(name), *(style_text(*columns[heading][row]) for heading in headings)
        )
    return table
