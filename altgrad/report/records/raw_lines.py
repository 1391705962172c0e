"""Read the raw lines of a regular file up to the length that the file had when it was opened.

Pipes and devices are refused, because reading could block or never end. Lines that a run appends
during the reading are left out.

The module `reading` comes next and parses the lines.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from altgrad.report.records.schema import RunFileError

MOST_BYTES = 2**26
"""Largest length of a line in bytes, 64 MiB: enough for the header of 400,000 layers."""


def read_raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the number of each line of a file, from 1 on, and the line.

    Returns:
        An iterator of pairs: the number of a line, and the line with its end.

    Raises:
        RunFileError: The path is missing, invalid, or names no regular file; the file cannot be
            read, or a line is too long.
    """
    with open_file(path) as file:
        left, number = os.fstat(file.fileno()).st_size, 0
        while left and (line := _read_line(path, file, min(left, MOST_BYTES + 1))):
            number += 1
            if len(line) > MOST_BYTES:
                raise RunFileError(
                    f"{path}: line {number} is longer than {MOST_BYTES:,} bytes; "
                    "expected a run file of AltGrad"
                )
            left -= len(line)
            yield number, line


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading.

    Returns:
        The open file.

    Raises:
        RunFileError: The path is missing, invalid, or names no regular file; or the file cannot be
            opened.
    """
    try:
        # Checked first: opening a pipe waits for its writer.
        is_regular = stat.S_ISREG(path.stat().st_mode)
        file = path.open("rb") if is_regular else None
    except FileNotFoundError:
        raise RunFileError(
            f"{path}: file or folder is missing; expected a run file of AltGrad"
        ) from None
    except OSError as error:
        raise RunFileError(f"{path}: file cannot be read ({error.strerror})") from None
    except ValueError:  # a NUL, or a character that the file system cannot encode
        raise RunFileError(f"{path}: expected a valid path") from None
    if file is None:
        raise RunFileError(f"{path}: expected a regular file, got a folder, pipe or device")
    return file


def _read_line(path: Path, file: BinaryIO, most: int) -> bytes:
    try:
        return file.readline(most)
    except OSError as error:
        raise RunFileError(f"{path}: file cannot be read ({error.strerror})") from None
