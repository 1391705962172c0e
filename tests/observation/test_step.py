"""`OptimizerStep`, `StepOutcome`, and `make_step`, which makes a step from snapshots."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from altgrad import OptimizerStep, StepObserver
from altgrad.observation.snapshots import Snapshot
from altgrad.observation.step import StepOutcome, make_step
from tests.observation.watching import Kept, set_gradients, training

NAN, INF = math.nan, math.inf
ONE_ULP = 1 + 2.0**-23


def snapshot(
    name: str,
    before: list[float],
    now: list[float],
    *,
    rests: bool = False,
    indices: list[int] | None = None,
) -> Snapshot:
    """Return the snapshot of a parameter, copied whole or at the given indices."""
    parameter = torch.tensor(now, requires_grad=True)
    copied = torch.tensor(before)
    return Snapshot(
        name=name,
        parameter=parameter,
        rests=rests,
        indices=None if indices is None else torch.tensor(indices),
        shape=parameter.shape,
        before=copied,
        gradient=copied + 100,
        after=None if indices is None else torch.empty_like(copied),
    )


def make_optimizer(*snapshots: Snapshot) -> SGD:
    return SGD([each.parameter for each in snapshots], lr=0.5)


@torch.no_grad()  # as an observer calls it
def show(*snapshots: Snapshot) -> OptimizerStep:
    return make_step(snapshots, make_optimizer(*snapshots), 3)


def test_a_step_has_the_tensors_of_the_snapshots_in_their_order() -> None:
    both = snapshot("b", [1.0, 2.0], [1.5, 2.0]), snapshot("a", [3.0], [4.0])
    optimizer = make_optimizer(*both)
    step = make_step(both, optimizer, 7)
    assert step.names == ("b", "a")
    for number, each in enumerate(both):
        assert step.before[number] is each.before
        assert step.gradients[number] is each.gradient
        assert step.after[number].data_ptr() == each.parameter.data_ptr()
        assert not step.after[number].requires_grad
    assert [each.tolist() for each in step.after] == [[1.5, 2.0], [4.0]]
    assert (step.optimizer, step.index) == (optimizer, 7)
    assert step.found_inf is None
    assert step.resting == frozenset()


def test_the_weights_after_the_step_are_copied_for_chosen_elements() -> None:
    chosen = snapshot("w", [20.0, 10.0], [5.0, 6.0, 7.0], indices=[2, 0])
    step = show(chosen)
    assert step.after[0] is chosen.after
    assert step.after[0].tolist() == [7.0, 5.0]


# Learning rate 0


@pytest.mark.parametrize(
    "values", [[1.0, 2.0], [NAN, 1.0], [INF, -INF], []], ids=["finite", "NaN", "inf", "empty"]
)
def test_parameters_that_rest_are_named_and_can_be_left_out(
    values: list[float],
) -> None:
    resting = snapshot("still", values, values, rests=True)
    moving = snapshot("moving", [1.0], [2.0])
    step = show(resting, moving)
    assert step.names == ("still", "moving")
    assert step.resting == {"still"}
    rest = step.without_resting()
    assert rest.names == ("moving",)
    assert [each[0] for each in (rest.before, rest.gradients, rest.after)] == [
        step.before[1],
        step.gradients[1],
        step.after[1],
    ]
    assert [len(each) for each in (rest.before, rest.gradients, rest.after)] == [1, 1, 1]
    assert rest.resting == frozenset()
    assert show(resting).without_resting().names == ()


@pytest.mark.parametrize(
    ("before", "now"),
    [([1.0, 1.0], [1.0, ONE_ULP]), ([NAN, 1.0], [1.0, 1.0]), ([INF], [-INF]), ([1e-45], [0.0])],
    ids=["one ULP", "no longer NaN", "inf", "subnormal"],
)
def test_a_parameter_that_moves_at_learning_rate_0_does_not_rest(
    before: list[float], now: list[float]
) -> None:
    step = show(snapshot("w", before, now, rests=True))
    assert step.names == ("w",)
    assert step.resting == frozenset()


def test_a_parameter_stalled_at_a_nonzero_learning_rate_is_not_resting() -> None:
    step = show(snapshot("w", [1.0], [1.0]))
    assert step.names == ("w",)
    assert step.resting == frozenset()


def test_a_step_shows_resting_parameters_beside_moving_ones() -> None:
    several = (
        snapshot("still", [1.0], [1.0], rests=True),
        snapshot("moved", [1.0], [2.0], rests=True),
        snapshot("stalled", [1.0], [1.0]),
    )
    step = show(*several)
    assert step.names == ("still", "moved", "stalled")
    assert [each.item() for each in step.after] == [1.0, 2.0, 1.0]
    assert step.resting == {"still"}
    assert step.without_resting().names == ("moved", "stalled")


def test_without_resting_returns_the_same_step_if_no_parameter_rests() -> None:
    step = show(snapshot("w", [1.0], [1.0]), snapshot("v", [1.0], [2.0], rests=True))
    assert step.without_resting() is step


def test_without_resting_keeps_the_optimizer_the_index_and_found_inf() -> None:
    several = snapshot("still", [1.0], [1.0], rests=True), snapshot("w", [1.0], [2.0])
    optimizer = make_optimizer(*several)
    optimizer.found_inf = torch.zeros(1)
    with torch.no_grad():
        step = make_step(several, optimizer, 5)
    rest = step.without_resting()
    assert (rest.optimizer, rest.index) == (optimizer, 5)
    assert rest.found_inf is optimizer.found_inf
    assert step.names == ("still", "w")  # the step itself is not changed


@pytest.mark.parametrize("found_inf", [torch.zeros(1), torch.ones(1)], ids=["stepped", "skipped"])
def test_found_inf_is_passed_on_without_being_read(found_inf: Tensor) -> None:
    moved = snapshot("w", [1.0], [2.0])
    optimizer = make_optimizer(moved)
    optimizer.found_inf = found_inf
    assert make_step([moved], optimizer, 0).found_inf is found_inf


def test_a_step_cannot_be_changed() -> None:
    step = show(snapshot("w", [1.0], [2.0]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        step.index = 0


def test_an_outcome_is_empty_by_default_and_cannot_be_changed() -> None:
    optimizer = SGD([torch.ones(1)], lr=0.5)
    outcome = StepOutcome(optimizer, 4)
    assert (outcome.optimizer, outcome.index) == (optimizer, 4)
    assert (outcome.step, outcome.skipped, outcome.error) == (None, None, None)
    assert outcome.copy_seconds == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        outcome.error = ValueError()
    assert outcome != StepOutcome(optimizer, 4)
    assert len({outcome, StepOutcome(optimizer, 4)}) == 2


def test_steps_are_compared_by_identity() -> None:
    model, optimizer = training()
    steps = Kept()
    with StepObserver(model, steps).attach(optimizer):
        for _ in range(2):
            set_gradients(model)
            optimizer.step()
    assert steps[0] != steps[1]
    assert len({*steps}) == 2
