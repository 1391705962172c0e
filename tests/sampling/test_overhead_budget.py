"""`OverheadBudget`: observing takes no more than its share of the time."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from altgrad.monitor.overhead import OverheadBudget
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
def test_no_numbers_break_it_and_equal_numbers_decide_equally(updates, share) -> None:
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
                rank.observed(step)
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
def test_where_nothing_is_known_the_interval_stays(own: float, training: float) -> None:
    budget = OverheadBudget(0.01, 10)
    budget.update(1.0, 1.0)
    budget.update(own, training)
    assert budget.interval == 100


@pytest.mark.parametrize("own", [0.0, -0.0, -1.0, -1e300])
def test_a_step_that_cost_nothing_is_paid_at_once(own: float) -> None:
    budget = OverheadBudget(0.01, 10)
    budget.update(1.0, 1.0)
    budget.update(own, 1.0)
    assert budget.interval == 10


@pytest.mark.parametrize("own", [1e6, 1e308])
def test_no_interval_exceeds_a_million_times_the_smallest(own: float) -> None:
    assert interval_after(own, 5e-324, every=3) == 3_000_000


def test_the_first_step_is_due_and_then_those_an_interval_later() -> None:
    budget = OverheadBudget(0.5, 10)
    assert budget.is_due(3)
    budget.observed(9)
    assert due_steps(budget, 22)[-3:] == [19, 20, 21]
    assert not any(budget.is_due(step) for step in range(9, 19))
    budget.update(3.0, 0.1)
    assert budget.interval == 30
    assert not budget.is_due(38)
    assert budget.is_due(39)


def test_before_the_last_observed_step_counting_began_anew() -> None:
    budget = OverheadBudget(0.5, 10)
    budget.observed(10_000)
    assert budget.is_due(9)
    budget.observed(9)
    assert not budget.is_due(18)


def test_a_run_goes_on_where_it_was() -> None:
    budget, resumed = OverheadBudget(0.01, 10), OverheadBudget(0.01, 10)
    assert budget.state_dict() == {"interval": 10, "last_observed_step": -1}
    resumed.load_state_dict(budget.state_dict())
    assert resumed.is_due(0)
    budget.observed(29)
    budget.update(3.0, 1.0)
    assert budget.state_dict() == {"interval": 300, "last_observed_step": 29}
    resumed.load_state_dict(budget.state_dict())
    assert resumed.state_dict() == budget.state_dict()
    assert due_steps(resumed, 400) == due_steps(budget, 400)


def test_a_run_that_goes_on_with_another_distance_keeps_to_its_multiples() -> None:
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
def test_a_wrong_state_is_refused_and_changes_nothing(state, error, message) -> None:
    budget = OverheadBudget(0.01, 10)
    before = budget.state_dict()
    with pytest.raises(error, match=message):
        budget.load_state_dict(state)
    assert budget.state_dict() == before


@pytest.mark.parametrize("share", [0, 1, 0.0, 1.0, -0.1, math.nan, math.inf])
def test_a_share_lies_between_0_and_1(share: float) -> None:
    with pytest.raises(ValueError, match=f"share={share}: expected a number between 0 and 1"):
        OverheadBudget(share, 10)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(TypeError, match=r"share='1%': expected float, got str"):
        OverheadBudget("1%", 10)
    with pytest.raises(TypeError, match="share=True: expected float, got bool"):
        OverheadBudget(True, 10)
    with pytest.raises(ValueError, match="every_n_steps=0: expected 1 or more"):
        OverheadBudget(0.01, 0)


# In the long run, by a fake clock


def simulate(
    share: float, every: int, seconds_of: list[tuple[float, float]]
) -> list[tuple[int, float]]:
    """Each observed step and the share until just before it; seconds (own, training) by step."""
    budget, schedule = OverheadBudget(share, every), StepSchedule(every)
    own_total = training_total = 0.0
    seen = []
    for step, (own, training) in enumerate(seconds_of):
        if schedule.is_due(step) and budget.is_due(step):
            so_far = own_total + training_total
            seen.append((step, own_total / so_far if so_far else 0.0))
            own_total += own
            budget.observed(step)
            budget.update(own, training)
        training_total += training
    return seen


ROUNDING = 1 + 1e-9  # of sums of 400,000 seconds


@pytest.mark.parametrize("every", [1, 50])
@pytest.mark.parametrize("share", [0.01, 0.2])
@pytest.mark.parametrize("costs", [(0.05, 0.05), (0.05, 0.5), (0.5, 0.05)], ids=repr)
def test_the_share_holds_whenever_a_step_is_observed(share, every, costs) -> None:
    half = 200_000
    seen = simulate(share, every, [(own, 0.01) for own in costs for _ in range(half)])
    assert max(so_far for _, so_far in seen) <= share * ROUNDING
    assert len({step for step, _ in seen}) > 100
    # Nor is it observed less than the share allows, where the smallest interval is not enough.
    for own, start in zip(costs, (0, half), strict=True):
        wanted = own * (1 - share) / (share * 0.01)
        steps = [step for step, _ in seen if start + half // 2 <= step < start + half]
        distances = {after - before for before, after in pairwise(steps)}
        assert len(distances) == 1
        distance = distances.pop()
        assert max(wanted, every) <= distance * ROUNDING
        assert distance <= (wanted + every) * ROUNDING


def test_without_a_budget_the_same_clock_exceeds_the_share() -> None:
    """A negative control: the share above holds because of the budget."""
    observed = len(due_steps(StepSchedule(50), 1000))
    assert observed * 0.5 / (observed * 0.5 + 1000 * 0.01) > 0.2
