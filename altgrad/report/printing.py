"""Print texts and tables in a terminal: literally, and in as few columns as they need.

Names of layers may hold markup of rich or unprintable characters; `style_text` shows them as they
are. The modules `terminal_runs`, `terminal` and `confirmation_table` print with these functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from altgrad.report.names import replace_unprintable

if TYPE_CHECKING:
    from rich.console import Console, JustifyMethod
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

LEAST_WIDTH = 22
"""Number of characters of a layer's name that a table leaves at least."""

GAP = 1
"""Number of characters between columns, as rich's box has them."""


def print_meaning(console: Console, word: str, meaning: str, width: int = 6) -> None:
    """Print a word of the legend and its meaning, whose lines begin in the same column.

    Args:
        console: Console to print on.
        word: The word.
        meaning: Its meaning.
        width: Number of characters of the longest word.
    """
    from rich.table import Table

    line = Table.grid(padding=(0, 1, 0, 0))
    line.add_column(min_width=width, no_wrap=True)
    line.add_row(style_text(word, "dim"), style_text(meaning, "dim"))
    console.print(indent(line, 2))


def print_line(text: str, console: Console) -> None:
    """Print a line literally and unwrapped, so that users can copy it.

    Args:
        text: The line; unprintable characters become �.
        console: Console to print on.
    """
    console.print(style_text(text), soft_wrap=True)


def make_table(headings: Sequence[str]) -> Table:
    """Return a table with these headings, without rows; only a line below them separates rows."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=0)
    table.pad_edge = table.show_edge = False  # every character counts in 80 columns
    for heading in headings:
        add_column(table, style_text(heading))
    return table


def add_column(table: Table, heading: Text, justify: JustifyMethod = "left") -> None:
    """Add a column to a table whose cells are never wrapped.

    Args:
        table: The table.
        heading: Heading of one or several lines, which stands at the bottom.
        justify: Where the texts of the column stand.
    """
    table.add_column(heading, no_wrap=True, vertical="bottom", justify=justify)


def add_tall_column(table: Table, lines: Sequence[str]) -> None:
    """Add a column with a heading of several lines to a table.

    Args:
        table: The table.
        lines: The lines of the heading; unprintable characters become �.
    """
    from rich.text import Text

    add_column(table, Text("\n".join(map(replace_unprintable, lines))))


def measure_columns(columns: Sequence[Sequence[str]]) -> int:
    """Return the number of characters that columns and the gaps behind them take in a table.

    Each column is given by the lines of its heading and its cells.
    """
    from rich.cells import cell_len

    widths = (max(cell_len(replace_unprintable(text)) for text in each) for each in columns)
    return sum(width + GAP for width in widths)


def style_text(text: str, style: str = "") -> Text:
    """Return a Text of rich that shows a line literally.

    Rich interprets ``[red]`` and ``:smile:`` in a str, and a terminal interprets unprintable
    characters.

    Args:
        text: The line; unprintable characters become �.
        style: Style of rich, such as ``"bold red"``.
    """
    from rich.text import Text

    return Text(replace_unprintable(text), style=style)


def indent(text: Text | Table, columns: int) -> Padding:
    """Return a text or table that is printed some columns further to the right.

    Args:
        text: The text or table.
        columns: Number of columns.
    """
    from rich.padding import Padding

    return Padding(text, (0, 0, 0, columns))


def print_text(console: Console, text: str, style: str = "") -> None:
    """Print a line literally, wrapped at the width of the console.

    Args:
        console: Console to print on.
        text: The line; unprintable characters become �.
        style: Style of rich, such as ``"bold red"``.
    """
    console.print(style_text(text, style))
