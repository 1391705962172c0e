"""The command line: `altgrad formats`, `report` and `compare`, and commands that packages add.

`main` builds the application. `altgrad formats` is in this file, `altgrad report` and `altgrad
compare` are in `altgrad.report.commands`. A package adds a command by an entry point of the group
`altgrad.commands`, as `altgrad_lightning.demo` adds `altgrad demo`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from io import TextIOWrapper
from typing import TYPE_CHECKING

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
        help="If I kept my weights in this number format, would they still move?",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.command()(formats)
    for command in _list_commands():
        # Imports take seconds, so only the called command is imported; the help needs all.
        if sys.argv[1:2] in ([], ["--help"], [command.name]):
            _add(app, command)
    # Without a callback, typer runs a single command without its name:
    # https://typer.tiangolo.com/tutorial/commands/one-or-multiple/
    app.callback()(lambda: None)
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
    """Print a table of the named number formats, with their range and precision."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from altgrad.quantization import FORMATS

    table = Table(
        title="Formats",
        caption="E, M: exponent and mantissa bits; eps: spacing above 1; 2^n: powers of two",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    headings = ["bits", "E", "M", "bias", "max", "smallest\nnormal", "smallest", "eps"]
    table.add_column("name", style="bold", no_wrap=True, vertical="bottom")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    table.add_column("has", no_wrap=True, vertical="bottom")
    for format in FORMATS.values():
        specials = {"inf": format.has_inf, "nan": format.has_nan}
        table.add_row(
            format.name,
            str(format.bits),
            str(format.exponent_bits),
            str(format.mantissa_bits),
            str(format.bias),
            f"{format.max:.5g}",
            # A format with E = 0 has subnormal numbers only.
            f"2^{format.emin}" if format.exponent_bits else "none",
            f"2^{format.emin - format.mantissa_bits}",
            f"2^{-format.mantissa_bits}",
            " ".join(name for name, has in specials.items() if has),
        )
    Console().print(table)
