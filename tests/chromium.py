"""A browser without a window."""

import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium: apt-get install chromium"
)


def chromium(
    folder: Path, address: str, *options: str, milliseconds: int = 5000
) -> tuple[str, str]:
    """Open a page, and return its output and its errors.

    Args:
        folder: Folder for the browser's own files.
        address: Address of the page.
        options: Options of the browser, such as ``--dump-dom``.
        milliseconds: Time limit on the page's own clock, which runs ahead while the page is idle.
    """
    command = [
        *(CHROMIUM or "", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *(f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr"),
        *("--window-size=1500,1100", f"--virtual-time-budget={milliseconds}", *options, address),
    ]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=180)
    told = [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
    return shown.stdout, "\n".join(line for line in told if "rror" in line)
