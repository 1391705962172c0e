"""The command line: `altgrad formats`, `report` and `compare`, and commands that packages add.

`main` builds the application. `altgrad formats` is in this file, with its tables in
`altgrad.report.format_tables`; `altgrad report` and `altgrad compare` are in
`altgrad.report.commands`. A package adds a command by an entry point of the group
`altgrad.commands`, as `altgrad_lightning.demo` adds `altgrad demo`.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from io import TextIOWrapper
from typing import TYPE_CHECKING

from altgrad._version import __version__
from altgrad.report.names import replace_unprintable

if TYPE_CHECKING:
    import typer

COMMANDS = "altgrad.commands"
"""Name of the entry-point group in which packages register further commands, such as `altgrad
demo`; see pyproject.toml."""

# Listed here, because a checkout that is not installed has no entry points.
_OWN = {
    name: EntryPoint(name, f"altgrad.report.commands:{name}", COMMANDS)
    for name in ("report", "compare")
} | {"plan": EntryPoint("plan", "altgrad.report.plan_command:plan", COMMANDS)}

_REMEDY = "pip install 'altgrad[demo]'"


def main() -> None:
    """Run the command line of AltGrad; without typer, exit with the command that installs it."""
    try:
        import typer
    except ImportError:
        sys.exit(f"altgrad: expected the packages typer and rich; run {_REMEDY}")
    app = typer.Typer(
        help="If you stored your weights and optimizer states in fewer bits, would your training "
        "still learn?",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.command()(formats)
    commands = _list_commands()
    _check_command(sys.argv[1:2], ["formats", *(each.name for each in commands)])
    for command in commands:
        # Imports take seconds, so only the called command is imported; the help needs all.
        if sys.argv[1:2] in ([], ["--help"], [command.name]):
            _add(app, command)
    app.callback()(_make_callback())
    with _survive_output():
        app()


@contextmanager
def _survive_output() -> Iterator[None]:
    """Run a ``with`` block, and exit without a traceback if stdout cannot be written.

    The exit code is 1 if a pipe was closed, as by ``| head``, and 2 for another error. Characters
    that stdout cannot encode are printed as ``?``.

    Raises:
        OSError: A file of the block cannot be read or written.
    """
    stdout = sys.stdout
    if not isinstance(stdout, TextIOWrapper):  # None if it is closed
        yield
        return
    stdout.reconfigure(errors="replace")
    try:
        try:
            yield
        finally:
            stdout.flush()  # here an error can still be caught
    except OSError as error:
        if error.filename is not None:  # of a file, not of stdout
            raise
        # Else Python writes what is left in the buffer when it exits, and fails once more:
        # https://docs.python.org/3/library/signal.html#note-on-sigpipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader has seen enough, as with `| head`
            sys.exit(1)
        sys.stderr.write(f"altgrad: output cannot be written ({error.strerror})\n")
        sys.exit(2)


def _check_command(arguments: Sequence[str], known: Sequence[str]) -> None:
    """Exit with the nearest command if the first argument is neither an option nor a command."""
    for name in arguments:
        if name.startswith("-") or name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1)
        remedy = f"did you mean {near[0]}?" if near else "run altgrad --help"
        expected = f"expected one of the commands {', '.join(known)}"
        sys.stderr.write(f"altgrad {replace_unprintable(name)}: {expected}; {remedy}\n")
        sys.exit(2)


def _make_callback() -> Callable[[bool], None]:
    """Return the function of the options before a command, which are ``--version`` alone."""
    import typer

    def print_version(is_wanted: bool) -> None:
        if is_wanted:
            typer.echo(f"altgrad {__version__}")
            raise typer.Exit

    option = typer.Option(
        False, "--version", callback=print_version, is_eager=True, help="Print the version."
    )

    def accept(version: bool = option) -> None:
        """Accept the options before a command."""

    return accept


def _list_commands() -> list[EntryPoint]:
    """Return the entry points of all commands: those of AltGrad first, then other packages'."""
    added = {each.name: each for each in entry_points(group=COMMANDS) if each.name not in _OWN}
    return [*_OWN.values(), *added.values()]


def _add(app: typer.Typer, command: EntryPoint) -> None:
    """Add a command to the application, or one that exits with an error if loading it fails."""
    from altgrad.report.options import OptionalValueCommand

    try:
        app.command(command.name, cls=OptionalValueCommand)(command.load())
    except Exception as error:  # noqa: BLE001 - a broken command must not stop the others
        message = f"altgrad {command.name}: command cannot be loaded ({error!r}); run {_REMEDY}"

        def exit_with_error() -> None:
            sys.exit(message)

        any_arguments = {"ignore_unknown_options": True, "allow_extra_args": True}
        help_text = f"Not available here; run {_REMEDY}."
        app.command(command.name, help=help_text, context_settings=any_arguments)(exit_with_error)


def formats() -> None:
    """List the formats, block formats and recipes by name, with their range and bytes."""
    from rich.console import Console

    from altgrad.report.format_tables import print_formats

    print_formats(Console())
