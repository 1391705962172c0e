"""Rows of strategies: two processes that share the data, the parameters, or both.

Figures of sharded parameters are compared with those of one process that replays the whole tensors.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

import altgrad
from altgrad import StepRecord, UpdateMonitor
from benchmarks.compatibility import trainers
from benchmarks.compatibility.trial import (
    EXACT,
    LEFT_OUT,
    REFUSED,
    WRONG,
    Finding,
    RefusedError,
    Row,
    Watched,
    quiet,
    try_run,
)
from tests.distributed import sharded
from tests.distributed.comparing import differences
from tests.distributed.sharded import Net, WholeSteps, replayed
from tests.integrations.trainings import train
from tests.processes import Processes
from tests.step_truth.lightning_modes import fit
from tests.step_truth.modes import Run
from tests.step_truth.recording import Journal, Step

RANKS = 2
STEPS = 3
SETTINGS: dict[str, Any] = {"max_elements": 300, "recipes": ()}

Make = Callable[[int], nn.Module]


def make_replicas(_: int) -> nn.Module:
    return DistributedDataParallel(Net(), find_unused_parameters=True)


def make_fsdp1(_: int) -> nn.Module:
    return FullyShardedDataParallel(Net(), use_orig_params=True, device_id=torch.device("cpu"))


def make_late(_: int) -> nn.Module:
    return Net()


class Sharded(NamedTuple):
    """What a training of a sharded model was: its whole steps, the records, the notices."""

    steps: list[sharded.WholeStep]
    records: list[StepRecord]
    notices: list[str]


def train_sharded(
    make: Make, rank: int, *, is_watched: bool, gives_inside: bool = False
) -> Sharded:
    """Train with clones of the whole tensors around each step.

    The monitor gets the module inside a wrapper if `gives_inside`.
    """
    torch.manual_seed(0)
    net = make(RANKS)
    inner = net.module if isinstance(net, DistributedDataParallel) else net
    optimizer = AdamW(net.parameters(), lr=3e-3)
    records: list[StepRecord] = []
    told: list[str] = []
    monitor = UpdateMonitor(
        net.module if gives_inside else net, records.append, warn=told.append, **SETTINGS
    )
    if is_watched:
        attach(monitor, optimizer)
    if make is make_late:
        fully_shard(net, mesh=init_device_mesh("cpu", (RANKS,)))
        optimizer.param_groups[0]["params"] = [*net.parameters()]
    truth = WholeSteps(inner)
    # Replicas have rows of their own; ranks that share a tensor-parallel layer need the same.
    rows = torch.Generator().manual_seed(rank if inner is not net else 1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        net(torch.randint(0, 7, (6,), generator=rows)).backward()
        truth.before()
        optimizer.step()
        truth.after()
    monitor.detach()
    return Sharded(truth.steps, records, told)


def attach(monitor: UpdateMonitor, optimizer: Any) -> None:
    try:
        monitor.attach(optimizer)
    except Exception as error:
        raise RefusedError(str(error)) from error


def try_sharded(rank: int, make: Make, **options: Any) -> Finding:
    """Train on a rank without and with a monitor, and compare with one process.

    Args:
        rank: The rank.
        make: Function of the number of ranks that returns the model.
        options: Further arguments of `train_sharded`.

    Returns:
        What came out on this rank.
    """
    with quiet():
        plain = train_sharded(make, rank, is_watched=False, **options)
        try:
            watched = train_sharded(make, rank, is_watched=True, **options)
        except RefusedError as error:
            return Finding(REFUSED, str(error))
        if not is_same(plain.steps, watched.steps):
            return Finding(WRONG, "training differs from that without AltGrad")
        note = " ".join(watched.notices)
        is_silent = make is make_replicas and rank > 0
        if not watched.records:
            silent = Finding(EXACT) if is_silent else Finding(WRONG, "no record")
            return Finding(LEFT_OUT, note) if note else silent
        expected = replayed(watched.steps, **SETTINGS).records
        pairs = zip(watched.records, expected, strict=True)
        problems = [found for own, other in pairs for found in differences(own, other)]
    return Finding(WRONG, problems[0]) if problems else Finding(EXACT, note)


def is_same(some: list[sharded.WholeStep], others: list[sharded.WholeStep]) -> bool:
    """Compare steps bit for bit; NaN, which some rows have, equals itself."""

    def equal(a: Tensor, b: Tensor) -> bool:
        return torch.equal(a.view(torch.int32), b.view(torch.int32))

    return len(some) == len(others) and all(
        mine.keys() == theirs.keys()
        and all(equal(a, b) for n in mine for a, b in zip(mine[n], theirs[n], strict=True))
        for mine, theirs in zip(some, others, strict=True)
    )


def run_replicas(design: Any, folder: Path) -> Journal:
    """Train replicas in a loop under `altgrad.watch`."""
    model, journal, optimizer = trainers.make_training()
    replicas = DistributedDataParallel(model)
    watch = partial(altgrad.watch, replicas, optimizer, folder, **trainers.WATCH)
    with design.adapt(watch):
        train(replicas, optimizer, STEPS)
    return journal


def run_lightning(design: Any, folder: Path) -> Journal:
    return fit(devices=RANKS, strategy="ddp")(design, folder)


def judge_silent(design: Watched, _: list[Step], notices: list[str]) -> Finding:
    """Judge a rank that is to observe nothing, as all under DDP but the first."""
    if design.seen or notices:
        return Finding(WRONG, f"sees {len(design.seen)} steps; {' '.join(notices)}")
    return Finding(EXACT)


def try_adapter(rank: int, run: Run) -> Finding:
    return try_run(run, judge_silent if rank else None)


@cache
def start_ranks() -> Processes:
    """Return the processes that all rows share; they end with this process."""
    processes = Processes(RANKS)
    atexit.register(processes.__exit__)
    return processes


def ask_ranks(work: Callable[..., Finding], *arguments: Any, **options: Any) -> Finding:
    """Run a function on each rank, and return what came out; a rank that differs comes first."""
    try:
        found: list[Finding] = start_ranks()(partial(work, **options), *arguments)
    except AssertionError as error:
        lines = str(error).strip().splitlines()
        return Finding(WRONG, lines[-1])
    return next((each for each in found if each.result != EXACT), found[0])


def list_rows() -> list[Row]:
    makes: dict[str, Make] = {
        "DistributedDataParallel": make_replicas,
        "FSDP2 (`fully_shard`)": sharded.fsdp,
        "FSDP2, sharded by columns": sharded.fsdp_by_columns,
        "HSDP": sharded.hsdp,
        "tensor parallel": sharded.tensor_parallel,
        "FSDP1": make_fsdp1,
        "FSDP2, sharded after `attach`": make_late,
    }
    adapters: dict[str, Run] = {
        "DDP, `altgrad.watch`": run_replicas,
        "DDP, accelerate": partial(trainers.run_accelerate, is_first=False),
        "DDP, Fabric": partial(trainers.run_fabric, is_first=False),
        "DDP, Trainer of Lightning": run_lightning,
        "DDP, Trainer of Hugging Face": partial(trainers.run_hugging_face, optim="adamw_torch"),
    }
    group = "Two processes"
    inside = partial(ask_ranks, try_sharded, make_fsdp1, gives_inside=True)
    return [
        *(Row(group, n, partial(ask_ranks, try_sharded, make)) for n, make in makes.items()),
        Row(group, "FSDP1, the module inside", inside),
        *(Row(group, n, partial(ask_ranks, try_adapter, run)) for n, run in adapters.items()),
    ]
