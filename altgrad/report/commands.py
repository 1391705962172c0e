"""The commands `altgrad report` and `altgrad compare`.

`altgrad.cli` makes both functions commands. ``--help`` prints their docstrings and the help texts
of their arguments.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeAlias

import typer
from rich.console import Console

from altgrad.report.comparison import Comparison
from altgrad.report.comparison_page import comparison_page
from altgrad.report.comparison_table import print_comparison
from altgrad.report.conditions import Condition, parse_condition
from altgrad.report.confirmation import find_confirmation
from altgrad.report.confirmation_table import print_confirmation
from altgrad.report.exports import (
    as_csv,
    as_json,
    comparison_as_csv,
    comparison_as_json,
    confirmation_as_csv,
    confirmation_as_json,
)
from altgrad.report.markdown import write_comment
from altgrad.report.names import replace_unprintable
from altgrad.report.outputs import find_obstacle, find_refusal
from altgrad.report.printing import print_line
from altgrad.report.records.reading import read
from altgrad.report.records.run import Run
from altgrad.report.records.schema import RunFileError
from altgrad.report.run_report import RunReport
from altgrad.report.terminal import print_first_screen, print_report
from altgrad.report.web_page import confirmation_page, page

_TERMINAL = Path("-")  # the usual name for standard output
_RUN = "A run's log directory, or its altgrad.jsonl."
_Run = Annotated[Path, typer.Argument(metavar="RUN", help=_RUN, show_default=False)]
_Layers = Annotated[
    int, typer.Option("--layers", min=0, help="Show at most N layers; 0 shows all.", metavar="N")
]
_Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write an HTML page.")]
_Force = Annotated[bool, typer.Option("--force", help="Replace files that are no reports, too.")]
_Output: TypeAlias = tuple[Path | None, Callable[[], str]]
"""A file that the user wants, ``-`` for standard output or None, and a function for its text."""
_Print: TypeAlias = Callable[[Console], object]
"""A function that prints in the terminal what a command found."""


@contextmanager
def exit_if_damaged() -> Iterator[None]:
    """Run a command, and exit with a sentence if a run file cannot be read.

    Numbers are read when they are needed, and so may be damaged after the rest was read.
    """
    try:
        yield
    except RunFileError as error:
        _fail(str(error))


@exit_if_damaged()
def report(
    run: _Run,
    html: _Html = None,
    as_json_: Annotated[
        Path | None, typer.Option("--json", metavar="[FILE]", help="Write the verdicts as JSON.")
    ] = None,
    as_csv_: Annotated[
        Path | None, typer.Option("--csv", metavar="[FILE]", help="Write the verdicts as CSV.")
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option("--markdown", metavar="[FILE]", help="Write a comment for GitHub."),
    ] = None,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(metavar="CONDITION", help="Exit with 1 if it holds; may be repeated."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Show all layers, and code that applies the advice.")
    ] = False,
    layers: Annotated[
        int | None,
        typer.Option("--layers", min=0, help="Show N layers; 0 shows all.", metavar="N"),
    ] = None,
    force: _Force = False,
) -> None:
    """Report whether a run, and each of its layers, would train if stored otherwise.

    The page works without a network. With - as FILE, only that output is shown;
    --json, --csv and --markdown behind RUN need no FILE for this.

    A CONDITION is 'frozen:RECIPE', 'frozen:RECIPE>SHARE', 'lost:RECIPE>SHARE',
    'not-fine:RECIPE' or 'nan'; a RECIPE may be now, or a pattern with *. Without
    an observed step the exit code is 1, too.

    \f
    Args:
        run: Log directory of a run, or its run file.
        html: File for the HTML page.
        as_json_: File for the verdicts as JSON.
        as_csv_: File for the verdicts as CSV.
        markdown: File for the first screen as Markdown.
        fail_on: Conditions on which the exit code is 1, as `parse_condition` reads them.
        everything: If True, print all layers, what the words mean, and code.
        layers: Maximum number of layers in the table; 0 shows all. None shows as many as fit into
            24 lines, or all with ``--all``.
        force: If True, replace files of any kind.
    """  # noqa: D301 - typer's help ends at the form feed; the options have their own help
    conditions = _parse(fail_on or ())
    found = RunReport.from_run(read(run))
    problems = _test(conditions, found)
    outputs: list[_Output] = [
        (html, lambda: page(found)),
        (as_json_, lambda: _format_json(as_json(found))),
        (as_csv_, lambda: as_csv(found)),
        (markdown, lambda: write_comment(found)),
    ]
    _show(
        lambda console: _print(found, console, layers, everything=everything),
        outputs,
        (found.run,),
        force=force,
    )
    _exit_if_any(problems)


def _print(found: RunReport, console: Console, layers: int | None, *, everything: bool) -> None:
    """Print the whole report of a run, or its first screen."""
    count = len(found.by_layer) if layers == 0 else layers
    (print_report if everything else print_first_screen)(found, console, count)


@exit_if_damaged()
def compare(
    a: _Run,
    b: _Run,
    html: _Html = None,
    as_json_: Annotated[
        Path | None, typer.Option("--json", metavar="[FILE]", help="Write the figures as JSON.")
    ] = None,
    as_csv_: Annotated[
        Path | None, typer.Option("--csv", metavar="[FILE]", help="Write the figures as CSV.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Take this recipe of the run that predicts."),
    ] = None,
    layers: _Layers = 40,
    force: _Force = False,
) -> None:
    """Compare two runs: what one predicted and what happened, or their verdicts.

    One run predicts the other if it tried the recipe by which the other is
    stored, such as bf16-true. Then the layers come first that differ most from
    the prediction. Otherwise the layers whose verdicts differ come first. A
    verdict says whether a layer would still train if its weights were stored in
    a number format.

    \f
    Args:
        a: Log directory of the first run, or its run file.
        b: Log directory of the second run, or its run file.
        html: File for the HTML page.
        as_json_: File for the figures as JSON.
        as_csv_: File for the figures as CSV.
        recipe: Name of the recipe to compare with the other run, however that one is stored.
        layers: Maximum number of rows in the table; 0 shows all.
        force: If True, replace files of any kind.
    """  # noqa: D301 - typer's help ends at the form feed; the options have their own help
    runs = read(a), read(b)
    try:
        found = find_confirmation(*runs, recipe)
    except ValueError as error:
        _fail(str(error))
    if found is None:
        comparison = Comparison((RunReport.from_run(runs[0]), RunReport.from_run(runs[1])))
        outputs: list[_Output] = [
            (html, lambda: comparison_page(comparison)),
            (as_json_, lambda: _format_json(comparison_as_json(comparison))),
            (as_csv_, lambda: comparison_as_csv(comparison)),
        ]
        print_all: _Print = partial(print_comparison, comparison, most=layers or None)
    else:
        outputs = [
            (html, lambda: confirmation_page(found)),
            (as_json_, lambda: _format_json(confirmation_as_json(found))),
            (as_csv_, lambda: confirmation_as_csv(found)),
        ]
        print_all = partial(print_confirmation, found, most=layers or None)
    _show(print_all, outputs, runs, force=force)


def _show(
    print_all: _Print,
    outputs: Sequence[_Output],
    runs: Sequence[Run],
    *,
    force: bool,
) -> None:
    """Write the outputs that the user wants, and print what a command found unless one is shown.

    Args:
        print_all: Function that prints in the terminal what the command found.
        outputs: The outputs of the command.
        runs: The runs that were read, whose files are no outputs.
        force: If True, replace files of any kind.
    """
    chosen = [(path, make_text) for path, make_text in outputs if path is not None]
    files = [path for path, _ in chosen if path != _TERMINAL]
    inputs = [path for run in runs for path in (run.path, *run.predecessors)]
    if obstacle := find_obstacle(files, inputs):
        _fail(obstacle)
    if not force and (refusal := find_refusal(files)):
        _fail(f"{refusal}; choose another file, or pass --force")
    # Made before anything is printed: a library may be missing.
    texts = [(path, make_text()) for path, make_text in chosen]
    shows_all = len(files) == len(chosen)  # or the terminal shows another output alone
    if shows_all:
        print_all(Console())
    for path, text in texts:
        _write(path, text)
        if shows_all:
            print_line(f"Written: {path}", Console())


def _parse(conditions: Iterable[str]) -> list[Condition]:
    try:
        return [parse_condition(each) for each in conditions]
    except ValueError as error:
        _fail(str(error))


def _test(conditions: Sequence[Condition], report: RunReport) -> list[str]:
    """Return a sentence for each condition that holds, or one if no step was observed."""
    try:
        problems = [problem for each in conditions if (problem := each.test(report))]
    except ValueError as error:
        _fail(str(error))
    nothing = f"{report.run.path}: no step was observed, so that nothing could be judged"
    return problems if report.run.steps else [nothing]


def _exit_if_any(problems: Sequence[str]) -> None:
    """Print problems to stderr, a line for each, and exit with 1; return without any."""
    for problem in problems:
        sys.stderr.write(replace_unprintable(problem) + "\n")
    if problems:
        raise typer.Exit(1)


def _format_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


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
