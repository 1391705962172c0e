"""The commands `altgrad report` and `altgrad compare`.

`altgrad.cli` makes both functions commands. ``--help`` prints their docstrings and the help texts
of their arguments.
"""

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
from altgrad.report.names import replace_unprintable
from altgrad.report.outputs import find_refusal
from altgrad.report.printing import print_line
from altgrad.report.records.reading import read
from altgrad.report.records.schema import RunFileError
from altgrad.report.run_report import RunReport
from altgrad.report.terminal import print_comparison, print_report
from altgrad.report.web_page import page

_TERMINAL = Path("-")  # the usual name for standard output
_RUN = "A run's log directory, or its altgrad.jsonl."
_Run = Annotated[Path, typer.Argument(metavar="RUN", help=_RUN, show_default=False)]
_Layers = Annotated[
    int, typer.Option("--layers", min=0, help="Show at most N layers; 0 shows all.", metavar="N")
]


def report(
    run: _Run,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write an HTML page.")] = None,
    as_json_: Annotated[
        Path | None, typer.Option("--json", metavar="[FILE]", help="Write the verdicts as JSON.")
    ] = None,
    as_csv_: Annotated[
        Path | None, typer.Option("--csv", metavar="[FILE]", help="Write the verdicts as CSV.")
    ] = None,
    layers: _Layers = 40,
    force: Annotated[
        bool, typer.Option("--force", help="Replace files that are no reports, too.")
    ] = False,
) -> None:
    """Report how each number format would store each layer of a run.

    The page works without a network. With - as FILE, only that output is shown;
    --json and --csv behind RUN need no FILE for this.

    \f
    Args:
        run: Log directory of a run, or its run file.
        html: File for the HTML page.
        as_json_: File for the verdicts as JSON.
        as_csv_: File for the verdicts as CSV.
        layers: Maximum number of layers in the table; 0 shows all.
        force: If True, replace files of any kind.
    """  # noqa: D301 - typer's help ends at the form feed; the options have their own help
    found = _read(run)
    outputs: list[tuple[Path | None, Callable[[], str]]] = [
        (html, lambda: page(found)),
        (as_json_, lambda: json.dumps(as_json(found), ensure_ascii=False, indent=1) + "\n"),
        (as_csv_, lambda: as_csv(found)),
    ]
    chosen = [(path, make_text) for path, make_text in outputs if path is not None]
    files = [path for path, _ in chosen if path != _TERMINAL]
    if not force and (refusal := find_refusal(files, (found.run.path, *found.run.predecessors))):
        _fail(f"{refusal}; choose another file, or pass --force")
    shows_report = len(files) == len(chosen)  # or the terminal shows another output alone
    if shows_report:
        print_report(found, Console(), layers or None)
    for path, make_text in chosen:
        _write(path, make_text())
        if shows_report:
            print_line(f"Written: {path}", Console())


def compare(a: _Run, b: _Run, layers: _Layers = 40) -> None:
    """Compare two runs and list the layers that differ most.

    Layers whose verdicts differ come first. A verdict says whether a layer would
    still train if its weights were stored in a number format.

    \f
    Args:
        a: Log directory of the first run, or its run file.
        b: Log directory of the second run, or its run file.
        layers: Maximum number of rows in the table; 0 shows all.
    """  # noqa: D301 - typer's help ends at the form feed; the options have their own help
    print_comparison(Comparison((_read(a), _read(b))), Console(), layers or None)


def _read(path: Path) -> RunReport:
    try:
        return RunReport.from_run(read(path))
    except RunFileError as error:
        _fail(str(error))


def _write(path: Path, text: str) -> None:
    # A name may hold a lone surrogate, which UTF-8 cannot; \udXXX is the escape of JSON.
    content = text.encode("utf-8", "backslashreplace")
    if path == _TERMINAL:
        typer.echo(content, nl=False)  # the same bytes as in a file, in any locale
        return
    try:
        path.write_bytes(content)
    except OSError as error:
        _fail(f"{path}: file cannot be written ({error.strerror})")


def _fail(message: str) -> NoReturn:
    sys.stderr.write(replace_unprintable(message) + "\n")
    raise typer.Exit(2)  # the exit code of click for wrong arguments
