"""Print the report of a run, or the comparison of two runs, in a terminal.

`print_report` prints a report: first what each recipe would make of the run, then of its layers
(`print_verdicts`). `print_comparison` prints the comparison. Tables are split and names are
shortened to fit the width of the console.

Read `printing` first, which has the functions for texts and tables, and `terminal_runs`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from altgrad._messages import format_count
from altgrad.measurement.catalogue import NOW, get_metric
from altgrad.report.answers import write_visible
from altgrad.report.cells import COLOURS, KEPT_MEANING, UNMOVED, cell_text
from altgrad.report.judging.decimals import format_kept
from altgrad.report.memory_table import print_memory
from altgrad.report.names import replace_unprintable, shorten_names
from altgrad.report.printing import (
    GAP,
    LEAST_WIDTH,
    add_tall_column,
    indent,
    make_table,
    measure_columns,
    print_line,
    print_meaning,
    print_text,
    style_text,
)
from altgrad.report.ranking import list_lost
from altgrad.report.terminal_runs import print_runs

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from altgrad.report.comparison import Comparison
    from altgrad.report.judging.verdicts import Advice
    from altgrad.report.run_report import RunReport

_MOST_LINES = 40  # lines of code that are printed; more push the verdicts out of sight
_SUGGESTION = ("smallest", "fine")
_NO_SUGGESTION = "none"


def print_report(report: RunReport, console: Console, most_layers: int | None = None) -> None:
    """Print the report of a run: whether it would still train if it were stored otherwise.

    First come the observed steps and what each recipe, a way to store the run, would keep. Then
    come a table of verdicts on layers and recipes, and notes. Python code stores the weights of
    each layer in a format that is fine for it.

    Args:
        report: Report of the run.
        console: Console to print on; tables fit its width.
        most_layers: Maximum number of layers in the table, those that keep least. None shows all.
    """
    print_text(console, f"{report.run.path}: {report.steps}; {report.measured}")
    if skipped := report.skipped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())
        print_text(console, f"Skipped steps: {reasons}")
    print_runs(report, console)
    print_verdicts(report, console, most_layers)
    if visible := write_visible(report.visible):
        print_text(console, visible)
    _print_to_apply(report, console)
    for note in report.notes:
        print_text(console, f"Note: {note}", "yellow")
    print_memory(report, console)


def _print_to_apply(report: RunReport, console: Console) -> None:
    """Print Python code that stores each layer in a format that is fine for it, to be copied.

    Instead of more than 40 lines, a sentence says where the code is.
    """
    lines = report.to_apply.splitlines()
    if len(lines) > _MOST_LINES:
        count = format_count(len(lines), "line")
        print_text(console, f"The {count} that apply the suggestions are in --html and --json.")
    elif lines:
        print_text(console, "")
        print_text(console, "To try it, in a simulation that keeps weights in these formats:")
        print_text(console, "")
        for line in lines:
            print_line(line, console)


def print_verdicts(report: RunReport, console: Console, most_layers: int | None = None) -> None:
    """Print how well each recipe would store each layer, in tables of layers by recipes.

    An entry says whether the layer would still train if it were stored as the recipe says; the
    first is ``now`` if the run itself loses updates. There are as many tables as the console's
    width requires, and a legend.

    Args:
        report: Report of the run.
        console: Console to print on.
        most_layers: Maximum number of layers; the most affected are shown. None shows all.
    """
    layers = [*report.by_layer]
    if not layers:
        return
    shown = layers[:most_layers]
    if len(shown) < len(layers):
        print_text(console, _write_choice(report, len(shown)))
    columns = _list_columns(report, shown)
    for group in _group_columns(columns, shown, console.width):
        print_text(console, "Layer by layer, stored as …", "italic")
        console.print(_make_verdict_table(columns, group, shown, console.width))
    _print_legend(report, console)


def _write_choice(report: RunReport, shown: int) -> str:
    """Return a line on the layers in a table that shows the first `shown` layers of a report."""
    choice = f"{shown:,} of {format_count(len(report.by_layer), 'layer')}"
    lost = len(list_lost(report.assessment))
    if not lost:
        return f"{choice}, those that keep least:"
    where = "now" if NOW in report.assessment.runs else "in a recipe"
    return f"{choice}, first those frozen, stuck or NaN {where} ({lost:,} in all):"


def _print_legend(report: RunReport, console: Console) -> None:
    legend = report.legend
    width = max(len(each.word) for each in legend)
    for each in legend:
        print_meaning(console, each.word, each.text, width)
    console.print(indent(style_text(KEPT_MEANING, "dim"), 2))


def print_comparison(comparison: Comparison, console: Console, most: int | None = None) -> None:
    """Print the means of the model's metrics in both runs, and the layers that differ most.

    Layers whose verdicts differ come first. A verdict says whether a layer would still train if its
    weights were stored in a number format.

    Args:
        comparison: The comparison of two runs.
        console: Console to print on.
        most: Maximum number of rows, each a layer in a format. None shows all.
    """
    for letter, run in zip("AB", comparison.runs, strict=True):
        print_text(console, f"{letter}: {run.run.path}: {run.steps}")
    if comparison.model_means:
        print_text(console, "The model: means over the steps", style="italic")
        console.print(_make_figure_table(comparison.model_means))
    if (twins := comparison.twins) is not None:
        heading = f"The model: samples stored by recipes, at step {twins.step:,}"
        print_text(console, heading, style="italic")
        console.print(_make_figure_table(twins.rows))
    if comparison.changes:
        changes = comparison.changes[:most]
        which = f"the {len(changes)} of {len(comparison.changes):,} that differ most"
        which = "all" if len(changes) == len(comparison.changes) else which
        heading = f"Verdict and share kept, by layer and recipe: {which}"
        print_text(console, heading, style="italic")
        console.print(_make_change_table(changes, console.width))
    print_text(console, comparison.summary)
    for note in comparison.notes:
        print_text(console, f"Note: {note}", style="yellow")


def _make_figure_table(rows: Sequence[tuple[str, float, float]]) -> Table:
    table = make_table(["figure", "A", "B", "B − A"])
    for key, in_a, in_b in rows:
        table.add_row(style_text(key), *_write_figures(key, in_a, in_b))
    return table


def _write_figures(key: str, in_a: float, in_b: float) -> tuple[str, str, str]:
    """Return two figures and their difference: shares with four decimals, others in four digits."""
    metric = key.partition("/")[0]
    is_share = get_metric(metric).unit == "share" or "kept" in metric
    digits, change = (".4f", "+.4f") if is_share else (".4g", "+.3g")
    difference = f"{in_b - in_a:{change}}"
    # A difference that is rounded to 0 has no sign.
    return f"{in_a:{digits}}", f"{in_b:{digits}}", difference if float(difference) else "0"


def _make_change_table(changes: Sequence[tuple[Advice, Advice]], width: int) -> Table:
    table = make_table(["layer", "recipe", "A", "B"])
    texts = [(a.recipe, cell_text(a), cell_text(b)) for a, b in changes]
    taken = GAP + sum(max(map(len, column)) + GAP for column in zip(*texts, strict=True))
    names = shorten_names([a.layer for a, _ in changes], max(width - taken, LEAST_WIDTH))
    for name, (format, *cells), pair in zip(names, texts, changes, strict=True):
        styled = (
            style_text(cell, COLOURS[each.verdict]) for cell, each in zip(cells, pair, strict=True)
        )
        table.add_row(style_text(name), style_text(format), *styled)
    return table


_Column = list[tuple[str, str]]
"""The cells of a column, one for each shown layer: text and style."""


def _list_columns(report: RunReport, layers: Sequence[str]) -> dict[tuple[str, ...], _Column]:
    """Return the columns behind the names of layers, by the lines of their headings."""
    by_layer, suggestions = report.by_layer, report.assessment.suggestions
    columns: dict[tuple[str, ...], _Column] = {
        (recipe,): [_make_cell(by_layer[layer].get(recipe)) for layer in layers]
        for recipe in report.recipes
    }
    if report.unmoved:
        shares = [report.unmoved.get(layer, math.nan) for layer in layers]
        unmoved: dict[tuple[str, ...], _Column] = {
            (UNMOVED,): [(format_kept(s), "") for s in shares]
        }
        now = {heading: column for heading, column in columns.items() if heading == (NOW,)}
        columns = now | unmoved | columns  # beside “now”
    if not report.formats:
        return columns
    return columns | {_SUGGESTION: [(suggestions.get(n) or _NO_SUGGESTION, "") for n in layers]}


def _make_cell(advice: Advice | None) -> tuple[str, str]:
    return cell_text(advice), "" if advice is None else COLOURS[advice.verdict]


def _group_columns(
    columns: Mapping[tuple[str, ...], _Column], layers: Sequence[str], width: int
) -> list[list[tuple[str, ...]]]:
    """Return the columns in groups that fit as tables in `width`; that of suggestions is in all."""
    from rich.cells import cell_len

    least = min(LEAST_WIDTH, max(cell_len(replace_unprintable(layer)) for layer in layers))
    shared = [_SUGGESTION] if _SUGGESTION in columns else []
    groups: list[list[tuple[str, ...]]] = []
    for heading in (each for each in columns if each not in shared):
        if groups and _measure_free_width(columns, [*groups[-1], heading, *shared], width) >= least:
            groups[-1].append(heading)
        else:
            groups.append([heading])
    return [[*group, *shared] for group in groups]


def _measure_free_width(
    columns: Mapping[tuple[str, ...], _Column], headings: Sequence[tuple[str, ...]], width: int
) -> int:
    """Return the number of characters that a table with these columns leaves for layers' names."""
    texts = [[*heading, *(text for text, _ in columns[heading])] for heading in headings]
    return width - GAP - measure_columns(texts)


def _make_verdict_table(
    columns: Mapping[tuple[str, ...], _Column],
    headings: Sequence[tuple[str, ...]],
    layers: Sequence[str],
    width: int,
) -> Table:
    table = make_table(["layer"])
    for heading in headings:
        add_tall_column(table, heading)
    free = _measure_free_width(columns, headings, width)
    names = shorten_names(layers, max(free, LEAST_WIDTH))
    for row, name in enumerate(names):
        table.add_row(
            style_text(name), *(style_text(*columns[heading][row]) for heading in headings)
        )
    return table
