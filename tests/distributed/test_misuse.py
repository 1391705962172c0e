"""What does not fit together is told in time, by name, and ends neither process nor training."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from altgrad import UpdateMonitor
from tests.distributed.sharded import Net, fsdp
from tests.distributed.test_agreement import sgd, warned
from tests.distributed.test_exactness import train
from tests.processes import run

SIZE = 2
LIMIT = 6.0  # seconds, of the group that trains; those that observe wait for half of it


def refused(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:  # noqa: BLE001 - whichever it is
        return f"{type(error).__name__}: {error}"
    return ""


# Of different settings, optimizers, states


def with_settings(**settings: Any) -> str:
    net = fsdp(SIZE)
    return refused(lambda: UpdateMonitor(net, **settings).attach(sgd(net)))


def different(rank: int) -> dict[str, str]:
    scaling = "tensor" if rank else "channel"
    return {
        "scaling": with_settings(scaling=scaling),
        "seed": with_settings(seed=rank),
        "budget": with_settings(overhead_budget=0.1 * (rank + 1)),
        "formats": with_settings(formats=["bf16", "e5m2"][: rank + 1]),
        "max_elements": with_settings(max_elements=100 + rank),
        "optimizers": different_optimizers(rank),
        "state": different_states(rank),
    }


def different_optimizers(rank: int) -> str:
    """Only parameters of which something lies here, as some codebases choose them."""
    net = fsdp(SIZE)
    filled = [p for p in net.parameters() if p.to_local().numel()]
    return refused(lambda: UpdateMonitor(net).attach(torch.optim.SGD(filled, lr=0.1)))


def different_states(rank: int) -> str:
    """Rank 0 alone loads a checkpoint."""
    net = fsdp(SIZE)
    optimizer = sgd(net)
    with UpdateMonitor(net).attach(optimizer) as monitor:
        train(net, optimizer, 1)
        state = monitor.state_dict()
    again = UpdateMonitor(net)
    if rank == 0:
        again.load_state_dict(state)
    return refused(lambda: again.attach(optimizer))


@pytest.fixture(scope="module")
def told_of_different() -> list[dict[str, str]]:
    return run(different, SIZE)


@pytest.mark.parametrize(
    ("what", "kind", "named"),
    [
        ("scaling", "settings", "scaling='tensor'"),
        ("seed", "settings", "seed=1"),
        ("budget", "settings", "overhead_budget=0.2"),
        ("formats", "settings", "formats="),
        ("max_elements", "layers", "max_elements=101"),
        ("optimizers", "optimizers", "head.bias"),
        ("state", "state", "scales"),
    ],
)
def test_what_is_not_alike_is_refused_by_name(told_of_different, what, kind, named) -> None:
    for each in told_of_different:
        assert each[what].startswith(f"ValueError: rank 1 has other {kind} than rank 0")
        assert named in each[what]


# Of different steps


def in_turn(rank: int) -> dict[str, Any]:
    """Two optimizers in turn, and a schedule that lets each process see another one."""
    net = fsdp(SIZE)
    large = torch.optim.SGD(net.up.parameters(), lr=1e-2)
    small = torch.optim.SGD([*net.five.parameters(), *net.norm.parameters()], lr=1e-2)
    asked: list[int] = []

    def every(_: int) -> bool:
        asked.append(1)
        return (len(asked) + rank) % 2 == 0

    monitor = UpdateMonitor(net, every_n_steps=every).attach(large, small)
    net(torch.arange(6)).backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            large.step()
            small.step()
    return {"told": [str(each.message) for each in caught], "observing": monitor.is_observing}


def two_monitors(rank: int) -> dict[str, Any]:
    """Each process observes by one of them only."""
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
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    told = [str(each.message) for each in caught]
    return {"told": told, "observing": [each.is_observing for each in monitors]}


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


def other_calls(rank: int) -> dict[str, Any]:
    """One asks for the weights while the other takes a checkpoint."""
    net = fsdp(SIZE)
    optimizer = sgd(net)
    monitor = UpdateMonitor(net, strict=True).attach(optimizer)
    train(net, optimizer, 1)
    call = monitor.state_dict if rank else monitor.weight_octaves
    return {"told": refused(call), "next": refused(lambda: train(net, optimizer, 1))}


def test_processes_in_steps_of_different_optimizers_notice_it() -> None:
    first, second = run(in_turn, SIZE, collective=LIMIT)
    assert len(first["told"]) == 1
    assert "observe different steps or layers" in first["told"][0]
    assert second["told"] == []
    assert not first["observing"]
    assert not second["observing"]


def test_monitors_do_not_hear_each_other() -> None:
    first, second = run(two_monitors, SIZE, collective=LIMIT)
    assert first["observing"] == [True, False]
    assert second["observing"] == [False, True]
    for each in (first, second):
        assert len(each["told"]) == 1
        assert "did not hear from every other one" in each["told"][0]


def test_weight_octaves_in_one_process_alone_ends_neither() -> None:
    first, second = run(octaves_alone, SIZE, collective=LIMIT)
    assert first["together"] == second["together"] > 0
    assert "attach() in each first" in first["before"]
    assert first["alone"].startswith("LostRankError: rank 0 of 2 did not hear")
    assert second["alone"] == ""
    for each in (first, second):
        assert not each["observing"]
        assert each["seconds"] < 0.9 * LIMIT


def test_processes_in_different_calls_name_both() -> None:
    first, second = run(other_calls, SIZE, collective=LIMIT)
    assert "rank 1 is in state_dict() while rank 0 is in weight_octaves()" in first["told"]
    assert "rank 0 is in weight_octaves() while rank 1 is in state_dict()" in second["told"]
    assert "LostRankError: rank 1 is in state_dict()" in first["next"]
    assert "FaultElsewhereError: rank 0 has failed" in second["next"]


# Another try


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
    names = torch.distributed.distributed_c10d._world.pg_names[groups]
    return {"alone": alone, "told": told, "records": records, "name": names}


def test_after_a_lost_process_another_monitor_can_be_attached() -> None:
    first, second = run(lost_and_found, SIZE, collective=LIMIT)
    assert first["alone"].startswith("LostRankError: rank 0 of 2 did not hear")
    for each in (first, second):
        assert any("did not hear from every other one" in told for told in each["told"])
        assert each["records"] == [0, 1]
    assert first["name"] == second["name"]  # groups of the training are counted as without it


def second_optimizer(rank: int) -> dict[str, Any]:
    """Its refusal leaves the first one be."""
    net = fsdp(SIZE)
    optimizer = sgd(net)
    other = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    monitor = UpdateMonitor(net, strict=True).attach(optimizer)
    why = refused(lambda: monitor.attach(other))
    train(net, optimizer, 1)
    return {"why": why, "layers": len(monitor.latest.layers)}


def test_an_optimizer_that_is_refused_leaves_the_first_attached() -> None:
    for each in run(second_optimizer, SIZE):
        assert "steps none of the observed parameters" in each["why"]
        assert each["layers"] > 5


def fault_at_the_end(rank: int, *, strict: bool) -> dict[str, Any]:
    """Of on_record, at the last observed step."""
    net = fsdp(SIZE)
    optimizer = sgd(net)

    def fails(record: Any) -> None:
        if rank == 1:
            raise ArithmeticError("at the end")

    monitor = UpdateMonitor(net, fails, strict=strict).attach(optimizer)
    train(net, optimizer, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        raised = refused(monitor.detach)
    return {"raised": raised, "told": [str(each.message) for each in caught]}


def fault_at_the_end_in_both_ways(rank: int) -> list[dict[str, Any]]:
    return [fault_at_the_end(rank, strict=strict) for strict in (False, True)]


def test_a_fault_at_the_last_step_is_told_by_whom_it_befell() -> None:
    first, second = run(fault_at_the_end_in_both_ways, SIZE)
    assert [each["told"] for each in first] == [[], []]
    assert [each["raised"] for each in first] == ["", ""]
    assert "ArithmeticError('at the end')" in second[0]["told"][0]
    assert second[0]["raised"] == ""
    assert second[1]["raised"] == "ArithmeticError: at the end"


# Of copies that are none


class Expert(nn.Module):
    """A layer that is shared, and one of which each process has its own."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))  # a copy
        torch.manual_seed(seed)
        self.expert = nn.Linear(8, 8, bias=False)

    def forward(self, rows):
        return (self.expert(self.shared(rows)) * self.scale).square().mean()


def experts(rank: int) -> dict[str, Any]:
    net = Expert(rank)
    fully_shard(net.shared, mesh=init_device_mesh("cpu", (SIZE,)))
    optimizer = sgd(net)
    told: list[str] = []
    monitor = UpdateMonitor(net, tell=told.append, strict=True).attach(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.randn(4, 8, generator=torch.Generator().manual_seed(1))).backward()
        optimizer.step()
    return {"told": told, "layers": sorted(monitor.latest.layers)}


def halves(rank: int, *, alike: bool) -> dict[str, Any]:
    """Four processes, of which each half shares a model by itself."""
    meshes = [DeviceMesh("cpu", [first, first + 1]) for first in (0, 2)]
    net = Net()
    with torch.no_grad():
        for parameter in net.parameters():
            if not alike and rank >= 2:
                parameter.mul_(0.5)
    net = fully_shard(net, mesh=meshes[rank // 2])
    optimizer = sgd(net)
    told: list[str] = []
    monitor = UpdateMonitor(net, tell=told.append, strict=True).attach(optimizer)
    train(net, optimizer, 1)
    layers = [] if monitor.latest is None else sorted(monitor.latest.layers)
    return {"told": told, "layers": layers}


def both_halves(rank: int) -> dict[str, Any]:
    return {"alike": halves(rank, alike=True), "different": halves(rank, alike=False)}


def test_layers_of_which_each_process_has_its_own_are_left_out_by_name() -> None:
    first, second = run(experts, SIZE)
    assert first["layers"] == second["layers"] == ["scale", "shared.bias", "shared.weight"]
    assert first["told"] == [each for each in first["told"] if "leaves out expert.weight" in each]
    assert len(first["told"]) == 1
    assert second["told"] == []


def test_another_model_on_the_other_half_is_not_taken_for_a_copy() -> None:
    seen = run(both_halves, 4)
    for each in seen:
        assert "up.weight" in each["alike"]["layers"]
        assert "up.weight" not in each["different"]["layers"]
    assert seen[0]["alike"]["told"] == []
    assert "not all processes have the same values" in seen[0]["different"]["told"][0]


# Of what is left behind


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
