"""`StepObserver` holds nothing longer than it must, and says how much it held."""

import gc
import logging
import subprocess
import sys
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import SGD

from altgrad import OptimizerStep, StepObserver
from tests.observation.watching import (
    RATE,
    Kept,
    assert_exact,
    hook_count,
    make_model,
    raises,
    set_gradients,
    training,
)

pytestmark = pytest.mark.usefixtures("choose_of_small_parameters_too")


# Nothing is held


def test_a_dropped_observer_takes_its_hooks_along() -> None:
    model, optimizer = training()
    scaler = GradScaler("cpu")
    observer = StepObserver(model, lambda step: None).attach(optimizer, scaler=scaler)
    set_gradients(model)
    optimizer.step()
    gone = weakref.ref(observer)
    del observer
    assert gone() is None
    assert hook_count(optimizer) == 0
    assert "step" not in vars(scaler)


def test_an_observer_that_is_not_held_is_warned_of() -> None:
    model, optimizer = training()
    with pytest.warns(UserWarning, match="was collected before its first step: hold it in a vari"):
        StepObserver(model, print).attach(optimizer)
    assert hook_count(optimizer) == 0


def test_an_observer_that_is_not_held_leaves_no_hooks_where_warnings_are_errors(
    monkeypatch,
) -> None:
    model, optimizer = training()
    raised = []
    monkeypatch.setattr(sys, "unraisablehook", raised.append)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StepObserver(model, print).attach(optimizer)
    assert len(raised) == 1
    assert hook_count(optimizer) == 0


def test_a_program_that_ends_before_the_first_step_ends_without_a_word() -> None:
    script = """
import torch, altgrad
model = torch.nn.Linear(1, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
observer = altgrad.StepObserver(model, print).attach(optimizer)
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "StepObserver" not in ended.stderr


@pytest.mark.parametrize("end", ["never attached", "detached", "optimizer gone"])
def test_an_observer_that_could_not_have_observed_is_not_warned_of(end: str) -> None:
    model, optimizer = training()
    observer = StepObserver(model, print)
    if end != "never attached":
        observer.attach(optimizer)
    if end == "detached":
        observer.detach()
    del optimizer
    gc.collect()
    del observer


def test_an_observer_holds_no_optimizer_and_a_dropped_one_no_model() -> None:
    model, optimizer = training()
    observer = StepObserver(model, Kept()).attach(optimizer)
    set_gradients(model)
    optimizer.step()
    parts = [weakref.ref(part) for part in (optimizer, model, model[0].weight)]
    observer._on_step.clear()
    del optimizer
    gc.collect()
    assert parts[0]() is None
    assert parts[1]() is model
    del model, observer
    gc.collect()
    assert all(part() is None for part in parts)


def test_a_detached_observer_holds_no_parameter_of_another_module() -> None:
    model = make_model()
    foreign = nn.Parameter(torch.ones(2))
    optimizer = SGD([*model.parameters(), foreign], lr=RATE)
    observer = StepObserver(model, lambda step: None).attach(optimizer)
    set_gradients(model)
    optimizer.step()
    observer.detach()
    gone = weakref.ref(foreign)
    del foreign, optimizer
    gc.collect()
    assert gone() is None


def test_model_optimizer_and_observer_in_a_cycle_are_collected() -> None:
    model, optimizer = training()
    model.observer = StepObserver(model, model.forward).attach(optimizer, scaler=GradScaler("cpu"))
    model.optimizer = optimizer
    set_gradients(model)
    with pytest.warns(UserWarning, match="stops observing"):
        optimizer.step()
    parts = [weakref.ref(part) for part in (model, optimizer, model.observer)]
    del model, optimizer
    gc.collect()
    assert all(part() is None for part in parts)


class Held:
    """The memory of the copies, after every reference that a test could have is gone."""

    def __init__(self) -> None:
        self._references: list[weakref.ref] = []

    def note(self, step: OptimizerStep) -> None:
        self._references += [weakref.ref(t) for t in (*step.before, *step.gradients)]

    def note_taken(self, observer: StepObserver) -> None:
        for each in observer._hooks[0]._captured:
            self._references += [weakref.ref(each.before), weakref.ref(each.gradient)]

    def count(self) -> int:
        assert self._references
        return sum(reference() is not None for reference in self._references)


@pytest.mark.parametrize("elements", [None, lambda name, p: torch.tensor([0])])
def test_detaching_lets_go_of_every_copy(elements) -> None:
    model, optimizer = training()
    held = Held()
    observer = StepObserver(model, held.note, elements=elements).attach(optimizer)
    set_gradients(model)
    optimizer.step()
    assert held.count() == 8
    observer.detach()
    assert held.count() == 0


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_a_step_that_raises_leaves_no_copy_and_the_next_observation_is_exact(kind: type) -> None:
    model, optimizer = training()
    held, steps = Held(), Kept()

    def fail(*_: object) -> None:
        held.note_taken(observer)
        raise kind

    observer = StepObserver(model, steps)
    with observer.attach(optimizer):
        handle = optimizer.register_step_pre_hook(fail)
        set_gradients(model)
        with pytest.raises(kind):
            optimizer.step()
        handle.remove()
        assert observer._hooks[0]._captured is not None
        set_gradients(model, seed=3)
        optimizer.step()
        assert_exact(steps[-1], model, optimizer, 0, seed=3)
        handle = optimizer.register_step_pre_hook(fail)
        with pytest.raises(kind):
            optimizer.step()
        handle.remove()
    assert held.count() == 0
    assert hook_count(optimizer) == 0
    assert len(steps) == 1


@pytest.mark.parametrize("strict", [False, True])
def test_a_fault_lets_go_of_every_copy(strict: bool) -> None:
    model, optimizer = training()
    held = Held()

    def on_step(step: OptimizerStep) -> None:
        held.note(step)
        raises()

    observer = StepObserver(model, on_step, strict=strict).attach(optimizer)
    set_gradients(model)
    if strict:
        with pytest.raises(ArithmeticError):
            optimizer.step()
    else:
        with pytest.warns(UserWarning, match="stops observing"):
            optimizer.step()
    assert held.count() == 0
    observer.detach()
    assert hook_count(optimizer) == 0


def test_a_keyboard_interrupt_in_on_step_passes_and_leaves_nothing() -> None:
    model, optimizer = training()
    held = Held()

    def on_step(step: OptimizerStep) -> None:
        held.note(step)
        raise KeyboardInterrupt

    with StepObserver(model, on_step).attach(optimizer):
        set_gradients(model)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    assert held.count() == 0
    assert hook_count(optimizer) == 0


def test_a_keyboard_interrupt_in_the_policy_passes() -> None:
    def interrupted(index: int) -> bool:
        raise KeyboardInterrupt

    model, optimizer = training()
    with StepObserver(model, print, interrupted).attach(optimizer):
        set_gradients(model)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    assert hook_count(optimizer) == 0


def test_an_observer_that_its_own_arguments_refer_to_is_collected() -> None:
    class Owner:
        def __init__(self, model, optimizer):
            self.observer = StepObserver(model, self.show, self.due, elements=self.choose)
            self.observer.attach(optimizer)

        def show(self, step):
            pass

        def due(self, index):
            return True

        def choose(self, name, parameter):
            return None

    model, optimizer = training()
    owner = Owner(model, optimizer)
    set_gradients(model)
    optimizer.step()
    gone = weakref.ref(owner)
    del owner
    gc.collect()
    assert gone() is None
    assert hook_count(optimizer) == 0


def test_optimizers_that_are_gone_leave_no_copies() -> None:
    model, _ = training()
    observer = StepObserver(model, lambda step: None)
    for _ in range(5):
        optimizer = SGD(model.parameters(), lr=RATE)
        observer.attach(optimizer)
        set_gradients(model)
        optimizer.step()
        del optimizer
        gc.collect()
    observer.attach(SGD(model.parameters(), lr=RATE))
    assert len(observer._hooks) == len(observer._snapshots) == 1
    assert observer.peak_bytes <= 2 * 2 * 4 * sum(p.numel() for p in model.parameters())


# Memory


def test_the_peak_of_the_memory_is_logged_once_in_the_end(caplog) -> None:
    model, optimizer = training()
    observer = StepObserver(model, lambda step: None, lambda index: index > 0)
    with caplog.at_level(logging.INFO, logger="altgrad"):
        observer.attach(optimizer).detach()
        assert not caplog.records  # nothing was copied
        with observer.attach(optimizer):
            set_gradients(model)
            for _ in range(3):
                optimizer.step()
        observer.detach()
    count = 2 * 4 * sum(p.numel() for p in model.parameters())
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("altgrad", "INFO")
    assert record.getMessage() == f"the copies of observed steps took up to {count} bytes"
    assert observer.peak_bytes == count


def test_elements_are_chosen_once_also_when_attached_again() -> None:
    model, optimizer = training()
    names = []
    observer = StepObserver(
        model, lambda step: None, elements=lambda name, p: names.append((name, p.shape))
    )
    for _ in range(2):
        with observer.attach(optimizer):
            set_gradients(model)
            optimizer.step()
    assert names == [(name, p.shape) for name, p in model.named_parameters()]
