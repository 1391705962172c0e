"""Texts and tables of a terminal: literal, and narrow."""

from __future__ import annotations

import io

from rich.console import Console
from rich.text import Text

from altgrad.report.printing import (
    add_column,
    indent,
    make_table,
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
