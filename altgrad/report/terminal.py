"""The report as text for a terminal, and the comparison of two runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from altgrad.report.cells import COLOURS, EVIDENCE, MEANINGS, cell_text
from altgrad.report.names import printable, short_names

if TYPE_CHECKING:
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from altgrad.report.comparison import Comparison
    from altgrad.report.run_report import RunReport

_LEAST_WIDTH = 22  # of a layer's name
_MOST_LINES = 40  # of code
_GAP = 1  # between columns: that of the box
_SUGGESTION = "smallest\nfine"
_NO_SUGGESTION = "none"


def print_report(report: RunReport, console: Console, most_layers: int | None = None) -> None:
    """What a run is, its verdicts as a table, and in words.

    Args:
        report: Of the run.
        console: Where to; its width counts.
        most_layers: Of more layers, those that keep least are shown. None shows all.
    """
    _print(console, f"{report.run.path}: {report.steps}; {report.measured}")
    if skipped := report.skipped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())
        _print(console, f"Skipped steps: {reasons}")
    print_verdicts(report, console, most_layers)
    _print(console, report.assessment.summary)
    _print_to_apply(report, console)
    for note in report.run.notes:
        _print(console, f"Note: {note}", style="yellow")


def _print_to_apply(report: RunReport, console: Console) -> None:
    """The lines that apply the suggestions, as they are: to be copied."""
    lines = report.to_apply.splitlines()
    if len(lines) > _MOST_LINES:
        _print(console, f"The {len(lines)} lines that apply the suggestions: --html, --json.")
    elif lines:
        _print(console, "")
        _print(console, "To try it, in a simulation that keeps weights in these formats:")
        _print(console, "")
        for line in lines:
            console.print(_styled(printable(line)), soft_wrap=True)


def print_verdicts(report: RunReport, console: Console, most_layers: int | None = None) -> None:
    """Layers by formats, those that keep least first, in as many tables as the width asks for."""
    layers = [*report.assessment.by_layer]
    if not layers:
        return
    shown = layers[:most_layers]
    if len(shown) < len(layers):
        _print(console, f"The {len(shown)} of {len(layers):,} layers that keep least:")
    for formats in _that_fit(report, shown, console.width):
        console.print(_verdict_table(report, shown, formats, console.width))
    seen = {advice.verdict for advice in report.assessment.advice}
    for verdict, meaning in MEANINGS.items():
        if verdict in seen:
            console.print(f"  {verdict.short:6} {meaning}", style="dim", highlight=False)
            if evidence := EVIDENCE[verdict]:
                console.print(_indented(_styled(evidence, "dim italic"), 9))
    console.print("  The number is kept_update_ratio: 1 all of the update, 0 none.", style="dim")
    console.print("  Runs like this: small ones, whose weights really were stored.", style="dim")
    console.print()


def print_comparison(comparison: Comparison, console: Console, most: int | None = None) -> None:
    """The model's figures in both runs, and the layers that differ most.

    Args:
        comparison: Of two runs.
        console: Where to.
        most: Of more layers and formats, those that differ most are shown. None shows all.
    """
    for letter, run in zip("AB", comparison.runs, strict=True):
        _print(console, f"{letter}: {run.run.path}: {run.steps}")
    table = _table("Of the model, means over the steps", ["figure", "A", "B", "B − A"])
    for key, in_a, in_b in comparison.of_model:
        table.add_row(key, f"{in_a:.4g}", f"{in_b:.4g}", f"{in_b - in_a:+.3g}")
    console.print(table)
    if comparison.changes:
        console.print(_change_table(comparison, most, console.width))
    _print(console, comparison.summary)
    for note in comparison.notes:
        _print(console, f"Note: {note}", style="yellow")


def _change_table(comparison: Comparison, most: int | None, width: int) -> Table:
    changes = comparison.changes[:most]
    is_part = len(changes) < len(comparison.changes)
    which = (
        f"the {len(changes)} of {len(comparison.changes):,} that differ most" if is_part else "all"
    )
    table = _table(f"Verdicts and kept_update_ratio: {which}", ["layer", "format", "A", "B"])
    texts = [(a.format, cell_text(a), cell_text(b)) for a, b in changes]
    taken = _GAP + sum(max(map(len, column)) + _GAP for column in zip(*texts, strict=True))
    names = short_names([a.layer for a, _ in changes], max(width - taken, _LEAST_WIDTH))
    for name, (format, *cells), pair in zip(names, texts, changes, strict=True):
        styled = (
            _styled(cell, COLOURS[each.verdict]) for cell, each in zip(cells, pair, strict=True)
        )
        table.add_row(_styled(name), format, *styled)
    return table


def _that_fit(report: RunReport, layers: Sequence[str], width: int) -> list[list[str]]:
    """The formats, in groups whose columns leave room for the names of the layers."""
    groups: list[list[str]] = []
    for format in report.formats:
        if (
            groups
            and _width_for_names(report, layers, [*groups[-1], format], width) >= _LEAST_WIDTH
        ):
            groups[-1].append(format)
        else:
            groups.append([format])
    return groups


def _width_for_names(
    report: RunReport, layers: Sequence[str], formats: Sequence[str], width: int
) -> int:
    by_layer, suggestions = report.assessment.by_layer, report.assessment.suggestions
    columns = [[f, *(cell_text(by_layer[name].get(f)) for name in layers)] for f in formats]
    said = (suggestions.get(name) or _NO_SUGGESTION for name in layers)
    columns.append([*_SUGGESTION.split("\n"), *said])
    return width - _GAP - sum(max(map(len, column)) + _GAP for column in columns)


def _verdict_table(
    report: RunReport, layers: Sequence[str], formats: Sequence[str], width: int
) -> Table:
    by_layer, suggestions = report.assessment.by_layer, report.assessment.suggestions
    table = _table("If the weights were stored in …", ["layer", *formats, _SUGGESTION])
    free = _width_for_names(report, layers, formats, width)
    names = short_names(layers, max(free, _LEAST_WIDTH))
    for name, layer in zip(names, layers, strict=True):
        cells = [by_layer[layer].get(format) for format in formats]
        styles = ["" if each is None else COLOURS[each.verdict] for each in cells]
        texts = [_styled(cell_text(c), style) for c, style in zip(cells, styles, strict=True)]
        table.add_row(_styled(name), *texts, _styled(suggestions.get(layer) or _NO_SUGGESTION))
    return table


def _table(title: str, headings: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    table.pad_edge = table.show_edge = False
    for heading in headings:
        table.add_column(Text(heading), no_wrap=True, vertical="bottom")
    return table


def _styled(text: str, style: str = "") -> Text:
    """Of which rich reads nothing, unlike a str."""
    from rich.text import Text

    return Text(text, style=style)


def _indented(text: Text, columns: int) -> Padding:
    from rich.padding import Padding

    return Padding(text, (0, 0, 0, columns))


def _print(console: Console, text: str, style: str = "") -> None:
    """Words that rich is to read nothing into."""
    from rich.text import Text

    console.print(Text(printable(text), style=style))
