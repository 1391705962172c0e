"""`Handover`: pass findings from a process that Lightning has spawned to the one that called `fit`.

The strategies ``ddp_spawn``, ``ddp_fork`` and ``ddp_notebook`` train in child processes, each with
a copy of the callback. Lightning passes weights and some numbers back, and nothing of callbacks:
lightning/pytorch/strategies/launchers/multiprocessing.py. The child therefore leaves a file.

Read `result` first, which is what is passed. `callback` has a `Handover`.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import uuid
import weakref
from pathlib import Path

from altgrad_lightning.result import Result


class Handover:
    """A way from a child process to the process in which this object was made: a file.

    A pickle or a fork of the object, in a child of that process, writes the file. The original
    reads and deletes it.
    """

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._path = Path(tempfile.gettempdir(), f"altgrad-{uuid.uuid4().hex}")
        weakref.finalize(self, _delete, self._path, self._owner)

    def give(self, result: Result) -> None:
        """Pass findings on, if this process is a child of the one that made the object.

        Args:
            result: The findings of a training.
        """
        parent = multiprocessing.parent_process()
        if parent is None or parent.pid != self._owner:
            return
        content = pickle.dumps(result)
        draft = self._path.with_suffix(f".{os.getpid()}")
        # Nobody else may read it, or write what is unpickled.
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        draft.replace(self._path)

    def take(self) -> Result | None:
        """Return the findings that a child process has passed on since the last call, or None."""
        if os.getpid() != self._owner or not self._path.exists():
            return None
        result = pickle.loads(self._path.read_bytes())  # noqa: S301 - of our own child process
        self._path.unlink()
        assert isinstance(result, Result)
        return result


def _delete(path: Path, owner: int) -> None:
    """Delete a file that nobody has read, unless this is a fork of the process that reads it."""
    if os.getpid() == owner:
        path.unlink(missing_ok=True)
