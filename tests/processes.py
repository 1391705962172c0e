"""Ranks as real processes on one machine, which meet through a file and end in time."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest import mock

import torch
from torch import distributed as dist

START = 60.0  # seconds for processes to start on a busy machine
_CONTEXT = multiprocessing.get_context("forkserver")
# What each rank would import again; the names of `altgrad` are imported on first use.
_PRELOADED = (
    "torch.distributed.fsdp",
    "pytest",
    "altgrad.monitor.monitor",
    "altgrad_lightning.callback",
)
_CONTEXT.set_forkserver_preload([*_PRELOADED])
_SPAWN = multiprocessing.get_context("spawn")
_NO_MORE = b""


def run(
    work: Callable[..., Any],
    size: int,
    *arguments: Any,
    limit: float = 60.0,
    collective: float = 20.0,
    may_die: tuple[int, ...] = (),
    hash_seeds: Sequence[int] = (),
) -> list[Any]:
    """Run a function in new processes and return each result; None for a dead process.

    Args:
        work: Called with the rank and the arguments.
        size: Number of processes, each of which ends as soon as it has returned.
        arguments: Further arguments of `work`.
        limit: Seconds for the whole run, after which every process is killed and the test fails.
        collective: Time limit of the process group, in seconds.
        may_die: Ranks that need not return.
        hash_seeds: PYTHONHASHSEED of each rank; by default all ranks have the same.
    """
    with Processes(size, collective, hash_seeds) as processes:
        processes.ask(work, *arguments)
        processes.ask_no_more()
        return processes.answers(limit, may_die)


class Processes:
    """A pool of processes that run many functions, so that many tests share one slow start.

    The first call starts the processes; the next call after a failed one starts new processes.

    Args:
        size: Number of processes.
        collective: Time limit of their process group, in seconds.
        hash_seeds: PYTHONHASHSEED of each rank, by default the same. Seeds make the start slower.
    """

    def __init__(self, size: int, collective: float = 20.0, hash_seeds: Sequence[int] = ()) -> None:
        self._size, self._collective, self._hash_seeds = size, collective, hash_seeds
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def __call__(self, work: Callable[..., Any], *arguments: Any, limit: float = 60.0) -> list[Any]:
        """Run a function in each process and return each result."""
        try:
            self.ask(work, *arguments)
            return self.answers(limit)
        except BaseException:
            self._stop()
            raise

    def __enter__(self) -> Processes:  # noqa: PYI034 - typing has Self only from Python 3.11 on
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def ask(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Send the function to each process."""
        if not self._processes:
            self._start()
        asked = pickle.dumps((work, arguments))
        for connection in self._connections:
            connection.send_bytes(asked)

    def ask_no_more(self) -> None:
        """Have each process end after its current function."""
        for connection in self._connections:
            connection.send_bytes(_NO_MORE)

    def answers(self, limit: float, may_die: tuple[int, ...] = ()) -> list[Any]:
        """Return the result of each process."""
        end = time.monotonic() + START + limit
        said: dict[int, Any] = {}
        waited_for = {connection: rank for rank, connection in enumerate(self._connections)}
        while waited_for:
            heard = wait([*waited_for], max(end - time.monotonic(), 0))
            late = [*waited_for.values()]
            assert heard, f"ranks {late} of {self._size} did not end within {START + limit} s"
            for connection in heard:
                said[waited_for.pop(connection)] = _heard_on(connection)
        return [_value(rank, said[rank], rank in may_die) for rank in range(self._size)]

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        for rank in range(self._size):
            # Forks of one server share its hash seed; a new interpreter reads its own.
            context: Any = _SPAWN if self._hash_seeds else _CONTEXT
            seed = {"PYTHONHASHSEED": str(self._hash_seeds[rank])} if self._hash_seeds else {}
            here, there = context.Pipe()
            arguments = (there, rank, self._size, self._folder.name, self._collective)
            process = context.Process(target=_serve, args=arguments)
            with mock.patch.dict(os.environ, seed):
                process.start()
            there.close()
            self._processes.append(process)
            self._connections.append(here)

    def _stop(self) -> None:
        if not self._processes:
            return
        for process, connection in zip(self._processes, self._connections, strict=True):
            process.kill()
            process.join()
            connection.close()
        self._processes, self._connections = [], []
        self._folder.cleanup()


def _heard_on(connection: Any) -> tuple[Any, str | None] | None:
    """Receive a value and an error; None from a process that has ended."""
    try:
        return pickle.loads(connection.recv_bytes())
    except (EOFError, ConnectionError):
        return None


def _value(rank: int, answer: tuple[Any, str | None] | None, may_die: bool) -> Any:
    if answer is None:
        assert may_die, f"rank {rank} died"
        return None
    value, error = answer
    assert error is None, f"rank {rank}: {error}"
    return value


def _serve(connection: Connection, rank: int, size: int, folder: str, seconds: float) -> None:
    torch.set_num_threads(1)
    _as_torchrun(rank, size)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=seconds),
    )
    with suppress(EOFError):  # the parent process is gone
        while (asked := connection.recv_bytes()) != _NO_MORE:
            connection.send_bytes(_answer(rank, asked))
    os._exit(0)  # a gloo thread that waits for a lost rank would block a normal exit


def _answer(rank: int, asked: bytes) -> bytes:
    value = error = None
    try:
        work, arguments = pickle.loads(asked)
        value = work(rank, *arguments)
    except BaseException:  # noqa: BLE001 - the test gets every error
        error = traceback.format_exc()
    return pickle.dumps((value, error))


def _as_torchrun(rank: int, size: int) -> None:
    """Set the environment variables that torchrun sets."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "TORCHELASTIC_RUN_ID": "tests",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
    }
