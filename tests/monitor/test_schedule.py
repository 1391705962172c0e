"""`StepSchedule`: steps are due by their number alone."""

import math
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given, strategies as st

from altgrad.monitor.schedule import StepSchedule
from tests.monitor.watching import (
    net,
    train,
    watched,
)
from tests.strategies import thorough


def due_steps(schedule: StepSchedule, until: int) -> list[int]:
    return [step for step in range(until) if schedule.is_due(step)]


def test_every_step_is_due_by_default() -> None:
    assert due_steps(StepSchedule(), 5) == [0, 1, 2, 3, 4]


def test_every_n_steps_10_observes_steps_9_19_29_as_lightning_logs() -> None:
    assert due_steps(StepSchedule(10), 40) == [9, 19, 29, 39]


def test_a_window_includes_its_first_step_and_excludes_its_end() -> None:
    assert due_steps(StepSchedule(10, from_step=19, until_step=39), 100) == [19, 29]
    assert due_steps(StepSchedule(10, from_step=20, until_step=40), 100) == [29, 39]


def test_log_spaced_steps_are_1_2_5_per_decade() -> None:
    counts = [step + 1 for step in due_steps(StepSchedule(log_spaced=True), 6000)]
    assert counts == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]


def test_log_spaced_steps_move_to_the_next_due_step() -> None:
    counts = [step + 1 for step in due_steps(StepSchedule(30, log_spaced=True), 6000)]
    assert counts == [30, 60, 120, 210, 510, 1020, 2010, 5010]


def test_log_spaced_steps_count_from_the_start_of_the_window() -> None:
    schedule = StepSchedule(from_step=1000, until_step=1050, log_spaced=True)
    assert due_steps(schedule, 9999) == [1000, 1001, 1004, 1009, 1019, 1049]


@thorough
@given(st.integers(1, 40), st.integers(0, 100), st.integers(1, 500) | st.none())
def test_log_spaced_steps_equal_a_brute_force_search(
    every: int, start: int, window: int | None
) -> None:
    first = math.ceil((start + 1) / every) * every - 1
    end = None if window is None else first + window
    schedule = StepSchedule(every, start, end, log_spaced=True)
    wished = [factor * 10**decade for decade in range(4) for factor in (1, 2, 5)]
    expected = {math.ceil((start + count) / every) * every - 1 for count in wished}
    limit = min(3000, math.inf if end is None else end)
    due = due_steps(schedule, 3000)
    assert due == sorted(step for step in expected if step < limit)
    assert set(due) <= set(due_steps(StepSchedule(every, start, end), 3000))


def test_late_steps_are_decided_as_fast_as_early_steps() -> None:
    schedule = StepSchedule(7, log_spaced=True)
    due = 10**300 + -(10**300) % 7 - 1
    assert schedule.is_due(due)
    assert not schedule.is_due(due + 7)


def test_equal_schedules_compare_as_equal() -> None:
    assert StepSchedule(10) == StepSchedule(every_n_steps=10)
    assert len({StepSchedule(10), StepSchedule(10)}) == 1
    with pytest.raises(FrozenInstanceError):
        StepSchedule().every_n_steps = 5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"every_n_steps": 0}, ValueError, "every_n_steps=0: expected 1 or more"),
        ({"every_n_steps": 2.0}, TypeError, r"every_n_steps=2\.0: expected int, got float"),
        ({"every_n_steps": True}, TypeError, "every_n_steps=True: expected int, got bool"),
        ({"from_step": -1}, ValueError, "from_step=-1: expected 0 or more"),
        ({"until_step": "9"}, TypeError, "until_step='9': expected int, got str"),
        ({"until_step": -1}, ValueError, "until_step=-1: expected 0 or more"),
        ({"log_spaced": 1}, TypeError, "log_spaced=1: expected bool, got int"),
    ],
)
def test_errors_name_the_wrong_field(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        StepSchedule(**arguments)


@thorough
@given(st.integers(1, 20), st.integers(0, 50), st.integers(0, 80), st.booleans())
def test_a_window_without_a_due_step_is_an_error(every, start, end, log_spaced) -> None:
    if due_steps(StepSchedule(every, start, log_spaced=log_spaced), end):
        assert due_steps(StepSchedule(every, start, end, log_spaced), 100)
        return
    with pytest.raises(ValueError, match=f"until_step={end}: expected more than .* raise it"):
        StepSchedule(every, start, end, log_spaced)


# In a monitor


def test_a_monitor_observes_the_steps_of_its_schedule() -> None:
    model = net()
    optimizer, _, records = watched(model, every_n_steps=StepSchedule(2, from_step=3, until_step=8))
    train(model, optimizer, 10)
    assert [record.index for record in records] == [3, 5, 7]
