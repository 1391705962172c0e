"""Tell whether an open file still has its name, and read a file that has none any more.

A run goes on for days, and its folder may be cleared meanwhile. Writing to a deleted file raises no
error, and the lines are gone when it is closed.

The module `writing` comes next.
"""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


def has_name(file: BinaryIO, path: Path) -> bool:
    """Return True if a path is that of an open file, and False if it is missing or another file's.

    Args:
        file: The open file.
        path: The absolute path at which the file was opened.
    """
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # the path cannot be looked at now, as on a network that is down
        return True
    return os.path.samestat(found, os.fstat(file.fileno()))


def is_deleted(file: BinaryIO, path: Path) -> bool:
    """Return True if an open file that has lost its name is deleted, and False if it was moved.

    Args:
        file: The open file.
        path: The absolute path at which the file was opened.
    """
    status = os.fstat(file.fileno())
    if status.st_nlink == 0:
        return True
    # NFS keeps a deleted file that is open under the name .nfs…, in the same folder, until it is
    # closed: https://nfs.sourceforge.net, "What is a silly rename?"
    with suppress(OSError):
        others = [each.stat() for each in path.parent.glob(".nfs*")]
        return any(os.path.samestat(each, status) for each in others)
    return False


def map_content(file: BinaryIO) -> memoryview:
    """Return the content of an open file, also if it is deleted, as a map that takes no memory.

    Args:
        file: The open file, which is not empty.

    Returns:
        The bytes; they may be used until nothing refers to them.
    """
    return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
