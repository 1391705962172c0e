"""`StepObserver`: training is the same with and without it, also after an error."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import AdamW, Optimizer

from altgrad import OptimizerStep, StepObserver
from altgrad.observation.observer import RankError, describe_error
from tests.observation.watching import (
    INF,
    Held,
    Kept,
    assert_exact,
    clone_weights,
    equal,
    hook_count,
    raises,
    scaled_step,
    set_gradients,
    training,
)


def train(
    attach: Callable[[nn.Module, Optimizer], StepObserver] | None, kind: type[Optimizer] = AdamW
) -> tuple[list[Tensor], dict, Tensor]:
    """Return weights, optimizer state and random state after five steps from one seed."""
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
    return clone_weights(model), state, torch.get_rng_state()


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


ERRORS = {
    "on_step": ({}, "raises"),
    "should_observe": ({"should_observe": raises}, "raises"),
    "elements": ({"elements": raises}, "raises"),
    "wrong elements": ({"elements": lambda name, p: torch.tensor([-1])}, "_check_indices"),
}


@pytest.mark.parametrize("place", ERRORS)
def test_an_error_gives_one_warning_and_training_goes_on(place: str) -> None:
    options, function = ERRORS[place]

    def attach(model: nn.Module, optimizer: Optimizer) -> StepObserver:
        on_step = raises if place == "on_step" else lambda step: None
        return StepObserver(model, on_step, **options).attach(optimizer)

    with pytest.warns(UserWarning, match="StepObserver stops observing after an error") as caught:
        result = train(attach)
    assert_same(result, train(None))
    (warning,) = caught
    text = str(warning.message)
    assert f" in {function}, " in text
    assert ("ValueError" if place == "wrong elements" else "ArithmeticError('of the user')") in text
    assert text.endswith(". Training goes on; strict=True would raise it")
    assert ".py:" in text


@pytest.mark.parametrize("place", ERRORS)
def test_a_strict_observer_raises_the_error_in_the_training_loop(place: str) -> None:
    options, _ = ERRORS[place]
    model, optimizer = training()
    on_step = raises if place == "on_step" else lambda step: None
    observer = StepObserver(model, on_step, strict=True, **options).attach(optimizer)
    set_gradients(model)
    expected = ValueError if place == "wrong elements" else ArithmeticError
    start = clone_weights(model)
    with pytest.raises(expected):
        optimizer.step()
    assert not any(map(torch.equal, clone_weights(model), start))  # raised after the update
    optimizer.step()  # the observation has ended
    observer.detach()
    assert hook_count(optimizer) == 0


def test_an_error_of_one_observer_does_not_end_another() -> None:
    model, optimizer = training()
    steps = Kept()
    failing = StepObserver(model, raises).attach(optimizer)
    with StepObserver(model, steps).attach(optimizer):
        set_gradients(model)
        with pytest.warns(UserWarning, match="stops observing"):
            optimizer.step()
        optimizer.step()
    assert len(steps) == 2
    failing.detach()


def test_after_an_error_the_observer_can_be_attached_again() -> None:
    model, optimizer = training()
    steps = Kept()
    errors = [ArithmeticError("once")]

    def on_step(step: OptimizerStep) -> None:
        if errors:
            raise errors.pop()
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


def test_an_error_in_should_observe_at_a_skipped_step_gives_a_warning() -> None:
    model, optimizer = training()
    scaler = GradScaler("cpu", init_scale=4.0)
    with StepObserver(model, print, raises).attach(optimizer, scaler=scaler) as observer:
        with pytest.warns(UserWarning, match="stops observing after an error"):
            scaled_step(scaler, model, optimizer, INF)
        scaled_step(scaler, model, optimizer, INF)
    assert not observer.skipped


def test_attach_begins_again_after_an_error_and_each_error_gives_a_warning() -> None:
    model, optimizer = training()
    held = Held()

    def on_step(step: OptimizerStep) -> None:
        held.note(step)
        raises()

    observer = StepObserver(model, on_step).attach(optimizer)
    set_gradients(model)
    for _ in range(3):
        with pytest.warns(UserWarning, match="stops observing after an error"):
            optimizer.step()
        observer.attach(optimizer)
    assert observer.optimizers == [optimizer]
    assert hook_count(optimizer) == 2
    assert held.count() == 0
    observer.detach()


def test_the_error_is_passed_to_tell_instead_of_a_warning() -> None:
    model, optimizer = training()
    told = []
    with StepObserver(model, raises, warn=told.append).attach(optimizer) as observer:
        set_gradients(model)
        optimizer.step()
        assert not observer.is_observing
    (text,) = told
    assert text.startswith("stops observing after an error: ArithmeticError('of the user') in rai")


def test_an_error_in_should_observe_is_reported_when_the_step_ends() -> None:
    model, optimizer = training()
    told, told_within = [], []
    optimizer.register_step_post_hook(lambda *_: told_within.append([*told]))
    with StepObserver(model, print, raises, warn=told.append).attach(optimizer):
        set_gradients(model)
        optimizer.step(lambda: told_within.append([*told]))
    assert told_within == [[], []]
    assert len(told) == 1


def test_a_rank_error_is_reported_with_its_message_alone() -> None:
    def on_step(step: OptimizerStep) -> None:
        raise RankError("rank 1 of 2: it failed")

    model, optimizer = training()
    with StepObserver(model, on_step).attach(optimizer):
        set_gradients(model)
        with pytest.warns(UserWarning, match=r"after an error: rank 1 of 2: it failed\. Training"):
            optimizer.step()


class UnprintableError(Exception):
    """An error that cannot write itself."""

    def __repr__(self) -> str:
        raise ValueError("no text")


@pytest.mark.parametrize(
    ("error", "text"),
    [(ArithmeticError("it"), "ArithmeticError('it')"), (UnprintableError(), "UnprintableError")],
    ids=["never raised", "unprintable"],
)
def test_every_error_can_be_described(error: Exception, text: str) -> None:
    assert describe_error(error) == text


def test_a_tell_that_fails_does_not_reach_the_training() -> None:
    def warn(_: str) -> None:
        raise OSError("disk full")

    model, optimizer = training()
    with StepObserver(model, raises, warn=warn).attach(optimizer):
        set_gradients(model)
        with pytest.warns(UserWarning, match=r"ArithmeticError.*; warn= failed: OSError"):
            optimizer.step()
