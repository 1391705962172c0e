"""A fault of one process in a monitor: it ends the observation of all, and is told once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from altgrad import StepRecord, UpdateMonitor
from tests.distributed.sharded import fsdp
from tests.distributed.training import all_warnings, refused, sgd, train, warned

SIZE = 2

# Of a step


def fail_in(rank: int, place: str) -> dict[str, Any]:
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
        measurer = monitor._measuring._measurer
        measure = measurer.measure_batch
        measurer.measure_batch = lambda batch: (fails(len(seen)), measure(batch))[1]
    if place == "copying":
        take = monitor._observer._copy
        monitor._observer._copy = lambda *hooks: (fails(len(seen)), take(*hooks))[1]
    if place == "scales":
        monitor._sharded._amax_here = broken(monitor._sharded._amax_here, lambda: fails(len(seen)))
        train(net, optimizer, 1)
        monitor._scale_state._steps_left = 0
    told = warned(net, optimizer, 4)
    return {"seen": seen, "told": told, "observing": monitor.is_observing}


def broken(function: Callable[..., Any], fails: Callable[[], None]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        fails()
        return function(*arguments)

    return call


@pytest.mark.parametrize("place", ["measuring", "copying", "every_n_steps", "scales", "on_record"])
def test_a_fault_of_one_ends_the_observation_of_all_and_is_told_once(two, place: str) -> None:
    first, second = two(fail_in, place)
    assert first["seen"] == second["seen"]
    assert first["seen"] == ([0, 1] if place == "on_record" else [0])
    assert first["told"] == []
    assert len(second["told"]) == 1
    assert f"ArithmeticError('in {place}')" in second["told"][0]
    assert not first["observing"]
    assert not second["observing"]


def strict(rank: int) -> str:
    net = fsdp(SIZE)
    optimizer = sgd(net)

    def fails(record: StepRecord) -> None:
        if rank == 1:
            raise ArithmeticError("of one")

    monitor = UpdateMonitor(net, fails, strict=True).attach(optimizer)
    told = refused(lambda: train(net, optimizer, 3))
    return f"{monitor.latest.index} {told}"


def test_strict_raises_in_all(two) -> None:
    first, second = two(strict)
    assert second == "0 ArithmeticError: of one"
    assert first.startswith("0 FaultElsewhereError: rank 1 has failed")


def missing_gradient(rank: int) -> list[str]:
    """Of a layer in one process only."""
    net = fsdp(SIZE)
    optimizer = sgd(net)
    if rank == 1:
        optimizer.register_step_pre_hook(lambda *_: setattr(net.norm.weight, "grad", None))
    with UpdateMonitor(net).attach(optimizer):
        return warned(net, optimizer, 2)


def test_elements_that_nobody_measures_are_noticed(two) -> None:
    first, second = two(missing_gradient)
    assert len(first) == 1
    assert "norm.weight was measured in 32 elements" in first[0]
    assert "has 64" in first[0]
    assert second == []


# After the last step


def fault_at_the_end(rank: int, *, strict: bool) -> dict[str, Any]:
    """Of on_record, at the last observed step."""
    net = fsdp(SIZE)
    optimizer = sgd(net)

    def fails(record: Any) -> None:
        if rank == 1:
            raise ArithmeticError("at the end")

    monitor = UpdateMonitor(net, fails, strict=strict).attach(optimizer)
    train(net, optimizer, 1)
    with all_warnings() as told:
        raised = refused(monitor.detach)
    return {"raised": raised, "told": told}


def fault_at_the_end_in_both_ways(rank: int) -> list[dict[str, Any]]:
    return [fault_at_the_end(rank, strict=strict) for strict in (False, True)]


def test_a_fault_at_the_last_step_is_told_by_whom_it_befell(two) -> None:
    first, second = two(fault_at_the_end_in_both_ways)
    assert [each["told"] for each in first] == [[], []]
    assert [each["raised"] for each in first] == ["", ""]
    assert "ArithmeticError('at the end')" in second[0]["told"][0]
    assert second[0]["raised"] == ""
    assert second[1]["raised"] == "ArithmeticError: at the end"
