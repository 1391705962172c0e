"""A rank that is missing for a while or for good is reported in time, and training goes on."""

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
STOPS = "UpdateMonitor stops observing after an error: "
LOST = (
    "rank 0 failed before step 1 of SGD: rank 0 of 2 had no answer from at least one other rank "
    "within the time limit: "
)
"""The error of every rank in the step after a call in which rank 0 was alone."""

# Missing ranks


def observe_alone(rank: int) -> dict[str, Any]:
    """Observe by a schedule that depends on the rank."""
    net = fsdp(SIZE)
    optimizer = sgd(net)
    start = time.monotonic()
    with UpdateMonitor(net, every_n_steps=lambda index: rank == 0 or index > 0).attach(optimizer):
        told = warned(net, optimizer, 3)
    return {"told": told, "seconds": time.monotonic() - start, "trained": True}


def test_training_goes_on_after_a_schedule_that_depends_on_the_rank() -> None:
    first, second = run(observe_alone, SIZE, collective=LIMIT)
    assert "had no answer from at least one other rank" in first["told"][0]
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


def test_the_other_rank_stops_observing_if_a_rank_is_killed() -> None:
    first, second = run(die, SIZE, collective=LIMIT, may_die=(1,))
    assert second is None
    assert "had no answer from at least one other rank" in first["told"][0]
    assert first["seconds"] < LIMIT
    assert not first["observing"]


def attach_alone(rank: int) -> dict[str, Any]:
    """Attach on rank 0 alone; a rank without local parameters might not attach."""
    net = fsdp(SIZE)
    monitor = UpdateMonitor(net, strict=True)
    if rank:
        return {}
    told = refused(lambda: monitor.attach(sgd(net)))
    return {"told": told, "moved": monitor.state_dict()["ever_moved"]}


def test_a_rank_that_does_not_attach_is_reported_as_missing() -> None:
    first, _ = run(attach_alone, SIZE, collective=LIMIT)
    assert "rank 0 of 2 had no answer from at least one other rank" in first["told"]
    assert "every rank has to attach" in first["told"]
    assert first["moved"] == {}  # nobody is waited for


def checkpoint_alone(rank: int) -> dict[str, Any]:
    """Take the state on rank 0 alone, like a script that saves on rank 0."""
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


def test_every_rank_warns_about_a_checkpoint_on_one_rank_and_training_goes_on() -> None:
    first, second = run(checkpoint_alone, SIZE, collective=LIMIT)
    assert "state_dict() was not called on every rank" in first["told"][0]
    assert first["state"]["ever_moved"] == {}
    assert first["state"]["scales"]
    assert first["told"][1] == second["told"][0]
    assert [len(each["told"]) for each in (first, second)] == [2, 1]
    for each in (first, second):
        assert each["told"][-1].startswith(STOPS + LOST)
        assert each["seconds"] < 0.9 * LIMIT  # no rank waits for rank 0 twice
        assert not each["observing"]


def checkpoint_alone_if_strict(rank: int) -> dict[str, Any]:
    """Take the state on rank 0 alone before attach(), on both ranks, and on rank 0 alone."""
    net = fsdp(SIZE)
    optimizer = sgd(net)
    monitor = UpdateMonitor(net, strict=True)
    before = {} if rank else monitor.state_dict()["ever_moved"]
    monitor.attach(optimizer)
    train(net, optimizer, 1)
    moved = monitor.state_dict()["ever_moved"]
    together = {name: (shape, bits.tolist()) for name, (shape, bits) in moved.items()}
    start = time.monotonic()
    alone = "" if rank else refused(monitor.state_dict)
    step = refused(lambda: train(net, optimizer, 1))
    seconds = time.monotonic() - start
    return {
        "before": before,
        "together": together,
        "alone": alone,
        "step": step,
        "after": refused(lambda: train(net, optimizer, 2)),
        "observing": monitor.is_observing,
        "seconds": seconds,
    }


def test_every_rank_raises_the_error_of_a_checkpoint_on_one_rank_if_strict() -> None:
    first, second = run(checkpoint_alone_if_strict, SIZE, collective=LIMIT)
    assert first["before"] == {}
    assert first["together"] == second["together"] != {}
    assert first["alone"].startswith("LostRankError: rank 0 of 2 had no answer")
    assert second["alone"] == ""
    for each in (first, second):
        assert each["step"] == first["step"]
        assert each["step"].startswith(f"RankError: {LOST}")
        assert each["after"] == ""
        assert not each["observing"]
        assert each["seconds"] < 0.9 * LIMIT


def checkpoint_alone_in_a_callback(rank: int, strict: bool) -> dict[str, Any]:
    """Take the state in on_record, on rank 0 alone, at the first of three steps."""
    net = fsdp(SIZE)
    optimizer = sgd(net)

    def on_record(record: Any) -> None:
        if rank == 0 and record.index == 0:
            monitor.state_dict()

    monitor = UpdateMonitor(net, on_record, strict=strict).attach(optimizer)
    start = time.monotonic()
    with all_warnings() as told:
        steps = [refused(lambda: train(net, optimizer, 1)) for _ in range(3)]
    told = [each for each in told if "UpdateMonitor" in each]
    seconds = time.monotonic() - start
    return {"told": told, "steps": steps, "seconds": seconds, "observing": monitor.is_observing}


def test_every_rank_names_the_rank_that_called_alone_in_a_callback() -> None:
    first, second = run(checkpoint_alone_in_a_callback, SIZE, False, collective=LIMIT)
    assert "state_dict() was not called on every rank" in first["told"][0]
    assert [len(each["told"]) for each in (first, second)] == [2, 1]
    for each in (first, second):
        assert each["told"][-1].startswith(STOPS + LOST)
        assert each["steps"] == [""] * 3
        assert not each["observing"]
        assert each["seconds"] < 0.9 * LIMIT


def test_every_rank_raises_the_error_of_a_call_in_a_callback_of_one_rank_if_strict() -> None:
    first, second = run(checkpoint_alone_in_a_callback, SIZE, True, collective=LIMIT)
    lost = f"RankError: {LOST}"
    for each in (first, second):
        assert [told[: len(lost)] for told in each["steps"]] == ["", lost, ""]
        assert each["steps"] == first["steps"]
        assert each["told"] == []
        assert not each["observing"]
        assert each["seconds"] < 0.9 * LIMIT


def two_monitors(rank: int) -> dict[str, Any]:
    """Attach two monitors, of which each rank uses a different one."""
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


def test_monitors_do_not_share_collectives() -> None:
    first, second = run(two_monitors, SIZE, collective=LIMIT)
    assert first["observing"] == [True, False]
    assert second["observing"] == [False, True]
    for each in (first, second):
        assert len(each["told"]) == 1
        assert "had no answer from at least one other rank" in each["told"][0]


# Ranks that return


def lost_and_found(rank: int) -> dict[str, Any]:
    """Attach on rank 0 alone, then lose a monitor by its schedule, then use another monitor."""
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
    torch.distributed.barrier()  # no rank may end while others create a group
    return {"alone": alone, "told": told, "records": records, "name": names}


def test_after_a_lost_rank_another_monitor_can_be_attached() -> None:
    first, second = run(lost_and_found, SIZE, collective=LIMIT)
    assert first["alone"].startswith("LostRankError: rank 0 of 2 had no answer")
    for each in (first, second):
        assert any("had no answer from at least one other rank" in told for told in each["told"])
        assert each["records"] == [0, 1]
    assert first["name"] == second["name"]  # the monitor changes no group names of the training


def in_two_groups(rank: int, folder: str) -> list[dict[str, float]]:
    """Destroy the process group and create another one, each with a new monitor."""
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
        torch.distributed.barrier()  # no rank may end while others create a group
    return seen


def test_a_monitor_works_after_the_process_group_is_replaced(tmp_path) -> None:
    first, second = run(in_two_groups, SIZE, str(tmp_path))
    assert first == second
    assert first[0] == first[1]
    assert any(math.isfinite(kept) for kept in first[0].values())


def many(rank: int) -> list[int]:
    """Count the open files after each of four monitors in turn."""
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


def test_deleted_monitors_leave_no_open_sockets() -> None:
    for left in run(many, SIZE):
        assert left[1:] == left[:1] * 3
