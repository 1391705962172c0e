"""Print in a terminal how two runs differ: their figures, and the layers whose verdicts differ.

Read `comparison` and `printing` first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from altgrad.measurement.catalogue import get_metric
from altgrad.report.cells import COLOURS, cell_text
from altgrad.report.names import shorten_names
from altgrad.report.printing import GAP, LEAST_WIDTH, make_table, print_text, style_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from altgrad.report.comparison import Comparison
    from altgrad.report.judging.verdicts import Advice


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
        table.add_row(style_text(key), *write_figures(key, in_a, in_b))
    return table


def write_figures(key: str, in_a: float, in_b: float) -> tuple[str, str, str]:
    """Return two figures and their difference: shares with four decimals, others in four digits.

    Args:
        key: Key of the figure, such as ``stall_frac/bf16``.
        in_a: The figure of run A.
        in_b: The figure of run B.

    Returns:
        The texts of both figures, and of their difference with its sign.
    """
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
