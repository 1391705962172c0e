"""`OptimizerStep`, and which snapshots become part of one."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from altgrad import StepObserver
from altgrad.observation.snapshots import Snapshot
from altgrad.observation.step import step_of
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
    """Of a parameter that was copied whole, or where there are indices, at these."""
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


def optimizer_of(*snapshots: Snapshot) -> SGD:
    return SGD([each.parameter for each in snapshots], lr=0.5)


@torch.no_grad()  # as an observer calls it
def show(*snapshots: Snapshot, **options: bool):
    return step_of(snapshots, optimizer_of(*snapshots), 3, **options)


def test_a_step_is_the_snapshots_side_by_side_in_their_order() -> None:
    both = snapshot("b", [1.0, 2.0], [1.5, 2.0]), snapshot("a", [3.0], [4.0])
    optimizer = optimizer_of(*both)
    step = step_of(both, optimizer, 7)
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


def test_of_chosen_elements_those_after_the_step_are_copied_now() -> None:
    chosen = snapshot("w", [20.0, 10.0], [5.0, 6.0, 7.0], indices=[2, 0])
    step = show(chosen)
    assert step.after[0] is chosen.after
    assert step.after[0].tolist() == [7.0, 5.0]


@pytest.mark.parametrize(
    "values", [[1.0, 2.0], [NAN, 1.0], [INF, -INF], []], ids=["finite", "NaN", "inf", "empty"]
)
def test_what_a_learning_rate_of_0_kept_where_it_was_is_left_out(values: list[float]) -> None:
    resting = snapshot("still", values, values, rests=True)
    moving = snapshot("moving", [1.0], [2.0])
    step = show(resting, moving)
    assert step.names == ("moving",)
    assert [len(each) for each in (step.before, step.gradients, step.after)] == [1, 1, 1]
    assert step.resting == frozenset()
    assert show(resting).names == ()


@pytest.mark.parametrize("show_resting", [False, True])
@pytest.mark.parametrize(
    ("before", "now"),
    [([1.0, 1.0], [1.0, ONE_ULP]), ([NAN, 1.0], [1.0, 1.0]), ([INF], [-INF]), ([1e-45], [0.0])],
    ids=["one ULP", "no longer NaN", "inf", "subnormal"],
)
def test_what_moves_at_a_learning_rate_of_0_is_a_step(
    before: list[float], now: list[float], show_resting: bool
) -> None:
    step = show(snapshot("w", before, now, rests=True), show_resting=show_resting)
    assert step.names == ("w",)
    assert step.resting == frozenset()


@pytest.mark.parametrize("show_resting", [False, True])
def test_what_stalls_at_another_rate_does_not_rest(show_resting: bool) -> None:
    step = show(snapshot("w", [1.0], [1.0]), show_resting=show_resting)
    assert step.names == ("w",)
    assert step.resting == frozenset()


def test_on_demand_what_rests_is_shown_and_named() -> None:
    several = (
        snapshot("still", [1.0], [1.0], rests=True),
        snapshot("moved", [1.0], [2.0], rests=True),
        snapshot("stalled", [1.0], [1.0]),
    )
    step = show(*several, show_resting=True)
    assert step.names == ("still", "moved", "stalled")
    assert [each.item() for each in step.after] == [1.0, 2.0, 1.0]
    assert step.resting == {"still"}


@pytest.mark.parametrize("found_inf", [torch.zeros(1), torch.ones(1)], ids=["stepped", "skipped"])
def test_whether_a_fused_optimizer_skipped_the_step_is_passed_on_unread(found_inf: Tensor) -> None:
    moved = snapshot("w", [1.0], [2.0])
    optimizer = optimizer_of(moved)
    optimizer.found_inf = found_inf
    assert step_of([moved], optimizer, 0).found_inf is found_inf


def test_a_step_cannot_be_changed() -> None:
    step = show(snapshot("w", [1.0], [2.0]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        step.index = 0


def test_steps_are_compared_by_identity() -> None:
    model, optimizer = training()
    steps = Kept()
    with StepObserver(model, steps).attach(optimizer):
        for _ in range(2):
            set_gradients(model)
            optimizer.step()
    assert steps[0] != steps[1]
    assert len({*steps}) == 2
