"""`altgrad report` and `altgrad compare`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from altgrad.report.comparison import Comparison
from altgrad.report.exports import as_csv, as_json
from altgrad.report.records.reading import read
from altgrad.report.records.schema import RunFileError
from altgrad.report.run_report import RunReport
from altgrad.report.terminal import print_comparison, print_report
from altgrad.report.web_page import page

_TERMINAL = Path("-")
_RUN = "A run's log directory, or its altgrad.jsonl."
_Run = Annotated[Path, typer.Argument(metavar="RUN", help=_RUN, show_default=False)]
_Layers = Annotated[
    int, typer.Option("--layers", min=0, help="Show at most so many; 0 shows all.", metavar="N")
]


def report(
    run: _Run,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page here.")] = None,
    as_json_: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the verdicts as JSON.")
    ] = None,
    as_csv_: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write the verdicts as CSV.")
    ] = None,
    layers: _Layers = 40,
) -> None:
    """Say what each number format would do to each layer of a run.

    The page needs no network. With - as FILE the terminal shows that alone.
    """
    found = _read(run)
    outputs: list[tuple[Path | None, Callable[[], str]]] = [
        (html, lambda: page(found)),
        (as_json_, lambda: json.dumps(as_json(found), ensure_ascii=False, indent=1) + "\n"),
        (as_csv_, lambda: as_csv(found)),
    ]
    if _TERMINAL not in (html, as_json_, as_csv_):
        print_report(found, Console(), layers or None)
    for path, text in outputs:
        if path is not None:
            _write(path, text())


def compare(a: _Run, b: _Run, layers: _Layers = 40) -> None:
    """Set two runs beside each other: where would their layers fare otherwise?"""
    print_comparison(Comparison((_read(a), _read(b))), Console(), layers or None)


def _read(path: Path) -> RunReport:
    try:
        return RunReport.of(read(path))
    except RunFileError as error:
        _fail(str(error))


def _write(path: Path, text: str) -> None:
    if path == _TERMINAL:
        sys.stdout.write(text)
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        _fail(f"{path}: it cannot be written ({error.strerror})")
    Console().print(f"Written: {path}", soft_wrap=True, highlight=False)


def _fail(message: str) -> NoReturn:
    sys.stderr.write(message + "\n")
    raise typer.Exit(2)
