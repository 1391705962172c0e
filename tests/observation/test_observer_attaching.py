"""`StepObserver`: attach and detach, once, twice, again and during a step."""

import sys
import types

import pytest
from torch import nn
from torch.amp import GradScaler
from torch.optim import SGD

from altgrad import OptimizerStep, StepObserver
from tests.observation.watching import (
    INF,
    RATE,
    Kept,
    assert_exact,
    hook_count,
    make_model,
    raises,
    scaled_step,
    set_gradients,
    training,
)


def test_attaching_twice_shows_each_step_once() -> None:
    model, optimizer = training()
    steps = Kept()
    observer = StepObserver(model, steps)
    assert observer.attach(optimizer, optimizer) is observer
    observer.attach(optimizer)
    assert hook_count(optimizer) == 2
    set_gradients(model)
    optimizer.step()
    assert len(steps) == 1
    observer.detach()
    assert hook_count(optimizer) == 0
    optimizer.step()
    assert len(steps) == 1
    observer.detach()


def test_attaching_another_optimizer_keeps_the_earlier_ones() -> None:
    model = make_model()
    optimizers = [SGD(layer.parameters(), lr=RATE) for layer in model]
    steps = Kept()
    observer = StepObserver(model, steps)
    for optimizer in optimizers:
        observer.attach(optimizer)
        set_gradients(model)
        for each in optimizers:
            each.step()
    assert [(optimizers.index(step.optimizer), step.index) for step in steps] == [
        (0, 0),
        (0, 1),
        (1, 0),
    ]
    observer.detach()


def test_a_detached_observer_can_be_attached_again() -> None:
    model, optimizer = training()
    steps = Kept()
    observer = StepObserver(model, steps)
    for seed in range(2):
        with observer.attach(optimizer):
            set_gradients(model, seed)
            optimizer.step()
        assert_exact(steps[-1], model, optimizer, 0, seed)
        optimizer.step()
    assert len(steps) == 2


def test_an_error_of_attach_leaves_nothing_attached() -> None:
    model, optimizer = training()
    observer = StepObserver(model, print)
    with pytest.raises(ValueError, match="steps none of the observed parameters"):
        observer.attach(optimizer, SGD(nn.Linear(1, 1).parameters(), lr=RATE))
    with pytest.raises(TypeError, match="optimizer=Linear: expected"):
        observer.attach(optimizer, model[0])
    assert hook_count(optimizer) == 0


def test_a_scaler_of_another_type_is_refused_and_leaves_nothing_attached() -> None:
    model, optimizer = training()
    observer = StepObserver(model, print)
    with pytest.raises(TypeError, match="scaler"):
        observer.attach(optimizer, scaler="native")
    assert hook_count(optimizer) == 0


def test_detaching_within_on_step_ends_the_observation() -> None:
    model, optimizer = training()
    steps = Kept()

    def on_step(step: OptimizerStep) -> None:
        steps(step)
        observer.detach()

    other = StepObserver(model, others := Kept())
    observer = StepObserver(model, on_step).attach(optimizer)
    other.attach(optimizer)
    for _ in range(2):
        set_gradients(model)
        optimizer.step()
    assert (len(steps), len(others)) == (1, 2)
    observer.detach()
    other.detach()
    assert hook_count(optimizer) == 0


def test_detaching_within_should_observe_ends_the_observation_before_this_step() -> None:
    def should_observe(index: int) -> bool:
        observer.detach()
        return True

    model, optimizer = training()
    observer = StepObserver(model, raises, should_observe).attach(optimizer)
    set_gradients(model)
    optimizer.step()
    assert observer.peak_bytes == 0
    observer.detach()
    assert hook_count(optimizer) == 0


def test_asking_is_the_optimizer_only_while_should_observe_is_called() -> None:
    model = make_model()
    optimizers = [SGD(layer.parameters(), lr=RATE) for layer in model]
    asked = []
    observer = StepObserver(model, print, lambda index: bool(asked.append(observer.asking)))
    with observer.attach(*optimizers):
        for optimizer in reversed(optimizers):
            optimizer.step()
            with pytest.raises(RuntimeError, match="asking: expected a call of should_observe"):
                _ = observer.asking
    assert asked == optimizers[::-1]


@pytest.mark.parametrize("how", ["collected", "attached"])
def test_hooks_left_by_detaching_within_on_step_are_removed_later(how: str) -> None:
    model, optimizer = training()
    observers = [StepObserver(model, lambda step: observers[0].detach())]
    observers[0].attach(optimizer)
    set_gradients(model)
    optimizer.step()
    assert hook_count(optimizer) == 2
    if how == "collected":
        observers.clear()
        assert hook_count(optimizer) == 0
    else:
        other = SGD(model.parameters(), lr=RATE)
        observers[0].attach(other)
        assert (hook_count(optimizer), hook_count(other)) == (0, 2)
        observers[0].detach()


def test_detaching_between_the_backward_pass_and_the_update_forgets_the_step() -> None:
    model, optimizer = training()
    steps = Kept()
    observer = StepObserver(model, steps).attach(optimizer)

    def closure() -> None:
        set_gradients(model)
        observer.detach()

    optimizer.step(closure)
    assert not steps
    assert not observer.skipped
    observer.detach()
    assert hook_count(optimizer) == 0


def test_attaching_within_on_step_works_except_for_the_optimizer_that_is_stepping() -> None:
    model, optimizer = training()
    other = SGD(model.parameters(), lr=RATE)
    steps, errors = Kept(), []
    late = StepObserver(model, steps)

    def on_step(step: OptimizerStep) -> None:
        if step.optimizer is optimizer and step.index == 0:
            observer.attach(optimizer, other)
            try:
                late.attach(optimizer)
            except RuntimeError as error:
                errors.append(str(error))
            late.attach(other)

    observer = StepObserver(model, on_step).attach(optimizer)
    for each in (optimizer, other, optimizer):
        set_gradients(model)
        each.step()
    assert ["under way" in error for error in errors] == [True]
    assert (hook_count(optimizer), hook_count(other)) == (2, 4)
    assert [step.optimizer for step in steps] == [other]
    observer.detach()
    late.detach()


def test_detaching_and_attaching_within_on_step_continues_the_observation() -> None:
    model, optimizer = training()
    indices = []

    def on_step(step: OptimizerStep) -> None:
        indices.append(step.index)
        observer.detach()
        observer.attach(optimizer)

    observer = StepObserver(model, on_step).attach(optimizer)
    for _ in range(3):
        set_gradients(model)
        optimizer.step()
    assert indices == [0, 1, 2]
    observer.detach()
    assert hook_count(optimizer) == 0


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_exception_in_the_with_block_passes_and_detaches(kind: type) -> None:
    model, optimizer = training()
    with pytest.raises(kind), StepObserver(model, print).attach(optimizer):
        raise kind
    assert hook_count(optimizer) == 0


def test_a_scaler_can_be_attached_again_after_a_detach() -> None:
    model, optimizer = training()
    scaler = GradScaler("cpu", init_scale=4.0)
    observer = StepObserver(model, print)
    for count in (1, 2):
        with observer.attach(optimizer, scaler=scaler):
            scaled_step(scaler, model, optimizer, INF)
        assert observer.skipped == {"inf": count}


def test_fsdp1_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class FullyShardedDataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self._fsdp_wrapped_module = module

    package = types.SimpleNamespace(FullyShardedDataParallel=FullyShardedDataParallel)
    monkeypatch.setitem(sys.modules, "torch.distributed.fsdp", package)
    model = nn.Sequential(FullyShardedDataParallel(nn.Linear(2, 2)))
    optimizer = SGD(model.parameters(), lr=RATE)
    with pytest.raises(ValueError, match="FullyShardedDataParallel"):
        StepObserver(model, print).attach(optimizer)
    assert hook_count(optimizer) == 0
