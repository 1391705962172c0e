"""The command line: `altgrad formats`, and commands that other packages add by name."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

COMMANDS = "altgrad.commands"
"""The entry-point group of further commands, `altgrad demo` among them."""

_REMEDY = "pip install 'altgrad[demo]'"


def main() -> None:
    """Run the command line; without its libraries, say in one line how to get them."""
    try:
        import typer
    except ImportError:
        sys.exit(f"altgrad's command line needs typer and rich: {_REMEDY}")
    app = typer.Typer(
        help="If I kept my weights in this number format, would they still move?",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.command()(formats)
    for command in entry_points(group=COMMANDS):
        # Only the one that is called is imported; the help shows them all.
        if sys.argv[1:2] in ([], ["--help"], [command.name]):
            _add(app, command)
    app.callback()(lambda: None)  # so that a single command keeps its name
    app()


def _add(app: typer.Typer, command: EntryPoint) -> None:
    try:
        app.command(command.name)(command.load())
    except Exception as fault:  # noqa: BLE001 - a broken package must not take the others along
        message = f"altgrad {command.name} cannot be loaded ({fault!r}): {_REMEDY}"

        def unavailable() -> None:
            sys.exit(message)

        any_arguments = {"ignore_unknown_options": True, "allow_extra_args": True}
        about = f"Not available here: {_REMEDY}."
        app.command(command.name, help=about, context_settings=any_arguments)(unavailable)


def formats() -> None:
    """Print the named number formats and their range and precision."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from altgrad.quantization import FORMATS

    table = Table(
        title="Formats",
        caption="E, M: exponent and mantissa bits; eps: the step above 1; 2^n: powers of two",
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
            # With E = 0 nothing is normal: a number there would mislead.
            f"2^{format.emin}" if format.exponent_bits else "none",
            f"2^{format.emin - format.mantissa_bits}",
            f"2^{-format.mantissa_bits}",
            " ".join(name for name, has in specials.items() if has),
        )
    Console().print(table)
