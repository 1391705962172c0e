"""A rank that is not there, or comes and goes: told in time, and the training goes on."""

from __future__ import annotations

import gc
import math
import os
import time
from pathlib import Path
from typing import Any

import torch

from altgrad import UpdateMonitor
from tests.distributed.sharded import fsdp
from tests.distributed.training import LIMIT, all_warnings, refused, sgd, train, warned
from tests.processes import run

SIZE = 2
LOST = (
    "UpdateMonitor stops observing after an error: rank 0 failed before step 1 of SGD: rank 0 of 2 "
    "did not hear from every other one in time; "
)
"""Told by every rank after a call in which rank 0 was alone."""

# One that is not there


def observe_alone(rank: int) -> dict[str, Any]:
    """A schedule that depends on the rank."""
    net = fsdp(SIZE)
    optimizer = sgd(net)
    start = time.monotonic()
    with UpdateMonitor(net, every_n_steps=lambda index: rank == 0 or index > 0).attach(optimizer):
        told = warned(net, optimizer, 3)
    return {"told": told, "seconds": time.monotonic() - start, "trained": True}


def test_a_schedule_that_depends_on_the_rank_is_caught_by_the_limit_and_training_goes_on() -> None:
    first, second = run(observe_alone, SIZE, collective=LIMIT)
    assert "did not hear from every other one in time" in first["told"][0]
    assert LIMIT / 2 <= first["seconds"] < LIMIT
    assert first["trained"]
    assert second["trained"]


def die(rank: int) -> dict[str, Any]:
    net = fsdp(SIZE)
    optimizer = sgd(net)
    monitor = UpdateMonitor(net).attach(optimizer)
    train(net, optimizer, 1)
    net(torch.arange(6)).backward()
    if rank == 1:
        os._exit(1)
    start = time.monotonic()
    with all_warnings() as told:
        optimizer.step()
    seconds = time.monotonic() - start
    return {"told": told, "seconds": seconds, "observing": monitor.is_observing}


def test_a_rank_that_is_killed_ends_the_observation_of_the_other() -> None:
    first, second = run(die, SIZE, collective=LIMIT, may_die=(1,))
    assert second is None
    assert "did not hear from every other one in time" in first["told"][0]
    assert first["seconds"] < LIMIT
    assert not first["observing"]


def attach_alone(rank: int) -> str:
    """Rank 1 does not attach, as one whose part of the mesh has no parameters."""
    net = fsdp(SIZE)
    return "" if rank else refused(lambda: UpdateMonitor(net).attach(sgd(net)))


def test_a_rank_that_does_not_attach_is_said_to_be_missing() -> None:
    first, _ = run(attach_alone, SIZE, collective=LIMIT)
    assert "rank 0 of 2 did not hear from every other one in time" in first
    assert "every process has to attach" in first


def checkpoint_alone(rank: int) -> dict[str, Any]:
    """Rank 0 alone takes the state, as a script does that saves in rank 0."""
    net = fsdp(SIZE)
    optimizer = sgd(net)
    monitor = UpdateMonitor(net).attach(optimizer)
    train(net, optimizer, 1)
    start = time.monotonic()
    with all_warnings() as told:
        state = None if rank else monitor.state_dict()
    told += warned(net, optimizer, 2)
    seconds = time.monotonic() - start
    return {"told": told, "state": state, "seconds": seconds, "observing": monitor.is_observing}


def test_a_checkpoint_of_one_rank_alone_is_told_by_every_rank_and_ends_neither() -> None:
    first, second = run(checkpoint_alone, SIZE, collective=LIMIT)
    assert "state_dict() was not called on every rank" in first["told"][0]
    assert first["state"]["ever_moved"] == {}
    assert first["state"]["scales"]
    assert first["told"][1] == second["told"][0]
    assert [len(each["told"]) for each in (first, second)] == [2, 1]
    for each in (first, second):
        assert each["told"][-1].startswith(LOST)
        assert each["seconds"] < 0.9 * LIMIT  # rank 0 is not waited for twice
        assert not each["observing"]


def octaves_alone(rank: int) -> dict[str, Any]:
    net = fsdp(SIZE)
    optimizer = sgd(net)
    monitor = UpdateMonitor(net)
    before = refused(monitor.weight_octaves)
    monitor.attach(optimizer)
    train(net, optimizer, 1)
    together = monitor.weight_octaves().counts
    start = time.monotonic()
    alone = "" if rank else refused(monitor.weight_octaves)
    told = warned(net, optimizer, 2)
    return {
        "before": before,
        "together": sum(together),
        "alone": alone,
        "told": told,
        "observing": monitor.is_observing,
        "seconds": time.monotonic() - start,
    }


def test_weight_octaves_on_one_rank_alone_are_told_by_every_rank_and_end_neither() -> None:
    first, second = run(octaves_alone, SIZE, collective=LIMIT)
    assert first["together"] == second["together"] > 0
    assert "attach() in each first" in first["before"]
    assert first["alone"].startswith("LostRankError: rank 0 of 2 did not hear")
    assert second["alone"] == ""
    for each in (first, second):
        assert [told[: len(LOST)] for told in each["told"]] == [LOST]
        assert not each["observing"]
        assert each["seconds"] < 0.9 * LIMIT


def two_monitors(rank: int) -> dict[str, Any]:
    """Each rank observes by one of them only."""
    net = fsdp(SIZE)
    optimizer = sgd(net)
    monitors = [
        UpdateMonitor(
            net,
            formats=formats,
            every_n_steps=lambda index, place=place: index > 0 or place != rank,
        ).attach(optimizer)
        for place, formats in enumerate(["bf16", ["fp16", "bf16", "e4m3fn"]])
    ]
    net(torch.arange(6)).backward()
    with all_warnings() as told:
        optimizer.step()
    return {"told": told, "observing": [each.is_observing for each in monitors]}


def test_monitors_do_not_hear_each_other() -> None:
    first, second = run(two_monitors, SIZE, collective=LIMIT)
    assert first["observing"] == [True, False]
    assert second["observing"] == [False, True]
    for each in (first, second):
        assert len(each["told"]) == 1
        assert "did not hear from every other one" in each["told"][0]


# One that comes again


def lost_and_found(rank: int) -> dict[str, Any]:
    """A monitor that was lost by a schedule, and one after it; one that waited alone before."""
    net = fsdp(SIZE)
    optimizer = sgd(net)
    alone = refused(lambda: UpdateMonitor(net).attach(optimizer)) if rank == 0 else ""
    torch.distributed.barrier()
    with UpdateMonitor(net, every_n_steps=lambda index: index > 0 or rank == 0) as lost:
        lost.attach(optimizer)
        told = warned(net, optimizer, 2)
    records: list[int] = []
    with UpdateMonitor(net, lambda r: records.append(r.index), strict=True) as found:
        found.attach(optimizer)
        train(net, optimizer, 2)
    groups = torch.distributed.new_group()
    names = torch.distributed.distributed_c10d._world.pg_names[groups]  # torch has no public name
    torch.distributed.barrier()  # one that ended now would break the group that others still make
    return {"alone": alone, "told": told, "records": records, "name": names}


def test_after_a_lost_rank_another_monitor_can_be_attached() -> None:
    first, second = run(lost_and_found, SIZE, collective=LIMIT)
    assert first["alone"].startswith("LostRankError: rank 0 of 2 did not hear")
    for each in (first, second):
        assert any("did not hear from every other one" in told for told in each["told"])
        assert each["records"] == [0, 1]
    assert first["name"] == second["name"]  # groups of the training are counted as without it


def in_two_groups(rank: int, folder: str) -> list[dict[str, float]]:
    """A process group is taken down, and another one made, each with a monitor of its own."""
    seen = []
    for number in range(2):
        net = fsdp(SIZE)
        optimizer = sgd(net)
        with UpdateMonitor(net, formats="bf16", strict=True).attach(optimizer) as monitor:
            train(net, optimizer, 1)
        seen.append(
            {name: each["kept_update_ratio/bf16"] for name, each in monitor.latest.layers.items()}
        )
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/{number}", rank=rank, world_size=SIZE
        )
        torch.distributed.barrier()  # one that ended now would break what others still make
    return seen


def test_a_second_process_group_is_another_one(tmp_path) -> None:
    first, second = run(in_two_groups, SIZE, str(tmp_path))
    assert first == second
    assert first[0] == first[1]
    assert any(math.isfinite(kept) for kept in first[0].values())


def many(rank: int) -> list[int]:
    """Open files after each of some monitors in turn."""
    net = fsdp(SIZE)
    optimizer = sgd(net)
    left = []
    for _ in range(4):
        with UpdateMonitor(net, strict=True).attach(optimizer) as monitor:
            train(net, optimizer, 1)
        del monitor
        gc.collect()
        torch.distributed.barrier()
        left.append(len([*Path("/dev/fd").iterdir()]))
    return left


def test_monitors_that_are_gone_leave_no_sockets() -> None:
    for left in run(many, SIZE):
        assert left[1:] == left[:1] * 3
