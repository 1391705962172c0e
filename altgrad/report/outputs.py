"""Decide which files a command may write: new files, and reports of AltGrad.

`commands` calls `find_refusal` before a file is written.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from altgrad.report.records.reading import is_run_file_name

_TEXT = rb'"(?:[^"\\]|\\.)*"'  # a string of JSON
_REPORT = re.compile(
    rb"<!DOCTYPE html>.{,500}<title>AltGrad: "
    rb'|\{\s*"path": ' + _TEXT + rb',\s*"created": ' + _TEXT + rb',\s*"versions": \{'
    rb'|\{\s*"predicting": ' + _TEXT + rb',\s*"real": ' + _TEXT + rb',\s*"recipe": '
    rb"|layer,(?:format|recipe),verdict,"
    rb"|layer,step,frozen_frac_predicted,",
    re.DOTALL,
)
"""Pattern of how the pages of `web_page`, and the JSON and CSV of `exports`, begin."""

_HEAD = 2**16  # bytes; longer than any path in the beginning of JSON


def find_refusal(paths: Sequence[Path], inputs: Iterable[Path]) -> str | None:
    """Return why a file must not be written; None if all files may be written.

    Files that are missing or empty, reports of AltGrad, and devices such as ``/dev/null`` may be
    written. Files that were read, and all other files, are refused. So is the name of a run file,
    because a reader of the folder would take the new file for the newest run.

    Args:
        paths: The files to write.
        inputs: The files that were read.

    Returns:
        A sentence about the first file that is refused, without the remedy and the full stop.
    """
    inputs = [*inputs]
    names: set[str] = set()
    for path in paths:
        # Some file systems ignore case, also in names of files that are still missing.
        name = os.path.realpath(path).casefold()
        if name in names:
            return f"{path}: expected a file of its own for each output, got the same file twice"
        names.add(name)
        if found := _describe_loss(path, inputs):
            return f"{path}: expected a new file or a report of AltGrad, got {found}"
    return None


def _describe_loss(path: Path, inputs: Iterable[Path]) -> str | None:
    """Return in words what overwriting a file would destroy; None if it may be overwritten."""
    if any(_is_same_file(path, each) for each in inputs):
        return "the run file that is read"
    if is_run_file_name(path.name):
        return "the name of a run file"
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
            return None
        with path.open("rb") as file:
            is_report = _REPORT.match(file.read(_HEAD)) is not None
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"a file that cannot be read ({error.strerror})"
    return None if is_report else "another file"


def _is_same_file(path: Path, other: Path) -> bool:
    """Return True if both paths lead to one file, also through links or another letter case."""
    try:
        return path.samefile(other)
    except OSError:  # one of them is missing
        return False
