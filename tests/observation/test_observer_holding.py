"""`StepObserver` releases objects as early as possible, and reports its memory."""

import gc
import logging
import subprocess
import sys
import warnings
import weakref
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import distributed, nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD

from altgrad import OptimizerStep, StepObserver
from altgrad.observation import StepOutcome
from altgrad.observation.snapshots import Snapshots
from tests.observation.watching import (
    RATE,
    Held,
    Kept,
    assert_exact,
    hook_count,
    make_model,
    raises,
    set_gradients,
    training,
)


@pytest.fixture
def process_group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


# References


def test_hooks_are_removed_when_the_observer_is_collected() -> None:
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


def test_an_observer_without_a_reference_causes_a_warning() -> None:
    model, optimizer = training()
    with pytest.warns(UserWarning, match="was collected before its first step: hold it in a vari"):
        StepObserver(model, print).attach(optimizer)
    assert hook_count(optimizer) == 0


def test_an_observer_without_a_reference_leaves_no_hooks_if_warnings_are_errors(
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


def test_a_program_that_ends_before_the_first_step_gives_no_warning() -> None:
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
def test_an_observer_without_attached_optimizers_causes_no_warning(end: str) -> None:
    model, optimizer = training()
    observer = StepObserver(model, print)
    if end != "never attached":
        observer.attach(optimizer)
    if end == "detached":
        observer.detach()
    del optimizer
    gc.collect()
    del observer


def test_an_observer_keeps_its_model_alive_but_no_optimizer() -> None:
    model, optimizer = training()
    steps = Kept()
    observer = StepObserver(model, steps).attach(optimizer)
    set_gradients(model)
    optimizer.step()
    parts = [weakref.ref(part) for part in (optimizer, model, model[0].weight)]
    steps.clear()
    del optimizer
    gc.collect()
    assert parts[0]() is None
    assert parts[1]() is model
    del model, observer
    gc.collect()
    assert all(part() is None for part in parts)


def test_a_detached_observer_keeps_no_parameter_of_another_module_alive() -> None:
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


@pytest.mark.parametrize("elements", [None, lambda name, p: torch.tensor([0])])
def test_detaching_releases_every_copy(elements) -> None:
    model, optimizer = training()
    held = Held()
    observer = StepObserver(model, held.note, elements=elements).attach(optimizer)
    set_gradients(model)
    optimizer.step()
    assert held.count() == 8
    observer.detach()
    assert held.count() == 0


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Held:
    """Yield all copies that are made, also those of steps that raise an error."""
    held, take = Held(), Snapshots.take
    monkeypatch.setattr(Snapshots, "take", lambda *inputs: held.note_taken(take(*inputs)))
    return held


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_the_step_after_one_that_raised_is_exact_and_detaching_releases_every_copy(
    kind: type, taken: Held
) -> None:
    model, optimizer = training()
    steps = Kept()

    def fail(*_: object) -> None:
        raise kind

    with StepObserver(model, steps).attach(optimizer):
        handle = optimizer.register_step_pre_hook(fail)
        set_gradients(model)
        with pytest.raises(kind):
            optimizer.step()
        handle.remove()
        assert taken.count() == 8
        set_gradients(model, seed=3)
        optimizer.step()
        assert_exact(steps[-1], model, optimizer, 0, seed=3)
        handle = optimizer.register_step_pre_hook(fail)
        with pytest.raises(kind):
            optimizer.step()
        handle.remove()
    assert taken.count() == 0
    assert hook_count(optimizer) == 0
    assert len(steps) == 1


@pytest.mark.parametrize("strict", [False, True])
def test_an_error_in_on_step_releases_every_copy(strict: bool) -> None:
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


@pytest.fixture
def collected_by_counting_alone() -> Iterator[None]:
    """Disable the garbage collector, so that objects in a cycle stay alive."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("collected_by_counting_alone")
@pytest.mark.parametrize("raised_by", ["the observer", "the callback"])
def test_an_error_while_copying_releases_every_copy(raised_by: str) -> None:
    model, optimizer = training()
    held, asked = Held(), []

    def elements(name: str, parameter: object) -> None:
        asked.append(name)
        if name == "2.weight":
            raises()

    def on_outcome(outcome: StepOutcome) -> None:
        if outcome.error is not None:
            raise outcome.error
        held.note(outcome.step)

    callback = {"on_outcome": on_outcome} if raised_by == "the callback" else {"on_step": held.note}
    observer = StepObserver(model, elements=elements, **callback).attach(optimizer)
    set_gradients(model)
    optimizer.step()
    assert held.count() == 8
    model.append(nn.Linear(2, 2))
    optimizer.add_param_group({"params": model[2].parameters()})
    set_gradients(model)
    with pytest.warns(UserWarning, match="ArithmeticError.* in raises,"):
        optimizer.step()
    assert held.count() == 0
    assert not observer.is_observing


@pytest.mark.usefixtures("collected_by_counting_alone")
def test_an_error_after_the_step_releases_every_copy(taken: Held) -> None:
    model, optimizer = training()
    unreadable = SimpleNamespace(item=raises)
    optimizer.register_step_post_hook(lambda *_: setattr(optimizer, "found_inf", unreadable))
    observer = StepObserver(model, print).attach(optimizer)
    set_gradients(model)
    with pytest.warns(UserWarning, match="ArithmeticError.* in raises,"):
        optimizer.step()
    assert taken.count() == 0
    assert not observer.is_observing


def test_a_keyboard_interrupt_in_on_step_passes_through_and_releases_every_copy() -> None:
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


def test_a_keyboard_interrupt_in_should_observe_passes_through() -> None:
    def interrupted(index: int) -> bool:
        raise KeyboardInterrupt

    model, optimizer = training()
    with StepObserver(model, print, interrupted).attach(optimizer):
        set_gradients(model)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    assert hook_count(optimizer) == 0


def test_an_observer_in_a_cycle_with_its_callbacks_is_collected() -> None:
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


@pytest.mark.parametrize("should_observe", [None, lambda index: True])
def test_collected_optimizers_leave_no_copies(should_observe) -> None:
    model, _ = training()
    held = Held()
    observer = StepObserver(model, held.note, should_observe)
    for _ in range(5):
        optimizer = SGD(model.parameters(), lr=RATE)
        observer.attach(optimizer)
        set_gradients(model)
        optimizer.step()
        assert held.count() == 8  # the copies of this optimizer alone
        del optimizer
        gc.collect()
    last = SGD(model.parameters(), lr=RATE)
    observer.attach(last)
    assert observer.optimizers == [last]
    assert held.count() == 0
    assert observer.peak_bytes == 2 * 4 * sum(p.numel() for p in model.parameters())
    observer.detach()


def test_a_parameter_removed_from_the_module_is_released() -> None:
    """Its chosen elements are released, too."""
    model, optimizer = training()
    steps, gone = [], []
    observer = StepObserver(model, steps.append, elements=lambda name, p: torch.tensor([0]))
    with observer.attach(optimizer):
        for _ in range(3):
            set_gradients(model)
            optimizer.step()
            steps.clear()
            gone.append(weakref.ref(model[0].weight))
            model[0].weight = nn.Parameter(torch.ones(4, 3))
            optimizer.param_groups[0]["params"][0] = model[0].weight
            optimizer.state.clear()
        set_gradients(model)
        optimizer.step()
        gc.collect()
        assert [reference() for reference in gone] == [None] * 3


@pytest.mark.usefixtures("process_group")
def test_parameters_of_fsdp2_can_be_moved_while_their_elements_are_observed() -> None:
    """torch moves them with `swap_tensors`, which refuses tensors with weak references."""
    model = fully_shard(nn.Linear(4, 2), mesh=init_device_mesh("cpu", (1,)))
    optimizer = SGD(model.parameters(), lr=RATE)
    steps = Kept()
    observer = StepObserver(model, steps, elements=lambda name, p: torch.tensor([1]), strict=True)
    with observer.attach(optimizer):
        for _ in range(2):
            model.cpu()
            optimizer.zero_grad()
            model(torch.ones(1, 4)).sum().backward()
            optimizer.step()
    assert [step.index for step in steps] == [0, 1]
    assert steps[1].after[0] == steps[1].before[0] - RATE


# Memory


def test_peak_bytes_is_logged_once_when_the_observer_detaches(caplog) -> None:
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


def test_a_second_attach_does_not_choose_the_elements_again() -> None:
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
