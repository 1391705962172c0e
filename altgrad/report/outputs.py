"""Decide which files a command may write: new files, and reports of AltGrad.

`commands` calls `find_obstacle` and `find_refusal` before a report is printed or a file written.
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
    rb'|\{\s*"schema": \d+,\s*"kind": "(?:report|confirmation|comparison|plan)",'
    # JSON without a schema, of AltGrad 0.1.0
    rb'|\{\s*"path": ' + _TEXT + rb',\s*"created": ' + _TEXT + rb',\s*"versions": \{'
    rb"|layer,(?:format|recipe),verdict(?:_a)?,"
    rb"|layer,step,frozen_frac_predicted,"
    rb"|<!-- altgrad report -->",
    re.DOTALL,
)
"""Pattern of how pages, JSON, CSV and Markdown of AltGrad begin."""

_HEAD = 2**16  # bytes; longer than any path in the beginning of JSON


def find_obstacle(paths: Sequence[Path], inputs: Iterable[Path] = ()) -> str | None:
    """Return why a file cannot be written, with the remedy; None if all files can be written.

    The folder of a new file must exist and be writable. An existing file must be writable, and no
    folder. A file that was read is never written, and no file twice.

    Args:
        paths: The files to write.
        inputs: The files that were read.
    """
    inputs = [*inputs]
    names: set[str] = set()
    for path in paths:
        if any(_is_same_file(path, each) for each in inputs):
            return f"{path}: expected another file than the run file that is read; choose one"
        if found := _describe_obstacle(path):
            return f"{path}: file cannot be written: {found}"
        # Some file systems ignore case, also in names of files that are still missing.
        name = os.path.realpath(path).casefold()
        if name in names:
            return f"{path}: expected a file of its own for each output, got the same file twice"
        names.add(name)
    return None


def _describe_obstacle(path: Path) -> str:
    """Return in words what keeps a file from being written; empty without an obstacle."""
    folder = path.parent
    try:
        if path.is_dir():
            return "this is a folder; add a file's name"
        if path.exists():
            return "" if os.access(path, os.W_OK) else "no permission to write; choose another file"
        if folder.is_dir():
            may_add = os.access(folder, os.W_OK | os.X_OK)
            return "" if may_add else f"no permission to write in {folder}; choose another folder"
        if folder.exists():
            return f"{folder} is a file and no folder; choose another folder"
    except OSError as error:
        return f"{error.strerror}; choose another file"
    return f"the folder {folder} is missing; make it first"


def find_refusal(paths: Iterable[Path]) -> str | None:
    """Return why a file should not be written; None if all files may be written.

    Files that are missing or empty, reports of AltGrad, and devices such as ``/dev/null`` may be
    written. All other files are refused. So is the name of a run file, because a reader of the
    folder would take the new file for the newest run.

    Args:
        paths: The files to write.

    Returns:
        A sentence about the first file that is refused, without the remedy and the full stop.
    """
    for path in paths:
        if found := _describe_loss(path):
            return f"{path}: expected a new file or a report of AltGrad, got {found}"
    return None


def _describe_loss(path: Path) -> str | None:
    """Return in words what overwriting a file would destroy; None if it may be overwritten."""
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
