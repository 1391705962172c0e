"""Print in a terminal what one run predicted, beside what really happened in another.

A table has three columns for each metric: predicted, real and their difference. Metrics that do not
fit in the width of the console go to another table.

Read `confirmation` first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from altgrad._messages import format_count
from altgrad.report.confirmation import (
    FROZEN,
    MEANING,
    Confirmation,
    ConfirmedLayer,
    explain_metric,
    shorten_metric,
)
from altgrad.report.judging.decimals import format_difference, format_figure
from altgrad.report.names import shorten_names
from altgrad.report.printing import (
    GAP,
    LEAST_WIDTH,
    add_column,
    make_table,
    print_meaning,
    print_text,
    style_text,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_NARROWEST = 8  # characters of a name of a layer, in a console too narrow for more


def print_confirmation(
    confirmation: Confirmation, console: Console, most: int | None = None
) -> None:
    """Print what one run predicted of a way to store weights, beside what really happened.

    The layers that differ most come first, and those that are frozen are coloured.

    Args:
        confirmation: The prediction, and the run in which it came true or not.
        console: Console to print on; tables fit its width.
        most: Maximum number of layers. None shows all.
    """
    for letter, run, part in (
        ("A", confirmation.predicting, "predicts"),
        ("B", confirmation.real, "is real"),
    ):
        print_text(console, f"{letter} {part}: {run.path}")
    layers = confirmation.layers[:most]
    print_text(console, confirmation.heading, style="italic")
    print_text(console, MEANING, style="dim")
    if len(layers) < len(confirmation.layers):
        count = format_count(len(confirmation.layers), "layer")
        print_text(console, f"The {len(layers)} of {count} that differ most:")
    rows = [*([] if confirmation.model is None else [confirmation.model]), *layers]
    for metrics in _group_metrics(confirmation.metrics, rows, console.width) if rows else ():
        console.print(_make_pair_table(rows, metrics, console.width))
    for metric in confirmation.metrics if rows else ():
        print_meaning(console, shorten_metric(metric), explain_metric(metric))
    for sentence in confirmation.summary:
        print_text(console, sentence)
    for note in confirmation.notes:
        print_text(console, f"Note: {note}", style="yellow")


def _group_metrics(
    metrics: Sequence[str], rows: Sequence[ConfirmedLayer], width: int
) -> list[Sequence[str]]:
    """Return the metrics in groups whose columns fit in `width` beside names of layers."""
    least = min(LEAST_WIDTH, max(len(_name_row(row)) for row in rows))
    groups: list[Sequence[str]] = []
    for metric in metrics:
        wider = [*groups[-1], metric] if groups else [metric]
        if groups and width - _measure_pairs(rows, wider) >= least:
            groups[-1] = wider
        else:
            groups.append([metric])
    return groups


def _measure_pairs(rows: Sequence[ConfirmedLayer], metrics: Sequence[str]) -> int:
    """Return the width of the columns of some metrics, with the gaps before them."""
    columns = [
        [heading, *(cells[k] for cells in _write_pairs(rows, metric))]
        for metric in metrics
        for k, heading in enumerate(_head_pair(metric))
    ]
    return sum(
        GAP + max(len(line) for text in column for line in text.split("\n")) for column in columns
    )


def _head_pair(metric: str) -> tuple[str, str, str]:
    return f" {shorten_metric(metric)}\npred.", "\nreal", "\ndiff."


def _write_pairs(rows: Sequence[ConfirmedLayer], metric: str) -> list[tuple[str, str, str]]:
    """Return the texts of three cells for each row: predicted, real and their difference."""
    pairs = [row.pairs[metric] for row in rows]
    limit = FROZEN if metric == "frozen_frac" else 1.0
    return [
        (
            format_figure(pair.predicted, limit),
            format_figure(pair.real, limit),
            format_difference(pair.difference),
        )
        for pair in pairs
    ]


def _name_row(row: ConfirmedLayer) -> str:
    return "the model" if row.name is None else row.name


def _make_pair_table(rows: Sequence[ConfirmedLayer], metrics: Sequence[str], width: int) -> Table:
    from rich.text import Text

    table = make_table(["layer"])
    for metric in metrics:
        for heading in _head_pair(metric):
            add_column(table, Text(heading), "right")
    free = max(width - _measure_pairs(rows, metrics), _NARROWEST)
    names = shorten_names([_name_row(row) for row in rows], free)
    written = zip(*(_write_pairs(rows, metric) for metric in metrics), strict=True)
    for name, row, groups in zip(names, rows, written, strict=True):
        cells = []
        for metric, (predicted, real, difference) in zip(metrics, groups, strict=True):
            pair = row.pairs[metric]
            is_share = metric == "frozen_frac"
            for text, figure in ((predicted, pair.predicted), (real, pair.real)):
                cells.append(style_text(text, "bold red" if is_share and figure >= FROZEN else ""))
            cells.append(style_text(difference, "dim"))
        table.add_row(style_text(name, "bold" if row.name is None else ""), *cells)
    return table
