"""Real processes on one machine, that reach each other through a file and end in time."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

START = 60.0  # seconds for processes to start on a busy machine
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch.distributed.fsdp", "altgrad", "pytorch_lightning"])


def run(
    work: Callable[..., Any],
    size: int,
    *arguments: Any,
    limit: float = 60.0,
    collective: float = 20.0,
    may_die: tuple[int, ...] = (),
) -> list[Any]:
    """What a function of a module returns in each of these processes; of a dead one, None.

    Args:
        work: Called with the rank and the arguments.
        size: How many processes.
        arguments: The rest.
        limit: Seconds for all of it, after which every process is killed and the test fails.
        collective: Time limit of the process group, in seconds.
        may_die: Ranks that need not return.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            _CONTEXT.Process(
                target=_run_one, args=(work, rank, size, folder, collective, arguments)
            )
            for rank in range(size)
        ]
        for each in processes:
            each.start()
        end = time.monotonic() + START + limit
        try:
            for each in processes:
                each.join(max(end - time.monotonic(), 0))
            late = [rank for rank, each in enumerate(processes) if each.is_alive()]
        finally:
            for each in processes:
                each.kill()
                each.join()
        assert not late, f"ranks {late} of {size} did not end within {START + limit} s"
        return [_result(Path(folder), rank, rank in may_die) for rank in range(size)]


def _result(folder: Path, rank: int, may_die: bool) -> Any:
    file = folder / f"{rank}.pt"
    if not file.exists():
        assert may_die, f"rank {rank} died"
        return None
    value, fault = torch.load(file, weights_only=False)
    assert fault is None, f"rank {rank}: {fault}"
    return value


def _run_one(
    work: Callable[..., Any], rank: int, size: int, folder: str, seconds: float, arguments: Any
) -> None:
    torch.set_num_threads(1)
    _as_torchrun(rank, size)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=seconds),
    )
    value = fault = None
    try:
        value = work(rank, *arguments)
    except BaseException:  # noqa: BLE001 - all of it is the test's
        fault = traceback.format_exc()
    part = Path(folder) / f"{rank}.part"
    torch.save((value, fault), part)
    part.rename(Path(folder) / f"{rank}.pt")
    os._exit(0)  # a thread of gloo that waits for a rank that is gone would hold it up


def _as_torchrun(rank: int, size: int) -> None:
    """What torchrun sets, for those who look for it."""
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
