"""`StepObserver` under a GradScaler: unscaled gradients, and skipped steps."""

import pytest
import torch
from torch.amp import GradScaler
from torch.optim import SGD, AdamW, Optimizer

from altgrad import StepObserver
from tests.observation.watching import (
    INF,
    RATE,
    Kept,
    clone_gradients,
    clone_weights,
    equal,
    raises,
    scaled_step,
    set_gradients,
    training,
)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("unscaled", [False, True], ids=["scaled", "unscaled"])
def test_gradients_under_a_scaler_are_shown_as_applied(fused: bool, unscaled: bool) -> None:
    model, optimizer = training(AdamW, fused=fused)
    scaler, steps = GradScaler("cpu", init_scale=3.0), Kept()
    with StepObserver(model, steps).attach(optimizer, scaler=scaler) as observer:
        scaler.scale(torch.ones(()))
        set_gradients(model)
        scaled = clone_gradients(model)
        if unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    divided = [g / 3 for g in scaled]
    # The scaler divides in place, unless the optimizer is fused and divides itself.
    assert equal(steps[0].gradients, divided if fused and not unscaled else clone_gradients(model))
    assert all(map(torch.allclose, steps[0].gradients, divided))
    assert equal(steps[0].after, clone_weights(model))
    assert not observer.skipped


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_steps_that_a_scaler_skips_are_counted_and_not_shown(fused: bool) -> None:
    model, optimizer = training(AdamW, fused=fused)
    scaler, steps = GradScaler("cpu", init_scale=4.0), Kept()
    start = clone_weights(model)
    with StepObserver(model, steps).attach(optimizer, scaler=scaler) as observer:
        scaled_step(scaler, model, optimizer, INF)
        assert equal(clone_weights(model), start)
        assert observer.skipped == {"inf": 1}
        scaled_step(scaler, model, optimizer, 1.0)
        scaled_step(scaler, model, optimizer, INF)
    assert observer.skipped == {"inf": 2}
    assert len(steps) == 1
    assert equal(steps[0].before, start)
    assert equal(steps[0].gradients, [torch.ones_like(p) for p in model.parameters()])
    assert "step" not in vars(scaler)
    scaled_step(scaler, model, optimizer, INF)
    assert observer.skipped == {"inf": 2}


def test_a_scaler_that_is_attached_twice_counts_once() -> None:
    model, optimizer = training()
    scaler = GradScaler("cpu", init_scale=4.0)
    observer = StepObserver(model, print).attach(optimizer, scaler=scaler)
    observer.attach(optimizer, scaler=scaler)
    scaled_step(scaler, model, optimizer, INF)
    assert observer.skipped == {"inf": 1}
    observer.detach()
    assert "step" not in vars(scaler)


def test_two_observers_count_the_skips_of_one_scaler() -> None:
    model, optimizer = training()
    scaler = GradScaler("cpu", init_scale=4.0)
    both = [StepObserver(model, lambda step: None).attach(optimizer, scaler=scaler) for _ in "ab"]
    scaled_step(scaler, model, optimizer, INF)
    assert [observer.skipped for observer in both] == [{"inf": 1}] * 2
    both[1].detach()
    scaled_step(scaler, model, optimizer, INF)
    assert [observer.skipped["inf"] for observer in both] == [2, 1]
    both[0].detach()
    assert "step" not in vars(scaler)


def test_skips_of_steps_that_are_not_due_and_of_other_optimizers_are_not_counted() -> None:
    model, optimizer = training()
    other = SGD(model.parameters(), lr=RATE)
    scaler, asked = GradScaler("cpu", init_scale=4.0), []
    observer = StepObserver(model, print, lambda index: bool(asked.append(index)))
    with observer.attach(optimizer, scaler=scaler):
        scaled_step(scaler, model, other, INF)
        assert asked == []
        scaled_step(scaler, model, optimizer, INF)
    assert asked == [0]
    assert not observer.skipped


def test_skips_by_the_scaler_of_a_wrapper_are_counted() -> None:
    class Wrapper:
        def __init__(self, optimizer: Optimizer, scaler: GradScaler | None) -> None:
            self.optimizer, self.scaler = optimizer, scaler

    model, optimizer = training()
    scaler = GradScaler("cpu", init_scale=4.0)
    with StepObserver(model, print).attach(Wrapper(optimizer, scaler)) as observer:
        scaled_step(scaler, model, optimizer, INF)
    assert observer.skipped == {"inf": 1}
    StepObserver(model, print).attach(Wrapper(optimizer, None)).detach()


def test_skipped_steps_are_shown_with_found_inf_if_the_observer_does_not_read_it() -> None:
    model, optimizer = training(AdamW, fused=True)
    scaler, steps = GradScaler("cpu", init_scale=4.0), Kept()
    observer = StepObserver(model, steps, read_found_inf=False)
    with observer.attach(optimizer, scaler=scaler):
        for factor in (INF, 1.0):
            scaled_step(scaler, model, optimizer, factor)
    assert [step.found_inf.item() for step in steps] == [1, 0]
    assert [step.index for step in steps] == [0, 1]
    assert equal(steps[0].before, steps[0].after)
    assert not observer.skipped


def test_should_observe_can_detach_at_a_skipped_step() -> None:
    model, optimizer = training()
    scaler = GradScaler("cpu", init_scale=4.0)

    def should_observe(index):
        observer.detach()
        return True

    observer = StepObserver(model, raises, should_observe).attach(optimizer, scaler=scaler)
    scaled_step(scaler, model, optimizer, float("inf"))
    assert "step" not in vars(scaler)
