"""Rows of strategies: two processes that share the data, the parameters, or both."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

import altgrad
from altgrad import StepRecord, UpdateMonitor
from benchmarks.compatibility import sharded_trainers, trainers
from benchmarks.compatibility.sharded_trial import SETTINGS, Sharded, try_sharded
from benchmarks.compatibility.trial import (
    EXACT,
    WRONG,
    Finding,
    RefusedError,
    Row,
    Watched,
    try_run,
)
from tests.distributed import sharded
from tests.distributed.sharded import Net, WholeSteps
from tests.integrations.trainings import train
from tests.processes import Processes
from tests.step_truth.lightning_modes import fit
from tests.step_truth.modes import Run
from tests.step_truth.recording import Journal, Step

RANKS = 2
STEPS = 3

Make = Callable[[int], nn.Module]


def make_replicas(_: int) -> nn.Module:
    return DistributedDataParallel(Net(), find_unused_parameters=True)


def make_fsdp1(_: int) -> nn.Module:
    return FullyShardedDataParallel(Net(), use_orig_params=True, device_id=torch.device("cpu"))


def make_late(_: int) -> nn.Module:
    return Net()


def train_sharded(
    make: Make, rank: int, is_watched: bool, *, gives_inside: bool = False
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


def try_module(rank: int, make: Make, **options: Any) -> Finding:
    """Train a model on a rank in a plain loop.

    Args:
        rank: The rank.
        make: Function of the number of ranks that returns the model.
        options: Further arguments of `train_sharded`.

    Returns:
        What came out on this rank.
    """
    train = partial(train_sharded, make, rank, **options)
    return try_sharded(train, is_silent=make is make_replicas and rank > 0)


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
    inside = partial(ask_ranks, try_module, make_fsdp1, gives_inside=True)
    return [
        *(Row(group, n, partial(ask_ranks, try_module, make)) for n, make in makes.items()),
        Row(group, "FSDP1, the module inside", inside),
        *(Row(group, n, partial(ask_ranks, try_adapter, run)) for n, run in adapters.items()),
        *(Row(group, n, partial(ask_ranks, way)) for n, way in sharded_trainers.WAYS.items()),
    ]
