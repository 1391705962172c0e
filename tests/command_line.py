"""Run the command `altgrad` in this process, in a terminal with a number of columns.

`tests/test_cli.py` runs it in new processes, as users do; that takes longer than most commands.
"""

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

from altgrad.cli import main


def altgrad(*arguments: object, columns: int = 80) -> subprocess.CompletedProcess[str]:
    command = ["altgrad", *map(str, arguments)]
    environment = {"COLUMNS": str(columns), "PATH": ""}
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with (
        mock.patch.object(sys, "argv", command),
        mock.patch.dict(os.environ, environment, clear=True),
        # Read once, when typer is imported, from variables such as GITHUB_ACTIONS.
        mock.patch("typer.rich_utils.FORCE_TERMINAL", None),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        code = run_main()
    return subprocess.CompletedProcess(command, code, read_text(out), read_text(err))


def run_main() -> int:
    """Run the command and return its exit code; a message is printed, as Python does."""
    try:
        main()
    except SystemExit as ended:
        if not isinstance(ended.code, str):
            return ended.code or 0
        sys.stderr.write(f"{ended.code}\n")
        return 1
    return 0


def read_text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    stream.seek(0)
    return stream.read()
