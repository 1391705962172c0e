"""`StepObserver`: training is the same with and without it, also where it fails."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import AdamW, Optimizer

from altgrad import OptimizerStep, StepObserver
from tests.observation.watching import (
    INF,
    Kept,
    assert_exact,
    equal,
    hook_count,
    raises,
    scaled_step,
    set_gradients,
    training,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("choose_of_small_parameters_too")


def train(
    attach: Callable[[nn.Module, Optimizer], StepObserver] | None, kind: type[Optimizer] = AdamW
) -> tuple[list[Tensor], dict, Tensor]:
    """Weights, state and global random state after five steps from one seed."""
    model, optimizer = training(kind)
    observer = attach(model, optimizer) if attach is not None else None
    for seed in range(5):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        nn.functional.dropout(model(torch.randn(4, 3))).square().sum().backward()
        optimizer.step()
    if observer is not None:
        observer.detach()
    state = {f"{i}{k}": v for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}
    return weights_of(model), state, torch.get_rng_state()


def assert_same(one, other) -> None:
    assert equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    assert equal(list(one[1].values()), list(other[1].values()))
    assert torch.equal(one[2], other[2])


@pytest.mark.parametrize("elements", [None, lambda name, p: torch.tensor([1, 0])])
def test_training_is_the_same_with_and_without(elements) -> None:
    steps = Kept()

    def attach(model: nn.Module, optimizer: Optimizer) -> StepObserver:
        return StepObserver(model, steps, elements=elements).attach(optimizer)

    assert_same(train(attach), train(None))
    assert len(steps) == 5


FAULTS = {
    "on_step": ({}, "raises"),
    "should_observe": ({"should_observe": raises}, "raises"),
    "elements": ({"elements": raises}, "raises"),
    "wrong elements": ({"elements": lambda name, p: torch.tensor([-1])}, "_check_indices"),
}


@pytest.mark.parametrize("place", FAULTS)
def test_a_fault_is_warned_of_once_and_training_goes_on(place: str) -> None:
    options, function = FAULTS[place]

    def attach(model: nn.Module, optimizer: Optimizer) -> StepObserver:
        on_step = raises if place == "on_step" else lambda step: None
        return StepObserver(model, on_step, **options).attach(optimizer)

    with pytest.warns(UserWarning, match="StepObserver stops observing after a fault") as caught:
        result = train(attach)
    assert_same(result, train(None))
    (warning,) = caught
    text = str(warning.message)
    assert f" in {function}, " in text
    assert ("ValueError" if place == "wrong elements" else "ArithmeticError('of the user')") in text
    assert text.endswith(". Training goes on; strict=True would raise it")
    assert ".py:" in text


@pytest.mark.parametrize("place", FAULTS)
def test_a_fault_is_raised_into_strict_training(place: str) -> None:
    options, _ = FAULTS[place]
    model, optimizer = training()
    on_step = raises if place == "on_step" else lambda step: None
    observer = StepObserver(model, on_step, strict=True, **options).attach(optimizer)
    set_gradients(model)
    expected = ValueError if place == "wrong elements" else ArithmeticError
    with pytest.raises(expected):
        optimizer.step()
    optimizer.step()  # the observation has ended
    observer.detach()
    assert hook_count(optimizer) == 0


def test_a_fault_of_one_observer_does_not_end_another() -> None:
    model, optimizer = training()
    steps = Kept()
    faulty = StepObserver(model, raises).attach(optimizer)
    with StepObserver(model, steps).attach(optimizer):
        set_gradients(model)
        with pytest.warns(UserWarning, match="stops observing"):
            optimizer.step()
        optimizer.step()
    assert len(steps) == 2
    faulty.detach()


def test_after_a_fault_the_observer_can_be_attached_again() -> None:
    model, optimizer = training()
    steps = Kept()
    faults = [ArithmeticError("once")]

    def on_step(step: OptimizerStep) -> None:
        if faults:
            raise faults.pop()
        steps(step)

    observer = StepObserver(model, on_step).attach(optimizer)
    set_gradients(model)
    with pytest.warns(UserWarning, match="stops observing"):
        optimizer.step()
    optimizer.step()
    assert not steps
    with observer.attach(optimizer):
        assert hook_count(optimizer) == 2
        set_gradients(model, seed=4)
        optimizer.step()
    assert_exact(steps[0], model, optimizer, 0, seed=4)


def test_a_fault_in_the_policy_where_a_scaler_skips_is_warned_of() -> None:
    model, optimizer = training()
    scaler = GradScaler("cpu", init_scale=4.0)
    with StepObserver(model, print, raises).attach(optimizer, scaler=scaler) as observer:
        with pytest.warns(UserWarning, match="stops observing after a fault"):
            scaled_step(scaler, model, optimizer, INF)
        scaled_step(scaler, model, optimizer, INF)
    assert not observer.skipped


def test_after_a_fault_attach_begins_anew() -> None:
    model, optimizer = training()
    observer = StepObserver(model, raises).attach(optimizer)
    set_gradients(model)
    for _ in range(3):
        with pytest.warns(UserWarning, match="stops observing after a fault"):
            optimizer.step()
        observer.attach(optimizer)
    assert len(observer._hooks) == len(observer._snapshots) == 1
    assert hook_count(optimizer) == 2
