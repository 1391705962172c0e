"""`altgrad` as users call it: in a process of its own, in a terminal of so many columns."""

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
