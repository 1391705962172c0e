"""An error of one rank in a monitor ends the observation of all, and each tells whose it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pytest

from altgrad import StepRecord, UpdateMonitor
from altgrad.distributed import together
from altgrad.measurement.measurer import Measurer
from altgrad.observation.observer import RankError
from altgrad.observation.snapshots import Snapshots
from tests.distributed.sharded import fsdp
from tests.distributed.training import all_warnings, refused, sgd, train, warned

SIZE = 2
STOPS = "UpdateMonitor stops observing after an error: "
GOES_ON = ". Training goes on; strict=True would raise it"
PLACE = re.compile(r" in (\w+), \S+test_ranks_errors\.py:\d+")


def plain(told: str) -> str:
    """Return what is told without the file and line of the error."""
    return PLACE.sub(r" in \1", told)


# Of a step


def before(owner: object, name: str, fails: Callable[[], object]) -> AbstractContextManager[Any]:
    """Replace a function by one that may fail before it does what it did."""
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
    """Have all scales be taken anew at the second step that it observes."""
    net = fsdp(SIZE)
    optimizer = sgd(net)
    with UpdateMonitor(net, strict=True).attach(optimizer) as another:
        train(net, optimizer, 1)
    state = another.state_dict()
    state["scales"]["steps_left"] = 1
    monitor.load_state_dict(state)


def fail_in(rank: int, place: str, failing: tuple[int, ...]) -> dict[str, Any]:
    """Where some ranks fail at the second step, what each says of it and how far it got."""
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
def test_an_error_of_one_ends_the_observation_of_all_and_each_tells_whose_it_was(
    two, place: str
) -> None:
    step = 2 if place == "on_record" else 1  # which had ended for the others, who learn of it later
    when = "in" if place in ("measuring", "copying") else "before"
    told = f"rank 1 failed {when} step {step} of SGD: ArithmeticError('{place} of 1') in fails"
    first, second = two(fail_in, place, (1,))
    assert first["seen"] == ([0, 1] if place == "on_record" else [0])
    assert second["seen"] == [0]
    for each in (first, second):
        assert [*map(plain, each["told"])] == [STOPS + told + GOES_ON]
        assert each["told"] == first["told"]
        assert not each["observing"]


def test_of_errors_of_two_in_one_step_each_rank_tells_both(two) -> None:
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
    """Of a user."""


def owner(rank: int) -> list[str]:
    net = fsdp(SIZE)
    optimizer = sgd(net)
    Watching(net, every_n_steps=lambda index: 1 // (index < 1 or rank)).attach(optimizer)
    return warned(net, optimizer, 3)


def test_each_rank_tells_the_class_that_its_user_made(two) -> None:
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


def test_strict_raises_on_every_rank_from_the_error_where_it_was(two) -> None:
    causes = ["None", "ArithmeticError('of one')"]
    for cause, each in zip(causes, two(strict), strict=True):
        assert each == {
            "raised": "rank 1 failed before step 1 of SGD: ArithmeticError('of one') in fails",
            "cause": cause,
            "index": 0,
            "told": [],
        }


def missing_gradient(rank: int) -> list[str]:
    """Of a layer on one rank only."""
    net = fsdp(SIZE)
    optimizer = sgd(net)
    if rank == 1:
        optimizer.register_step_pre_hook(lambda *_: setattr(net.norm.weight, "grad", None))
    with UpdateMonitor(net).attach(optimizer):
        return warned(net, optimizer, 2)


def test_elements_that_nobody_measures_are_told_by_every_rank(two) -> None:
    for told in two(missing_gradient):
        assert len(told) == 1
        assert told[0].startswith(
            f"{STOPS}norm.weight was measured in 32 elements by all processes together in step 0 "
            "of SGD, and has 64 to be measured"
        )


# After the last step


def error_at_the_end(rank: int, *, strict: bool) -> dict[str, Any]:
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


def error_at_the_end_in_both_ways(rank: int) -> list[dict[str, Any]]:
    return [error_at_the_end(rank, strict=strict) for strict in (False, True)]


def test_an_error_at_the_last_step_is_told_by_the_rank_that_had_it(two) -> None:
    first, second = two(error_at_the_end_in_both_ways)
    assert first == [{"raised": "", "told": []}] * 2
    told = "had an error in the last step that it observed: ArithmeticError('at the end')"
    assert second == [
        {"raised": "", "told": [f"UpdateMonitor {told}"]},
        {"raised": "ArithmeticError: at the end", "told": []},
    ]
