"""Run `altgrad` like a user: in a new process, in a terminal with a number of columns."""

import subprocess
import sys


def altgrad(*arguments: object, columns: int = 80) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "altgrad", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={"COLUMNS": str(columns), "PATH": ""},
        check=False,
    )
