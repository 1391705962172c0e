"""Cost of observing: the clock, and the budget that limits the share of the time."""

import gc
import itertools
import math
import weakref
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor, nn

from altgrad import StepRecord, UpdateMonitor
from altgrad.distributed.peers import Alone
from altgrad.measurement.measurer import Measurer
from altgrad.monitor.overhead import Budgets, Clock, OverheadBudget
from altgrad.monitor.schedule import StepSchedule
from tests.strategies import thorough


def due_steps(schedule: StepSchedule | OverheadBudget, until: int) -> list[int]:
    return [step for step in range(until) if schedule.is_due(step)]


def interval_after(own: float, training: float, share: float = 0.01, every: int = 1) -> int:
    budget = OverheadBudget(share, every)
    budget.update(own, training)
    return budget.interval


def test_the_interval_pays_for_an_observed_step() -> None:
    assert interval_after(1.0, 1.0, share=0.5) == 1
    assert interval_after(1.0, 1.0, share=0.25) == 3
    assert interval_after(1.0, 1.0, share=0.25, every=2) == 4
    assert interval_after(0.5, 0.1, share=0.0625) == 75
    assert interval_after(1e-9, 1.0, every=50) == 50


seconds = st.floats(1e-6, 1e3)


@thorough
@given(seconds, seconds, st.floats(0.001, 0.9), st.integers(1, 100))
def test_the_interval_is_the_smallest_that_keeps_the_share(own, training, share, every) -> None:
    interval = interval_after(own, training, share, every)
    assert interval % every == 0

    def keeps(steps: int) -> bool:
        cost = Fraction(own)
        return cost / (cost + steps * Fraction(training)) <= Fraction(share)

    assert keeps(interval) or interval == 1_000_000 * every
    assert interval == every or not keeps(interval - every)


NUMBERS = st.floats() | st.sampled_from([0.0, -0.0, 5e-324, -1.0, math.inf, -math.inf, math.nan])


@thorough
@given(st.lists(st.tuples(NUMBERS, NUMBERS)), st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_any_numbers_are_accepted_and_equal_numbers_decide_equally(updates, share) -> None:
    ranks = [OverheadBudget(share, 5), OverheadBudget(share, 5)]
    for step, (own, training) in enumerate(updates):
        for rank in ranks:
            before = rank.interval
            rank.update(own, training)
            assert rank.interval % 5 == 0
            assert 5 <= rank.interval <= 5_000_000
            if not (math.isfinite(own) and math.isfinite(training) and training > 0):
                assert rank.interval == before
        assert ranks[0].interval == ranks[1].interval
        due = [rank.is_due(step) for rank in ranks]
        assert due[0] == due[1]
        if due[0]:
            for rank in ranks:
                rank.mark_observed(step)
    assert ranks[0].state_dict() == ranks[1].state_dict()


@pytest.mark.parametrize(
    ("own", "training"),
    [
        (math.nan, 1.0),
        (math.inf, 1.0),
        (-math.inf, 1.0),
        (1.0, math.nan),
        (1.0, math.inf),
        (1.0, 0.0),
        (1.0, -1.0),
    ],
)
def test_unknown_times_leave_the_interval_unchanged(own: float, training: float) -> None:
    budget = OverheadBudget(0.01, 10)
    budget.update(1.0, 1.0)
    budget.update(own, training)
    assert budget.interval == 100


@pytest.mark.parametrize("own", [0.0, -0.0, -1.0, -1e300])
def test_a_step_without_cost_is_paid_at_once(own: float) -> None:
    budget = OverheadBudget(0.01, 10)
    budget.update(1.0, 1.0)
    budget.update(own, 1.0)
    assert budget.interval == 10


@pytest.mark.parametrize("own", [1e6, 1e308])
def test_no_interval_exceeds_a_million_times_the_smallest(own: float) -> None:
    assert interval_after(own, 5e-324, every=3) == 3_000_000


def test_the_first_step_is_due_and_then_one_per_interval() -> None:
    budget = OverheadBudget(0.5, 10)
    assert budget.is_due(3)
    budget.mark_observed(9)
    assert due_steps(budget, 22)[-3:] == [19, 20, 21]
    assert not any(budget.is_due(step) for step in range(9, 19))
    budget.update(3.0, 0.1)
    assert budget.interval == 30
    assert not budget.is_due(38)
    assert budget.is_due(39)


def test_a_step_before_the_last_observed_step_is_due() -> None:
    budget = OverheadBudget(0.5, 10)
    budget.mark_observed(10_000)
    assert budget.is_due(9)
    budget.mark_observed(9)
    assert not budget.is_due(18)


def test_a_restored_budget_goes_on_where_it_was() -> None:
    budget, resumed = OverheadBudget(0.01, 10), OverheadBudget(0.01, 10)
    assert budget.state_dict() == {"interval": 10, "last_observed_step": -1}
    resumed.load_state_dict(budget.state_dict())
    assert resumed.is_due(0)
    budget.mark_observed(29)
    budget.update(3.0, 1.0)
    assert budget.state_dict() == {"interval": 300, "last_observed_step": 29}
    resumed.load_state_dict(budget.state_dict())
    assert resumed.state_dict() == budget.state_dict()
    assert due_steps(resumed, 400) == due_steps(budget, 400)


def test_a_restored_interval_is_rounded_up_to_a_multiple() -> None:
    budget = OverheadBudget(0.01, 7)
    budget.load_state_dict({"interval": 300, "last_observed_step": 29})
    assert budget.interval == 301
    budget.load_state_dict({"interval": 10**9, "last_observed_step": 29})
    assert budget.interval == 7_000_000


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ({"interval": 10}, ValueError, r"state has the entries \['interval'\]; expected"),
        ({}, ValueError, "as OverheadBudget.state_dict"),
        ({"interval": 0, "last_observed_step": 5}, ValueError, "interval=0: expected 1"),
        ({"interval": 1.5, "last_observed_step": 5}, TypeError, r"interval=1\.5: expected int"),
        ({"interval": 1, "last_observed_step": -2}, ValueError, "last_observed_step=-2: expected"),
    ],
)
def test_an_invalid_state_is_an_error_and_changes_nothing(state, error, message) -> None:
    budget = OverheadBudget(0.01, 10)
    before = budget.state_dict()
    with pytest.raises(error, match=message):
        budget.load_state_dict(state)
    assert budget.state_dict() == before


@pytest.mark.parametrize("share", [0, 1, 0.0, 1.0, -0.1, math.nan, math.inf])
def test_a_share_outside_0_to_1_is_an_error(share: float) -> None:
    with pytest.raises(ValueError, match=f"share={share}: expected a number between 0 and 1"):
        OverheadBudget(share, 10)


def test_errors_name_the_wrong_argument() -> None:
    with pytest.raises(TypeError, match=r"share='1%': expected float, got str"):
        OverheadBudget("1%", 10)
    with pytest.raises(TypeError, match="share=True: expected float, got bool"):
        OverheadBudget(True, 10)
    with pytest.raises(ValueError, match="every_n_steps=0: expected 1 or more"):
        OverheadBudget(0.01, 0)


# In the long run, by a fake clock


def simulate(
    share: float, every: int, clock_seconds: list[tuple[float, float]]
) -> list[tuple[int, float]]:
    """Return each observed step and the share just before it; costs are seconds (own, training)."""
    budget, schedule = OverheadBudget(share, every), StepSchedule(every)
    own_total = training_total = 0.0
    seen = []
    for step, (own, training) in enumerate(clock_seconds):
        if schedule.is_due(step) and budget.is_due(step):
            so_far = own_total + training_total
            seen.append((step, own_total / so_far if so_far else 0.0))
            own_total += own
            budget.mark_observed(step)
            budget.update(own, training)
        training_total += training
    return seen


ROUNDING = 1 + 1e-9  # error of sums of 400,000 seconds


@pytest.mark.parametrize("every", [1, 50])
@pytest.mark.parametrize("share", [0.01, 0.2])
@pytest.mark.parametrize("costs", [(0.05, 0.05), (0.05, 0.5), (0.5, 0.05)], ids=repr)
def test_the_share_holds_whenever_a_step_is_observed(share, every, costs) -> None:
    half = 200_000
    seen = simulate(share, every, [(own, 0.01) for own in costs for _ in range(half)])
    assert max(so_far for _, so_far in seen) <= share * ROUNDING
    assert len({step for step, _ in seen}) > 100
    # The share is also used up, if the smallest interval would exceed it.
    for own, start in zip(costs, (0, half), strict=True):
        wanted = own * (1 - share) / (share * 0.01)
        steps = [step for step, _ in seen if start + half // 2 <= step < start + half]
        distances = {after - before for before, after in pairwise(steps)}
        assert len(distances) == 1
        distance = distances.pop()
        assert max(wanted, every) <= distance * ROUNDING
        assert distance <= (wanted + every) * ROUNDING


def test_without_a_budget_the_same_clock_exceeds_the_share() -> None:
    """A negative control: the share in the test above is kept by the budget."""
    observed = len(due_steps(StepSchedule(50), 1000))
    assert observed * 0.5 / (observed * 0.5 + 1000 * 0.01) > 0.2


# The budgets of several optimizers


def test_each_optimizer_has_a_separate_budget() -> None:
    budgets, one, two = Budgets(0.01, 10), sgd(), sgd()
    budgets.get(one).update(1.0, 1.0)
    budgets.get(two).mark_observed(7)
    assert budgets.state_dict() == [
        {"interval": 100, "last_observed_step": -1},
        {"interval": 10, "last_observed_step": 7},
    ]
    assert budgets.share == 0.01


def test_budgets_are_restored_in_the_order_of_their_use() -> None:
    budgets, (one, two, three) = Budgets(0.01, 10), (sgd() for _ in range(3))
    budgets.get(one).update(5.0, 1.0)
    states = [
        {"interval": 100, "last_observed_step": 5},
        {"interval": 20, "last_observed_step": 7},
    ]
    budgets.load_state_dict(states)
    assert budgets.state_dict() == states  # of optimizers that have no budget yet
    assert budgets.get(two).state_dict() == states[0]
    assert budgets.state_dict() == states
    assert budgets.get(one).state_dict() == states[1]
    assert budgets.get(three).state_dict() == {"interval": 10, "last_observed_step": -1}
    assert budgets.state_dict()[:2] == states


def test_budgets_check_arguments_before_their_first_use() -> None:
    with pytest.raises(ValueError, match=r"share=1\.5: expected a number between 0 and 1"):
        Budgets(1.5, 10)


# The clock


class Time:
    """A fake clock of the host, which a test advances."""

    def __init__(self) -> None:
        self.now = 1000.0

    def passes(self, seconds: float) -> None:
        self.now += seconds

    def observes(self, clock: Clock, optimizer: torch.optim.Optimizer, step: int, own: float):
        with clock.observing():
            self.passes(own)
        clock.tick(optimizer, step)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr("time.perf_counter", lambda: time.now)
    return time


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)


def test_the_clock_separates_observing_from_training(host: Time) -> None:
    clock, optimizer = Clock(), sgd()
    assert all(map(math.isnan, clock.seconds(optimizer, 0)))
    host.observes(clock, optimizer, 0, 64.0)
    host.passes(12.0)
    own, training = clock.seconds(optimizer, 4)
    assert math.isnan(own)  # the first step also sets up memory
    assert training == 12.0 / 4
    host.observes(clock, optimizer, 4, 2.0)
    host.passes(5.0)
    assert clock.seconds(optimizer, 5) == (2.0, 5.0)


def test_observing_before_and_within_a_step_is_not_training_time(host: Time) -> None:
    clock, optimizer = Clock(), sgd()
    host.observes(clock, optimizer, 0, 1.0)
    host.passes(3.0)
    with clock.observing():  # before the step
        host.passes(4.0)
    host.passes(0.5)
    with clock.observing(0.5):  # time of copies, measured elsewhere
        pass
    assert clock.seconds(optimizer, 1)[1] == 3.0
    host.observes(clock, optimizer, 1, 1.0)
    host.passes(1.0)
    assert clock.seconds(optimizer, 2) == (4.0 + 0.5 + 1.0, 1.0)


def test_observing_another_optimizer_is_not_training_time(host: Time) -> None:
    clock, one, two = Clock(), sgd(), sgd()
    host.observes(clock, one, 0, 1.0)
    host.observes(clock, two, 0, 16.0)
    host.passes(3.0)
    host.observes(clock, one, 1, 2.0)
    host.passes(4.0)
    host.observes(clock, two, 1, 8.0)
    host.passes(5.0)
    assert clock.seconds(one, 2) == (16.0 + 2.0, 4.0 + 5.0)
    assert clock.seconds(two, 2) == (2.0 + 8.0, 5.0)


def test_time_of_failed_observing_is_counted(host: Time) -> None:
    clock, optimizer = Clock(), sgd()
    host.observes(clock, optimizer, 0, 1.0)

    def fail() -> None:
        with clock.observing():
            host.passes(7.0)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    host.passes(2.0)
    assert clock.seconds(optimizer, 1)[1] == 2.0


def test_seconds_are_nan_if_steps_are_counted_from_0_again(host: Time) -> None:
    clock, optimizer = Clock(), sgd()
    host.observes(clock, optimizer, 8, 1.0)
    host.observes(clock, optimizer, 9, 1.0)
    host.passes(6.0)
    for step in (0, 9):
        assert all(map(math.isnan, clock.seconds(optimizer, step)))
    assert clock.seconds(optimizer, 11) == (1.0, 3.0)


def test_training_time_is_never_negative(host: Time) -> None:
    clock, optimizer = Clock(), sgd()
    host.observes(clock, optimizer, 0, 1.0)
    with clock.observing(100.0):
        pass
    assert clock.seconds(optimizer, 1)[1] == 0.0


def test_neither_clock_nor_budgets_keep_an_optimizer_alive(host: Time) -> None:
    clock, budgets, optimizer = Clock(), Budgets(0.5, 1), sgd()
    host.observes(clock, optimizer, 0, 1.0)
    budgets.get(optimizer).mark_observed(0)
    known = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert known() is None
    assert budgets.state_dict() == []


# In a monitor


def test_the_overhead_budget_holds_back_observation(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    indices: list[int] = []

    def on_record(record: StepRecord) -> None:
        indices.append(record.index)

    kernel = Measurer.measure_batch

    def slow(measurer: Measurer, batch: Any) -> Tensor:
        now[0] += 1.0  # each observation takes 1 s
        return kernel(measurer, batch)

    monkeypatch.setattr(Measurer, "measure_batch", slow)
    monitor = UpdateMonitor(model, on_record, overhead_budget=0.2, strict=True).attach(optimizer)
    for _ in range(500):
        now[0] += 0.125  # each step takes 1/8 s
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    gaps = [b - a for a, b in itertools.pairwise(indices)]
    assert gaps[:2] == [1, 1]  # the first observed step does not set the interval
    assert set(gaps[3:]) == {32}  # 1 s in 1 + 32 / 8 s
    assert monitor.state_dict()["budgets"][0]["interval"] == 32
    assert monitor.latest.own_seconds == pytest.approx(1.0)
    assert monitor.latest.training_seconds == pytest.approx(0.125)


def test_the_overhead_budget_holds_for_two_optimizers_of_different_paces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    one, two = (torch.optim.SGD(part.parameters(), lr=0.1) for part in model)
    spent: list[torch.optim.Optimizer] = []
    kernel = Measurer.measure_batch

    def slow(measurer: Measurer, batch: Any) -> Tensor:
        now[0] += 1.0
        spent.append(stepping)
        return kernel(measurer, batch)

    monkeypatch.setattr(Measurer, "measure_batch", slow)
    monitor = UpdateMonitor(model, overhead_budget=0.2, strict=True).attach(one, two)
    for step in range(2000):
        now[0] += 0.1
        model(torch.ones(1, 4)).sum().backward()
        for stepping in (one, two) if step % 5 == 4 else (one,):
            stepping.step()
    share = len(spent) / now[0]
    assert 0.1 < share < 0.22
    assert min(spent.count(each) for each in (one, two)) > 5
    states = monitor.state_dict()["budgets"]
    assert [state["interval"] > 1 for state in states] == [True, True]


def test_taking_scales_is_not_training_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales are taken before a step, and after it if weights were 0."""
    now, amax = [0.0], Alone.amax
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def slow(peers: Alone, *arguments: Any) -> Any:
        now[0] += 16.0
        return amax(peers, *arguments)

    monkeypatch.setattr(Alone, "amax", slow)
    model = nn.Linear(4, 4)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    records: list[StepRecord] = []
    with UpdateMonitor(model, records.append, strict=True).attach(optimizer):
        for step in range(5):
            now[0] += 0.125
            with torch.no_grad():
                model.weight.mul_(
                    1000.0 if step == 2 else 1.0
                )  # exceeds its scale, which is taken again before step 3
            model.weight.grad, model.bias.grad = torch.full((4, 4), 1e-3), torch.zeros(4)
            optimizer.step()
    assert [record.training_seconds for record in records[1:]] == [0.125] * 4
    assert [record.own_seconds for record in records[2:]] == [16.0] * 3
