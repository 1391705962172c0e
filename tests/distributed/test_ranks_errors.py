"""An error on one rank ends the observation on every rank, and every rank names the failed one."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pytest
import torch

from altgrad import StepRecord, UpdateMonitor
from altgrad.distributed import together
from altgrad.measurement.measurer import Measurer
from altgrad.observation.observer import RankError
from altgrad.observation.snapshots import Snapshots
from tests.distributed.sharded import fsdp
from tests.distributed.training import LIMIT, all_warnings, refused, sgd, train, warned
from tests.processes import run

SIZE = 2
STOPS = "UpdateMonitor stops observing after an error: "
GOES_ON = ". Training goes on; strict=True would raise it"
PLACE = re.compile(r" in (\w+), \S+test_ranks_errors\.py:\d+")


def plain(told: str) -> str:
    """Return a warning without the file and line of the error."""
    return PLACE.sub(r" in \1", told)


# During a step


def before(owner: object, name: str, fails: Callable[[], object]) -> AbstractContextManager[Any]:
    """Replace a function by one that first calls `fails`."""
    function = getattr(owner, name)

    def call(*arguments: Any, **named: Any) -> Any:
        fails()
        return function(*arguments, **named)

    return mock.patch.object(owner, name, call)


PLACES = {
    "measuring": (Measurer, "measure_batch"),
    "copying": (Snapshots, "take"),
    "scales": (together, "compute_layer_amaxes"),
}


def due_for_scales(monitor: UpdateMonitor) -> None:
    """Restore a state by which all scales are renewed at the second observed step."""
    net = fsdp(SIZE)
    optimizer = sgd(net)
    with UpdateMonitor(net, strict=True).attach(optimizer) as another:
        train(net, optimizer, 1)
    state = another.state_dict()
    state["scales"]["steps_left"] = 1
    monitor.load_state_dict(state)


def fail_in(rank: int, place: str, failing: tuple[int, ...]) -> dict[str, Any]:
    """Fail on some ranks at the second step; return observed steps and warnings."""
    net = fsdp(SIZE)
    optimizer = sgd(net)
    seen: list[int] = []

    def fails() -> None:
        if rank in failing and len(seen) == 1:
            raise ArithmeticError(f"{place} of {rank}")

    def on_record(record: StepRecord) -> None:
        if place == "on_record":
            fails()
        seen.append(record.index)

    def every(index: int) -> bool:
        if place == "every_n_steps":
            fails()
        return True

    monitor = UpdateMonitor(net, on_record, every_n_steps=every)
    if place == "scales":
        due_for_scales(monitor)
    monitor.attach(optimizer)
    with before(*PLACES.get(place, (together, "few")), fails):
        told = warned(net, optimizer, 4)
    return {"seen": seen, "told": told, "observing": monitor.is_observing}


@pytest.mark.parametrize("place", ["measuring", "copying", "every_n_steps", "scales", "on_record"])
def test_an_error_on_one_rank_ends_the_observation_and_every_rank_names_it(two, place: str) -> None:
    step = (
        2 if place == "on_record" else 1
    )  # step 1 is complete on other ranks: they learn of the error in step 2
    when = "in" if place in ("measuring", "copying") else "before"
    told = f"rank 1 failed {when} step {step} of SGD: ArithmeticError('{place} of 1') in fails"
    first, second = two(fail_in, place, (1,))
    assert first["seen"] == ([0, 1] if place == "on_record" else [0])
    assert second["seen"] == [0]
    for each in (first, second):
        assert [*map(plain, each["told"])] == [STOPS + told + GOES_ON]
        assert each["told"] == first["told"]
        assert not each["observing"]


def test_every_rank_reports_the_errors_of_both_ranks(two) -> None:
    errors = (
        f"rank {rank} failed in step 1 of SGD: ArithmeticError('measuring of {rank}') in fails"
        for rank in range(SIZE)
    )
    told = STOPS + "; ".join(errors) + GOES_ON
    for each in two(fail_in, "measuring", (0, 1)):
        assert [*map(plain, each["told"])] == [told]
        assert each["seen"] == [0]
        assert not each["observing"]


class Watching(UpdateMonitor):
    """A monitor class that a user defines."""


def owner(rank: int) -> list[str]:
    net = fsdp(SIZE)
    optimizer = sgd(net)
    monitor = Watching(net, every_n_steps=lambda index: 1 // (index < 1 or rank))
    with monitor.attach(optimizer):
        return warned(net, optimizer, 3)


def test_every_rank_warns_with_the_name_of_the_users_class(two) -> None:
    for told in two(owner):
        assert len(told) == 1
        assert told[0].startswith(
            "Watching stops observing after an error: rank 0 failed before step 1 of SGD: "
            "ZeroDivisionError("
        )


def strict(rank: int) -> dict[str, Any]:
    net = fsdp(SIZE)
    optimizer = sgd(net)

    def fails(record: StepRecord) -> None:
        if rank == 1:
            raise ArithmeticError("of one")

    monitor = UpdateMonitor(net, fails, strict=True).attach(optimizer)
    found: dict[str, Any] = {}
    with all_warnings() as told:
        try:
            train(net, optimizer, 3)
        except RankError as error:
            found |= {"raised": plain(str(error)), "cause": repr(error.__cause__)}
    told = [each for each in told if "observing" in each]
    return found | {"index": monitor.latest.index, "told": told}


def test_strict_raises_on_every_rank_with_the_cause_on_the_failed_one(two) -> None:
    causes = ["None", "ArithmeticError('of one')"]
    for cause, each in zip(causes, two(strict), strict=True):
        assert each == {
            "raised": "rank 1 failed before step 1 of SGD: ArithmeticError('of one') in fails",
            "cause": cause,
            "index": 0,
            "told": [],
        }


def missing_gradient(rank: int) -> list[str]:
    """Delete the gradient of a layer on one rank only."""
    net = fsdp(SIZE)
    optimizer = sgd(net)
    if rank == 1:
        optimizer.register_step_pre_hook(lambda *_: setattr(net.norm.weight, "grad", None))
    with UpdateMonitor(net).attach(optimizer):
        return warned(net, optimizer, 2)


def test_every_rank_reports_elements_that_no_rank_measures(two) -> None:
    for told in two(missing_gradient):
        assert len(told) == 1
        assert told[0].startswith(
            f"{STOPS}norm.weight, step 0 of SGD: expected 64 measured elements on all ranks "
            "together, got 32"
        )


# After the last step


def error_at_the_end(rank: int, *, strict: bool) -> dict[str, Any]:
    """Fail on rank 1 in on_record, at the last observed step."""
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


def error_at_the_end_in_both_ways(rank: int) -> list[dict[str, Any]]:
    return [error_at_the_end(rank, strict=strict) for strict in (False, True)]


def test_only_the_failed_rank_reports_an_error_at_the_last_step(two) -> None:
    first, second = two(error_at_the_end_in_both_ways)
    assert first == [{"raised": "", "told": []}] * 2
    told = "had an error in the last step that it observed: ArithmeticError('at the end')"
    assert second == [
        {"raised": "", "told": [f"UpdateMonitor {told}"]},
        {"raised": "ArithmeticError: at the end", "told": []},
    ]


class WithoutClosure(torch.optim.SGD):
    """An optimizer that does not call its closure."""

    def step(self, closure: Any = None) -> None:
        return super().step(None if unseen() else closure)


def unseen() -> bool:
    return torch.distributed.get_rank() == 1


def step_unseen_on_one(rank: int) -> dict[str, Any]:
    """Step with a closure that rank 1 never calls: an error that is made and not raised."""
    net = fsdp(SIZE)
    optimizer = WithoutClosure(net.parameters(), lr=1e-2)
    monitor = UpdateMonitor(net).attach(optimizer)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    start = time.monotonic()
    with all_warnings() as told:
        optimizer.step(lambda: None)
    assert not monitor.is_observing
    return {"told": told, "seconds": time.monotonic() - start}


def test_every_rank_reports_at_once_a_step_that_one_rank_cannot_observe() -> None:
    for each in run(step_unseen_on_one, SIZE, collective=LIMIT):
        *twins, told = each["told"]
        assert [text for text in twins if "ends all twins" not in text] == []
        assert "rank 1 failed in step 0 of WithoutClosure: RuntimeError(" in told
        assert "does not call the closure" in told
        assert each["seconds"] < LIMIT / 2
