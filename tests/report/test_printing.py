"""Texts and tables of a terminal: literal, and narrow."""

from __future__ import annotations

import io

from rich.console import Console
from rich.text import Text

from altgrad.report.printing import (
    GAP,
    add_column,
    add_tall_column,
    indent,
    make_table,
    measure_columns,
    print_line,
    print_meaning,
    print_text,
    style_text,
)

ODD = "[red]a[/] :smile: \x1b[31m\n$x$"
SHOWN = "[red]a[/] :smile: �[31m�$x$"


def make_console(width: int = 30) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=width), file


def test_texts_are_shown_literally() -> None:
    assert style_text(ODD).plain == SHOWN
    for print_one in (print_text, lambda console, text: print_line(text, console)):
        console, file = make_console(80)
        print_one(console, ODD)
        assert file.getvalue().rstrip() == SHOWN


def test_a_text_is_wrapped_and_a_line_to_copy_is_not() -> None:
    words = "word " * 20
    console, file = make_console()
    print_text(console, words)
    assert max(map(len, file.getvalue().splitlines())) <= 30
    console, file = make_console()
    print_line(words, console)
    assert file.getvalue().count("\n") == 1


def test_a_table_has_one_character_between_columns() -> None:
    console, file = make_console()
    table = make_table(["layer", "a"])
    add_column(table, Text("two\nlines"), "right")
    table.add_row("w", "1", "2")
    console.print(table)
    assert [line.rstrip() for line in file.getvalue().splitlines()] == [
        "          two",
        "layer a lines",
        "─────────────",
        "w     1     2",
    ]


def test_lines_of_a_meaning_begin_in_the_same_column() -> None:
    console, file = make_console()
    print_meaning(console, "word", "a meaning that needs more than one line")
    lines = file.getvalue().splitlines()
    assert [line[:9] for line in lines] == ["  word   ", *[" " * 9] * (len(lines) - 1)]
    assert len(lines) > 1
    console, file = make_console()
    console.print(indent(style_text("a"), 3))
    assert file.getvalue().startswith("   a")
    console, file = make_console()
    print_meaning(console, "a", "b", width=9)
    assert file.getvalue().rstrip() == "  a         b"


def test_a_tall_heading_has_several_lines_and_its_width_is_measured() -> None:
    columns = [(["two", "lines"], ["a", "bc"]), (["x\ny"], ["名前", ""])]
    table = make_table([])
    for heading, _ in columns:
        add_tall_column(table, heading)
    for cells in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*map(style_text, cells))
    console, file = make_console()
    console.print(table)
    lines = file.getvalue().splitlines()
    assert [line.split() for line in lines[:2]] == [["two"], ["lines", "x�y"]]
    # The rule below the headings has no gap behind the last column.
    assert len(lines[2]) == measure_columns([[*head, *cells] for head, cells in columns]) - GAP
