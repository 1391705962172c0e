"""Print the report of a run, or the comparison of two runs, in a terminal.

`print_report` prints a report, of which `print_verdicts` is the table, and `print_comparison`
prints the comparison. Tables are split and names are shortened to fit the width of the console.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from altgrad._messages import format_count
from altgrad.report.cells import (
    COLOURS,
    MEANINGS,
    NONFINITE,
    NONFINITE_MEANING,
    cell_text,
)
from altgrad.report.names import replace_unprintable, shorten_names

if TYPE_CHECKING:
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from altgrad.report.comparison import Comparison
    from altgrad.report.run_report import RunReport
    from altgrad.report.verdicts import Advice

_LEAST_WIDTH = 22  # characters of a layer's name
_MOST_LINES = 40  # lines of code that are printed; more push the verdicts out of sight
_GAP = 1  # characters between columns, as rich's box has them
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
    _print(console, f"{report.run.path}: {report.steps}; {report.measured}")
    if skipped := report.skipped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())
        _print(console, f"Skipped steps: {reasons}")
    print_verdicts(report, console, most_layers)
    _print(console, report.assessment.summary)
    _print_to_apply(report, console)
    for note in report.notes:
        _print(console, f"Note: {note}", style="yellow")


def _print_to_apply(report: RunReport, console: Console) -> None:
    """Print Python code that stores each layer in a format that is fine for it, to be copied.

    Instead of more than 40 lines, a sentence says where the code is.
    """
    lines = report.to_apply.splitlines()
    if len(lines) > _MOST_LINES:
        count = format_count(len(lines), "line")
        _print(console, f"The {count} that apply the suggestions are in --html and --json.")
    elif lines:
        _print(console, "")
        _print(console, "To try it, in a simulation that keeps weights in these formats:")
        _print(console, "")
        for line in lines:
            print_line(line, console)


def print_line(text: str, console: Console) -> None:
    """Print a line literally and unwrapped, so that users can copy it.

    Args:
        text: The line; unprintable characters become �.
        console: Console to print on.
    """
    console.print(_style(text), soft_wrap=True)


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
        _print(console, f"The {len(shown)} of {count} that keep least:")
    for formats in _group_formats(report, shown, console.width):
        _print(console, "If the weights were stored in …", style="italic")
        console.print(_make_verdict_table(report, shown, formats, console.width))
    seen = {advice.verdict for advice in report.assessment.advice}
    for verdict, meaning in MEANINGS.items():
        if verdict in seen:
            _print_meaning(console, verdict.short, meaning)
    if any(advice.nonfinite for advice in report.assessment.advice):
        _print_meaning(console, NONFINITE, NONFINITE_MEANING)
    for note in (
        "The number is kept_update_ratio: 1 all of the update, 0 none.",
        "Runs like this: small runs that really stored their weights in a format.",
    ):
        console.print(_indent(_style(note, "dim"), 2))
    console.print()


def _print_meaning(console: Console, word: str, meaning: str) -> None:
    """Print a word of the legend and its meaning, whose lines begin in the same column."""
    from rich.table import Table

    line = Table.grid(padding=(0, 1, 0, 0))
    line.add_column(min_width=6, no_wrap=True)
    line.add_row(_style(word, "dim"), _style(meaning, "dim"))
    console.print(_indent(line, 2))


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
        _print(console, f"{letter}: {run.run.path}: {run.steps}")
    table = _make_table(["figure", "A", "B", "B − A"])
    for key, in_a, in_b in comparison.model_means:
        table.add_row(_style(key), f"{in_a:.4g}", f"{in_b:.4g}", f"{in_b - in_a:+.3g}")
    if comparison.model_means:
        _print(console, "The model: means over the steps", style="italic")
        console.print(table)
    if comparison.changes:
        changes = comparison.changes[:most]
        which = f"the {len(changes)} of {len(comparison.changes):,} that differ most"
        which = "all" if len(changes) == len(comparison.changes) else which
        _print(console, f"Verdicts and kept_update_ratio: {which}", style="italic")
        console.print(_make_change_table(changes, console.width))
    _print(console, comparison.summary)
    for note in comparison.notes:
        _print(console, f"Note: {note}", style="yellow")


def _make_change_table(changes: Sequence[tuple[Advice, Advice]], width: int) -> Table:
    table = _make_table(["layer", "format", "A", "B"])
    texts = [(a.recipe, cell_text(a), cell_text(b)) for a, b in changes]
    taken = _GAP + sum(max(map(len, column)) + _GAP for column in zip(*texts, strict=True))
    names = shorten_names([a.layer for a, _ in changes], max(width - taken, _LEAST_WIDTH))
    for name, (format, *cells), pair in zip(names, texts, changes, strict=True):
        styled = (
            _style(cell, COLOURS[each.verdict]) for cell, each in zip(cells, pair, strict=True)
        )
        table.add_row(_style(name), _style(format), *styled)
    return table


def _group_formats(report: RunReport, layers: Sequence[str], width: int) -> list[list[str]]:
    """Return the report's formats in groups, each of which fits as a table's columns in `width`."""
    from rich.cells import cell_len

    least = min(_LEAST_WIDTH, max(cell_len(replace_unprintable(layer)) for layer in layers))
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
    return width - _GAP - sum(max(map(len, column)) + _GAP for column in columns)


def _make_verdict_table(
    report: RunReport, layers: Sequence[str], formats: Sequence[str], width: int
) -> Table:
    from rich.text import Text

    by_layer, suggestions = report.assessment.by_layer, report.assessment.suggestions
    table = _make_table(["layer", *formats])
    _add_column(table, Text(_SUGGESTION))
    free = _measure_free_width(report, layers, formats, width)
    names = shorten_names(layers, max(free, _LEAST_WIDTH))
    for name, layer in zip(names, layers, strict=True):
        cells = [by_layer[layer].get(format) for format in formats]
        styles = ["" if each is None else COLOURS[each.verdict] for each in cells]
        texts = [_style(cell_text(c), style) for c, style in zip(cells, styles, strict=True)]
        table.add_row(_style(name), *texts, _style(suggestions.get(layer) or _NO_SUGGESTION))
    return table


def _make_table(headings: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=0)
    table.pad_edge = table.show_edge = False  # every character counts in 80 columns
    for heading in headings:
        _add_column(table, _style(heading))
    return table


def _add_column(table: Table, heading: Text) -> None:
    table.add_column(heading, no_wrap=True, vertical="bottom")


def _style(text: str, style: str = "") -> Text:
    """Return a Text of rich that shows a line literally.

    Rich interprets ``[red]`` and ``:smile:`` in a str, and a terminal interprets unprintable
    characters.
    """
    from rich.text import Text

    return Text(replace_unprintable(text), style=style)


def _indent(text: Text | Table, columns: int) -> Padding:
    from rich.padding import Padding

    return Padding(text, (0, 0, 0, columns))


def _print(console: Console, text: str, style: str = "") -> None:
    console.print(_style(text, style))
