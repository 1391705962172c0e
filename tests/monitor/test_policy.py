"""`StepPolicy`: the schedule, the budget of each optimizer, and the clock."""

import math

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from altgrad.monitor.policy import StepPolicy
from altgrad.monitor.schedule import StepSchedule


class Time:
    """A fake clock of the host, which a test advances."""

    def __init__(self) -> None:
        self.now = 1000.0

    def passes(self, seconds: float) -> None:
        self.now += seconds

    def observes(self, policy: StepPolicy, optimizer: Optimizer, index: int, own: float) -> None:
        """Observe a step that takes some seconds, from the schedule to the end of the step."""
        with policy.observing():
            seconds = policy.seconds(optimizer, index)
            self.passes(own)
            policy.charge(optimizer, index, seconds)
        policy.mark_end(optimizer, index)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr("time.perf_counter", lambda: time.now)
    return time


def sgd() -> Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)


def wanted(policy: StepPolicy, until: int = 12) -> list[int]:
    return [index for index in range(until) if policy.is_wanted(index)]


def paid_for(policy: StepPolicy, optimizer: Optimizer, until: int = 40) -> list[int]:
    return [index for index in range(until) if policy.is_paid_for(optimizer, index)]


# --- the schedule


@pytest.mark.parametrize(
    ("every_n_steps", "expected", "distance"),
    [
        (1, [*range(12)], 1),
        (5, [4, 9], 5),
        (StepSchedule(3, from_step=4, until_step=9), [5, 8], 3),
        (StepSchedule(log_spaced=True), [0, 1, 4, 9], 1),
        (lambda index: index in (2, 7), [2, 7], 1),
    ],
    ids=["every", "every fifth", "schedule", "log spaced", "function"],
)
def test_the_policy_follows_the_schedule(every_n_steps, expected, distance) -> None:
    policy = StepPolicy(every_n_steps, None)
    assert wanted(policy) == expected
    assert policy.every_n_steps == distance


def test_an_error_of_a_schedule_function_is_raised() -> None:
    policy = StepPolicy(lambda index: 1 / index > 0, None)
    assert policy.is_wanted(1)
    with pytest.raises(ZeroDivisionError):
        policy.is_wanted(0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, None), ValueError, "every_n_steps=0: expected 1 or more"),
        (("2", None), TypeError, "every_n_steps='2': expected int, got str"),
        ((1, 1.5), ValueError, r"share=1\.5: expected a number between 0 and 1"),
        ((1, "1%"), TypeError, "share='1%': expected float, got str"),
    ],
)
def test_errors_name_the_wrong_argument(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        StepPolicy(*arguments)


# --- the budget


def test_every_step_is_paid_for_without_a_budget(host: Time) -> None:
    policy, optimizer = StepPolicy(1, None), sgd()
    assert policy.overhead_budget is None
    assert policy.state_dict() is None
    for index in range(3):
        host.passes(1e-3)
        host.observes(policy, optimizer, index, 1000.0)
    assert paid_for(policy, optimizer) == [*range(40)]
    policy.load_state_dict(
        [{"interval": 8, "last_observed_step": 2}]
    )  # a state of a run with a budget
    assert policy.state_dict() is None
    assert paid_for(policy, optimizer) == [*range(40)]


def test_later_steps_pay_for_an_observed_step(host: Time) -> None:
    policy, optimizer = StepPolicy(2, 0.2), sgd()
    assert policy.overhead_budget == 0.2
    assert policy.is_paid_for(optimizer, 1)
    for index in (1, 3, 5):
        host.passes(2 * 0.5)
        host.observes(policy, optimizer, index, 1.0)
    # 1 s in 1 + 8 · 0.5 s, from step 5 on.
    assert policy.state_dict() == [{"interval": 8, "last_observed_step": 5}]
    assert [index for index in paid_for(policy, optimizer) if index >= 5] == [*range(13, 40)]


def test_the_interval_is_a_multiple_of_that_of_the_schedule(host: Time) -> None:
    policy, optimizer = StepPolicy(StepSchedule(6), 0.5), sgd()
    policy.charge(optimizer, 5, (7.0, 1.0))
    assert policy.state_dict() == [{"interval": 12, "last_observed_step": 5}]
    function = StepPolicy(lambda _: True, 0.5)
    function.charge(optimizer, 5, (7.0, 1.0))
    assert function.state_dict() == [{"interval": 7, "last_observed_step": 5}]


def test_each_optimizer_pays_for_itself() -> None:
    policy, one, two = StepPolicy(1, 0.5), sgd(), sgd()
    policy.charge(one, 0, (10.0, 1.0))
    assert [policy.is_paid_for(each, 1) for each in (one, two)] == [False, True]
    policy.charge(two, 1, (3.0, 1.0))
    assert policy.state_dict() == [
        {"interval": 10, "last_observed_step": 0},
        {"interval": 3, "last_observed_step": 1},
    ]


def test_a_resumed_run_goes_on_with_its_budgets() -> None:
    policy, resumed, one, two = StepPolicy(1, 0.5), StepPolicy(1, 0.5), sgd(), sgd()
    policy.charge(one, 3, (10.0, 1.0))
    policy.charge(two, 4, (20.0, 1.0))
    resumed.load_state_dict(policy.state_dict())
    assert resumed.state_dict() == policy.state_dict()
    others = sgd(), sgd()
    assert paid_for(resumed, others[0]) == paid_for(policy, one)
    assert paid_for(resumed, others[1]) == paid_for(policy, two)
    resumed.load_state_dict(None)  # the state of a run without a budget restores nothing
    assert resumed.state_dict() == policy.state_dict()


# --- the clock


def test_seconds_are_the_times_to_observe_and_to_train(host: Time) -> None:
    policy, optimizer = StepPolicy(1, None), sgd()
    assert all(map(math.isnan, policy.seconds(optimizer, 0)))
    host.observes(policy, optimizer, 0, 64.0)
    host.passes(3.0)
    host.observes(policy, optimizer, 1, 2.0)
    host.passes(10.0)
    assert policy.seconds(optimizer, 3) == (2.0, 5.0)


def test_seconds_passed_in_count_as_observing(host: Time) -> None:
    policy, optimizer = StepPolicy(1, None), sgd()
    host.observes(policy, optimizer, 0, 1.0)
    host.passes(0.5)  # time of copies, measured elsewhere
    host.passes(4.0)
    with policy.observing(0.5):
        host.passes(2.0)
    assert policy.seconds(optimizer, 1)[1] == 4.0
    policy.mark_end(optimizer, 1)
    host.passes(1.0)
    assert policy.seconds(optimizer, 2) == (2.5, 1.0)


def test_an_optimizer_whose_step_has_not_ended_has_no_seconds(host: Time) -> None:
    policy, one, two = StepPolicy(1, None), sgd(), sgd()
    host.observes(policy, one, 0, 1.0)
    host.passes(2.0)
    assert policy.seconds(one, 1)[1] == 2.0
    assert all(map(math.isnan, policy.seconds(two, 1)))
