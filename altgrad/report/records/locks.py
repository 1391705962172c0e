"""`take_lock`: lock a run file, so that the file has one writer at a time.

The lock is a file beside the run file, and is deleted when the writer closes the run file. A
process that dies loses its lock.

The module `file_names` comes next.
"""

from __future__ import annotations

import errno
import os
import warnings
from contextlib import suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

_NO_LOCKS = {errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""Numbers (errno) of errors of file systems without locks, such as some network file systems."""


class WriterLock:
    """The right to write a run file, which ends with `release`.

    Args:
        lock: The lock of the run file, which this process holds.
    """

    def __init__(self, lock: BaseFileLock) -> None:
        self._lock = lock
        self._process = os.getpid()
        self._file = _find_file(lock)

    def release(self) -> None:
        """Release the lock, so that another writer can take it, and delete the lock's file."""
        if not self._lock.is_locked or os.getpid() != self._process:  # in a fork of the writer
            return
        if not isinstance(self._lock, SoftFileLock):  # which deletes its file itself
            # Deleted while the lock is held: a writer that has opened the file meanwhile sees that
            # the file has no name any more, and makes a new one. Windows refuses. If the folder was
            # deleted meanwhile, the file may be that of another writer.
            with suppress(OSError):
                if _find_file(self._lock) == self._file:
                    Path(self._lock.lock_file).unlink()
        self._lock.release()


def take_lock(path: Path) -> WriterLock | None:
    """Lock a run file for one writer.

    In a file system without locks, the lock's file holds the number of the writing process and the
    name of its host. If that process has ended, a writer on the same host takes the lock.

    Args:
        path: Path of the run file, which may be missing.

    Returns:
        The lock; None if another writer has it, in this process or in another one.

    Raises:
        OSError: The lock's file cannot be created.
    """
    lock: BaseFileLock = FileLock(f"{path}.lock", thread_local=False)
    try:
        with warnings.catch_warnings():
            # FileLock would go on as a SoftFileLock, on a file that others then delete.
            warnings.filterwarnings("error", ".*falling back to SoftFileLock")
            return WriterLock(lock) if _try_to_acquire(lock) else None
    except UserWarning:
        pass
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    with suppress(OSError):
        Path(lock.lock_file).unlink()
    lock = SoftFileLock(f"{path}.pid", thread_local=False)
    # The first attempt may do no more than delete the file of a process that has ended.
    is_held = _try_to_acquire(lock) or _try_to_acquire(lock)
    return WriterLock(lock) if is_held else None


def _find_file(lock: BaseFileLock) -> tuple[int, int] | None:
    """Return the numbers of the device and of the lock's file; None if it is missing."""
    with suppress(OSError):
        found = Path(lock.lock_file).stat()
        return found.st_dev, found.st_ino
    return None


def _try_to_acquire(lock: BaseFileLock) -> bool:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True
