"""Print the report of a run, or the comparison of two runs, in a terminal.

`print_report` prints a report, of which `print_verdicts` is the table, and `print_comparison`
prints the comparison. Tables are split and names are shortened to fit the width of the console.

Read `printing` first, which has the functions for texts and tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from altgrad._messages import format_count
from altgrad.report.cells import (
    COLOURS,
    EVIDENCE,
    MEANINGS,
    NONFINITE,
    NONFINITE_MEANING,
    cell_text,
)
from altgrad.report.names import replace_unprintable, shorten_names
from altgrad.report.printing import (
    GAP,
    LEAST_WIDTH,
    add_column,
    indent,
    make_table,
    print_line,
    print_meaning,
    print_text,
    style_text,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from altgrad.report.comparison import Comparison
    from altgrad.report.run_report import RunReport
    from altgrad.report.verdicts import Advice

_MOST_LINES = 40  # lines of code that are printed; more push the verdicts out of sight
_SUGGESTION = "smallest\nfine"
_NO_SUGGESTION = "none"


def print_report(report: RunReport, console: Console, most_layers: int | None = None) -> None:
    """Print the report of a run: whether its layers would still train with weights in formats.

    It has the observed steps, a table of verdicts on layers and formats, a summary and notes. It
    also has Python code that stores the weights of each layer in a format that is fine for it.

    Args:
        report: Report of the run.
        console: Console to print on; tables fit its width.
        most_layers: Maximum number of layers in the table, those of whose updates the formats
            keep least. None shows all.
    """
    print_text(console, f"{report.run.path}: {report.steps}; {report.measured}")
    if skipped := report.skipped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())
        print_text(console, f"Skipped steps: {reasons}")
    print_verdicts(report, console, most_layers)
    print_text(console, report.assessment.summary)
    _print_to_apply(report, console)
    for note in report.notes:
        print_text(console, f"Note: {note}", style="yellow")


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
    """Print how well each format would store each layer, in tables of layers by formats.

    An entry says whether the layer would still train if its weights were stored in the format.
    There are as many tables as the console's width requires, and a legend.

    Args:
        report: Report of the run.
        console: Console to print on.
        most_layers: Maximum number of layers, those of whose updates the formats keep least. None
            shows all.
    """
    layers = [*report.assessment.by_layer]
    if not layers:
        return
    shown = layers[:most_layers]
    if len(shown) < len(layers):
        count = format_count(len(layers), "layer")
        print_text(console, f"The {len(shown)} of {count} that keep least:")
    for formats in _group_formats(report, shown, console.width):
        print_text(console, "If the weights were stored in …", style="italic")
        console.print(_make_verdict_table(report, shown, formats, console.width))
    seen = {advice.verdict for advice in report.assessment.advice}
    for verdict, meaning in MEANINGS.items():
        if verdict in seen:
            print_meaning(console, verdict.short, meaning)
            if evidence := EVIDENCE[verdict]:
                console.print(indent(style_text(evidence, "dim italic"), 9))
    if any(advice.nonfinite for advice in report.assessment.advice):
        print_meaning(console, NONFINITE, NONFINITE_MEANING)
    for note in (
        "The number is kept_update_ratio: 1 all of the update, 0 none.",
        "Runs like this: small runs that really stored their weights in a format.",
    ):
        console.print(indent(style_text(note, "dim"), 2))
    console.print()


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
        print_text(console, f"Verdicts and kept_update_ratio: {which}", style="italic")
        console.print(_make_change_table(changes, console.width))
    print_text(console, comparison.summary)
    for note in comparison.notes:
        print_text(console, f"Note: {note}", style="yellow")


def _make_figure_table(rows: Sequence[tuple[str, float, float]]) -> Table:
    table = make_table(["figure", "A", "B", "B − A"])
    for key, in_a, in_b in rows:
        table.add_row(style_text(key), f"{in_a:.4g}", f"{in_b:.4g}", f"{in_b - in_a:+.3g}")
    return table


def _make_change_table(changes: Sequence[tuple[Advice, Advice]], width: int) -> Table:
    table = make_table(["layer", "format", "A", "B"])
    texts = [(a.format, cell_text(a), cell_text(b)) for a, b in changes]
    taken = GAP + sum(max(map(len, column)) + GAP for column in zip(*texts, strict=True))
    names = shorten_names([a.layer for a, _ in changes], max(width - taken, LEAST_WIDTH))
    for name, (format, *cells), pair in zip(names, texts, changes, strict=True):
        styled = (
            style_text(cell, COLOURS[each.verdict]) for cell, each in zip(cells, pair, strict=True)
        )
        table.add_row(style_text(name), style_text(format), *styled)
    return table


def _group_formats(report: RunReport, layers: Sequence[str], width: int) -> list[list[str]]:
    """Return the report's formats in groups, each of which fits as a table's columns in `width`."""
    from rich.cells import cell_len

    least = min(LEAST_WIDTH, max(cell_len(replace_unprintable(layer)) for layer in layers))
    groups: list[list[str]] = []
    for format in report.formats:
        if groups and _measure_free_width(report, layers, [*groups[-1], format], width) >= least:
            groups[-1].append(format)
        else:
            groups.append([format])
    return groups


def _measure_free_width(
    report: RunReport, layers: Sequence[str], formats: Sequence[str], width: int
) -> int:
    """Return the number of characters that a table with these formats leaves for layers' names."""
    by_layer, suggestions = report.assessment.by_layer, report.assessment.suggestions
    columns = [[f, *(cell_text(by_layer[name].get(f)) for name in layers)] for f in formats]
    suggested = (suggestions.get(name) or _NO_SUGGESTION for name in layers)
    columns.append([*_SUGGESTION.split("\n"), *suggested])
    return width - GAP - sum(max(map(len, column)) + GAP for column in columns)


def _make_verdict_table(
    report: RunReport, layers: Sequence[str], formats: Sequence[str], width: int
) -> Table:
    from rich.text import Text

    by_layer, suggestions = report.assessment.by_layer, report.assessment.suggestions
    table = make_table(["layer", *formats])
    add_column(table, Text(_SUGGESTION))
    free = _measure_free_width(report, layers, formats, width)
    names = shorten_names(layers, max(free, LEAST_WIDTH))
    for name, layer in zip(names, layers, strict=True):
        cells = [by_layer[layer].get(format) for format in formats]
        styles = ["" if each is None else COLOURS[each.verdict] for each in cells]
        texts = [style_text(cell_text(c), style) for c, style in zip(cells, styles, strict=True)]
        table.add_row(
            style_text(name), *texts, style_text(suggestions.get(layer) or _NO_SUGGESTION)
        )
    return table
