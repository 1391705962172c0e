"""What processes agree on: decisions, faults, refusals; and what ends them when they cannot."""

from __future__ import annotations

import math
import os
import time
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from altgrad import StepRecord, UpdateMonitor
from tests.distributed.sharded import fsdp
from tests.distributed.test_exactness import train
from tests.processes import run

SIZE = 2


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=1e-2)


def warned(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(net, optimizer, steps)
    told = [(each.filename, str(each.message)) for each in caught]
    return [message for file, message in told if "altgrad" in file or "Obs" in message]


# Faults


def fail_in(place: str, rank: int) -> dict[str, Any]:
    """Where rank 1 fails at the second step, what each says of it and how far it got."""
    net = fsdp(SIZE)
    optimizer = sgd(net)
    seen: list[int] = []

    def fails(index: int) -> None:
        if rank == 1 and index == 1:
            raise ArithmeticError(f"in {place}")

    def on_record(record: StepRecord) -> None:
        seen.append(record.index)
        if place == "on_record":
            fails(record.index)

    def every(index: int) -> bool:
        if place == "every_n_steps":
            fails(index)
        return True

    monitor = UpdateMonitor(net, on_record, every_n_steps=every).attach(optimizer)
    if place == "measuring":
        measure = monitor._measurer.measure_batch
        monitor._measurer.measure_batch = lambda batch: (fails(len(seen)), measure(batch))[1]
    if place == "copying":
        take = monitor._observer._copy
        monitor._observer._copy = lambda *hooks: (fails(len(seen)), take(*hooks))[1]
    if place == "scales":
        monitor._sharded._amax_here = broken(monitor._sharded._amax_here, lambda: fails(len(seen)))
        train(net, optimizer, 1)
        monitor._scale_state._steps_left = 0
    told = warned(net, optimizer, 4)
    return {"seen": seen, "told": told, "observing": monitor.is_observing}


def broken(function: Any, fails: Any) -> Any:
    def call(*arguments: Any) -> Any:
        fails()
        return function(*arguments)

    return call


PLACES = ["measuring", "copying", "every_n_steps", "scales", "on_record"]


def agree(rank: int) -> dict[str, Any]:
    found = {place: fail_in(place, rank) for place in PLACES}
    return found | {
        "strict": strict(rank),
        "budget": budget(rank),
        "missing": missing_gradient(rank),
        "layers": different_layers(rank),
        "problem": problem_of_one(rank),
        "partial": partial(rank),
        "replica": replica(rank),
        "nvfp4": refused(lambda net: UpdateMonitor(net, formats="nvfp4").attach(sgd(net))),
        "skipped": skipped(rank),
    }


def refused(attach: Any) -> str:
    try:
        attach(fsdp(SIZE))
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def strict(rank: int) -> str:
    net = fsdp(SIZE)
    optimizer = sgd(net)

    def fails(record: StepRecord) -> None:
        if rank == 1:
            raise ArithmeticError("of one")

    monitor = UpdateMonitor(net, fails, strict=True).attach(optimizer)
    try:
        train(net, optimizer, 3)
    except (ArithmeticError, RuntimeError) as error:
        return f"{monitor.latest.index} {error!r}"
    return ""


def budget(rank: int) -> dict[str, Any]:
    """One process is slow at observing; both observe the same steps."""
    net = fsdp(SIZE)
    optimizer = sgd(net)
    records: list[StepRecord] = []
    watched = UpdateMonitor(net, records.append, overhead_budget=0.5, strict=True)
    measure = watched._measurer.measure_batch
    watched._measurer.measure_batch = lambda batch: (time.sleep(0.05 * rank), measure(batch))[1]
    with watched.attach(optimizer) as monitor:
        train(net, optimizer, 30)
        state = monitor.state_dict()["budgets"]
    return {
        "steps": [record.index for record in records],
        "seconds": [(record.own_seconds, record.training_seconds) for record in records],
        "state": state,
    }


def missing_gradient(rank: int) -> list[str]:
    """Of a layer in one process only."""
    net = fsdp(SIZE)
    optimizer = sgd(net)
    if rank == 1:
        optimizer.register_step_pre_hook(lambda *_: setattr(net.norm.weight, "grad", None))
    with UpdateMonitor(net).attach(optimizer):
        return warned(net, optimizer, 2)


def different_layers(rank: int) -> str:
    """As stages of a pipeline have them."""
    net = fsdp(SIZE)
    stage = [(n, p) for n, p in net.named_parameters() if n.startswith(("up", "down")[rank])]
    optimizer = torch.optim.SGD([p for _, p in stage], lr=0.1)
    try:
        UpdateMonitor(stage).attach(optimizer)
    except ValueError as error:
        return str(error)
    return ""


def problem_of_one(rank: int) -> str:
    """The other would wait for it."""
    net = fsdp(SIZE)
    other = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    return refused(lambda _: UpdateMonitor(net).attach(other if rank else sgd(net)))


def partial(rank: int) -> str:
    from torch.distributed.tensor import DTensor, Partial

    mesh = init_device_mesh("cpu", (SIZE,))
    parameter = DTensor.from_local(torch.ones(3), mesh, [Partial()]).requires_grad_()
    try:
        UpdateMonitor([("bias", parameter)]).attach(torch.optim.SGD([parameter], lr=0.1))
    except ValueError as error:
        return str(error)
    return ""


def replica(rank: int) -> dict[str, Any]:
    """Under DistributedDataParallel."""
    net = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
    optimizer = sgd(net)
    monitor = UpdateMonitor(net, strict=True).attach(optimizer)
    net(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    names = None if monitor.latest is None else [*monitor.latest.layers]
    return {"hooks": len(optimizer._optimizer_step_pre_hooks), "names": names}


def skipped(rank: int) -> dict[str, int]:
    """Steps that were none: without gradients, and with a learning rate of 0."""
    net = fsdp(SIZE)
    optimizer = sgd(net)
    with UpdateMonitor(net, strict=True).attach(optimizer) as monitor:
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.0
        train(net, optimizer, 2)
        assert monitor.latest is None
        return dict(monitor.skipped)


@pytest.fixture(scope="module")
def agreed() -> list[dict[str, Any]]:
    return run(agree, SIZE)


@pytest.mark.parametrize("place", PLACES)
def test_a_fault_of_one_ends_the_observation_of_all_and_is_told_once(agreed, place: str) -> None:
    first, second = (each[place] for each in agreed)
    assert first["seen"] == second["seen"]
    assert first["seen"] == ([0, 1] if place == "on_record" else [0])
    assert first["told"] == []
    assert len(second["told"]) == 1
    assert f"ArithmeticError('in {place}')" in second["told"][0]
    assert not first["observing"]
    assert not second["observing"]


def test_strict_raises_in_all(agreed) -> None:
    assert agreed[1]["strict"] == "0 ArithmeticError('of one')"
    assert agreed[0]["strict"].startswith("0 FaultElsewhereError('rank 1 has failed")


def test_the_budget_is_of_the_slowest_and_the_same_for_all(agreed) -> None:
    first, second = (each["budget"] for each in agreed)
    assert 1 < len(first["steps"]) < 20
    assert repr(first) == repr(second)
    assert max(own for own, _ in first["seconds"] if not math.isnan(own)) > 0.04


def test_elements_that_nobody_measures_are_noticed(agreed) -> None:
    assert len(agreed[0]["missing"]) == 1
    assert "norm.weight was measured in 32 elements" in agreed[0]["missing"][0]
    assert "has 64" in agreed[0]["missing"][0]
    assert agreed[1]["missing"] == []


def test_processes_with_other_layers_are_refused_by_name(agreed) -> None:
    for each in agreed:
        assert 'rank 1 has other layers than rank 0: ["down.weight (64, 48)' in each["layers"]
        assert 'of its 2, where rank 0 has ["up.weight (48, 64)' in each["layers"]
        assert "stages of a pipeline" in each["layers"]


def test_where_one_cannot_observe_none_does(agreed) -> None:
    assert agreed[1]["problem"].startswith("SGD steps none of the observed parameters")
    assert agreed[0]["problem"].startswith("rank 1 cannot observe this run: ValueError('SGD steps")


def test_partial_tensors_and_scales_of_whole_tensors_are_refused(agreed) -> None:
    for each in agreed:
        assert each["partial"].startswith("bias is placed as (Partial(sum),)")
        assert "redistribute it" in each["partial"]
        assert "leave out 'nvfp4'" in each["nvfp4"]


def test_of_replicas_the_first_process_observes(agreed) -> None:
    assert agreed[0]["replica"] == {"hooks": 1, "names": ["weight", "bias"]}
    assert agreed[1]["replica"] == {"hooks": 0, "names": None}


def test_steps_that_were_none_are_counted_alike(agreed) -> None:
    for each in agreed:
        assert each["skipped"] == {"no gradients": 1, "learning rate 0": 2}


# Processes that do not do the same


LIMIT = 6.0  # seconds, of the group that trains; those that observe wait for half of it


def observe_alone(rank: int) -> dict[str, Any]:
    """A schedule that depends on the rank."""
    net = fsdp(SIZE)
    optimizer = sgd(net)
    start = time.monotonic()
    with UpdateMonitor(net, every_n_steps=lambda index: rank == 0 or index > 0).attach(optimizer):
        told = warned(net, optimizer, 3)
    return {"told": told, "seconds": time.monotonic() - start, "trained": True}


def other_steps(rank: int) -> list[str]:
    """Schedules that make the processes meet at different steps, where training does not wait."""
    net = fsdp(SIZE)
    optimizer = sgd(net)
    net(torch.arange(6)).backward()
    monitor = UpdateMonitor(net, every_n_steps=lambda index: index == rank).attach(optimizer)
    with monitor, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.step()
    return [str(each.message) for each in caught]


def die(rank: int) -> dict[str, Any]:
    net = fsdp(SIZE)
    optimizer = sgd(net)
    monitor = UpdateMonitor(net).attach(optimizer)
    train(net, optimizer, 1)
    net(torch.arange(6)).backward()
    if rank == 1:
        os._exit(1)
    start = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    seconds = time.monotonic() - start
    told = [str(each.message) for each in caught]
    return {"told": told, "seconds": seconds, "observing": monitor.is_observing}


def attach_alone(rank: int) -> str:
    """Rank 1 does not attach, as one whose part of the mesh has no parameters."""
    return "" if rank else refused(lambda net: UpdateMonitor(net).attach(sgd(net)))


def checkpoint_alone(rank: int) -> dict[str, Any]:
    """Rank 0 alone takes the state, as a script does that saves in rank 0."""
    net = fsdp(SIZE)
    optimizer = sgd(net)
    monitor = UpdateMonitor(net).attach(optimizer)
    train(net, optimizer, 1)
    start = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = None if rank else monitor.state_dict()
    told = [str(each.message) for each in caught] + warned(net, optimizer, 2)
    seconds = time.monotonic() - start
    return {"told": told, "state": state, "seconds": seconds, "observing": monitor.is_observing}


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
    return seen


def test_a_schedule_that_depends_on_the_rank_is_caught_by_the_limit_and_training_goes_on() -> None:
    first, second = run(observe_alone, SIZE, collective=LIMIT)
    assert "did not hear from every other one in time" in first["told"][0]
    assert LIMIT / 2 <= first["seconds"] < LIMIT
    assert first["trained"]
    assert second["trained"]


def test_processes_that_meet_at_different_steps_notice_it() -> None:
    first, second = run(other_steps, SIZE)
    assert len(first) == 1
    assert "observe different steps or layers, this one step 0" in first[0]
    assert second == []


def test_a_process_that_is_killed_ends_the_observation_of_the_other() -> None:
    first, second = run(die, SIZE, collective=LIMIT, may_die=(1,))
    assert second is None
    assert "did not hear from every other one in time" in first["told"][0]
    assert first["seconds"] < LIMIT
    assert not first["observing"]


def test_a_process_that_does_not_attach_is_said_to_be_missing() -> None:
    first, _ = run(attach_alone, SIZE, collective=LIMIT)
    assert "rank 0 of 2 did not hear from every other one in time" in first
    assert "every process has to attach" in first


def test_a_checkpoint_of_one_process_alone_is_told_and_ends_neither() -> None:
    first, second = run(checkpoint_alone, SIZE, collective=LIMIT)
    assert "state_dict() was not called in every process" in first["told"][0]
    assert first["state"]["ever_moved"] == {}
    assert first["state"]["scales"]
    for each in (first, second):
        assert each["seconds"] < 0.9 * LIMIT  # rank 0 is not waited for twice
        assert not each["observing"]


def test_a_second_process_group_is_another_one(tmp_path) -> None:
    first, second = run(in_two_groups, SIZE, str(tmp_path))
    assert first == second
    assert first[0] == first[1]
    assert any(math.isfinite(kept) for kept in first[0].values())
