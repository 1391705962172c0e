"""The command line: `altgrad formats`, and commands that other packages add by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import cast

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
        app.command(command.name)(_load(command))
    app.callback()(lambda: None)  # so that a single command keeps its name
    app()


def _load(command: EntryPoint) -> Callable[..., None]:
    """The command's function, or one that says which packages are missing."""
    try:
        return cast(Callable[..., None], command.load())
    except ImportError as missing:
        message = f"altgrad {command.name} needs more packages ({missing}): {_REMEDY}"

    def unavailable() -> None:
        sys.exit(message)

    unavailable.__doc__ = f"Not available here: {_REMEDY}."
    return unavailable


def formats() -> None:
    """Print the named number formats and their range and precision."""
    from rich.console import Console
    from rich.table import Table

    from altgrad.quantization import FORMATS

    table = Table(title="Formats", caption="E, M: exponent and mantissa bits; eps = 2^-M")
    table.add_column("name", style="bold")
    for heading in ("bits", "E", "M", "bias", "max", "smallest normal", "smallest", "eps"):
        table.add_column(heading, justify="right")
    table.add_column("has")
    table.add_column("torch dtype")
    for format in FORMATS.values():
        specials = {
            "inf": format.has_inf,
            "nan": format.has_nan,
            "-0": format.has_negative_zero,
        }
        table.add_row(
            format.name,
            str(format.bits),
            str(format.exponent_bits),
            str(format.mantissa_bits),
            str(format.bias),
            f"{format.max:.6g}",
            # With E = 0 nothing is normal: a number there would mislead.
            f"{format.smallest_normal:.4g}" if format.exponent_bits else "none",
            f"{format.smallest_subnormal:.4g}",
            f"{format.eps:.4g}",
            " ".join(name for name, has in specials.items() if has),
            str(format.torch_dtype or "").removeprefix("torch."),
        )
    Console().print(table)
