"""`OptionalValueCommand`: a command whose options may lack their value.

Every command of `altgrad.cli` has this class. The functions behind the commands are in `commands`.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Any

from typer.core import TyperCommand

DEFAULT = "-"
"""The value of an option that lacks its value: the usual name of standard output."""


class OptionalValueCommand(TyperCommand):
    """A command of the command line, some of whose options may lack their value.

    These are the options with a metavar, the word for the value in ``--help``, in brackets:
    ``[FILE]``. A value is missing if the option is the last argument, or another option follows.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse arguments, with ``-`` for each missing value.

        Args:
            ctx: The context of the call, as click passes it.
            args: The arguments of the call.

        Returns:
            The arguments that remain, as click expects.
        """
        optional = {
            name
            for each in self.params
            if (each.metavar or "").startswith("[")
            for name in each.opts
        }
        return super().parse_args(ctx, fill_values(args, optional))


def fill_values(args: Sequence[str], optional: Collection[str]) -> list[str]:
    """Insert ``-`` after each option that lacks its value.

    Args:
        args: The arguments of a call.
        optional: Names of the options that may lack their value.

    Returns:
        The arguments with all values. Arguments after ``--`` are values, and stay unchanged.
    """
    end = args.index("--") if "--" in args else len(args)
    filled: list[str] = []
    for name, value in itertools.zip_longest(args[:end], args[1 : end + 1]):
        if name is not None:
            filled.append(name)
        if name in optional and (value is None or (value != DEFAULT and value.startswith("-"))):
            filled.append(DEFAULT)
    return [*filled, *args[end:]]
