"""`StepHooks`: forget, remove, and who holds whom."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch.optim import SGD

from tests.observation.recorder import (
    RATE,
    Failing,
    Recorder,
    assert_next_step_is_exact,
    weights,
)


def test_what_is_forgotten_within_a_step_is_not_finished() -> None:
    p = weights()
    optimizer = SGD([p], lr=RATE)
    recorder = Recorder(optimizer)

    def closure() -> None:
        p.grad = torch.ones(2)
        recorder.hooks.forget()

    optimizer.step(closure)
    assert recorder.calls == ["due"]
    assert_next_step_is_exact(recorder, optimizer, p, index=1)


def test_what_is_forgotten_is_freed() -> None:
    optimizer = Failing([weights()], lr=RATE)
    recorder = Recorder(optimizer)
    optimizer.late = ValueError("late")
    with pytest.raises(ValueError, match="late"):
        optimizer.step()
    held = [weakref.ref(tensor) for tensor in recorder.hooks._captured]
    assert all(each() is not None for each in held)
    recorder.hooks.forget()
    assert all(each() is None for each in held)


def test_a_finished_step_is_not_held() -> None:
    optimizer = SGD([weights()], lr=RATE)
    recorder = Recorder(optimizer)
    optimizer.step()
    held = [weakref.ref(tensor) for tensor in recorder.steps.pop()[1:]]
    assert all(each() is None for each in held)


def test_removed_hooks_call_no_more() -> None:
    optimizer = SGD([weights()], lr=RATE)
    recorder = Recorder(optimizer)
    assert recorder.hooks.remove()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    optimizer.step()
    assert recorder.calls == []
    assert recorder.hooks.remove()  # harmless


@pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
def test_within_a_step_hooks_are_not_removed(register: str) -> None:
    optimizer = SGD([weights()], lr=RATE)
    recorder = Recorder(optimizer)
    removed = []

    def remove(*_: object) -> None:
        removed.append(recorder.hooks.remove())

    getattr(optimizer, register)(remove)
    optimizer.step()
    assert removed == [False]
    assert recorder.calls == ["due", "capture", "finish"]
    assert recorder.hooks.remove()


def test_hooks_of_an_optimizer_that_is_gone_are_removed() -> None:
    optimizer = SGD([weights()], lr=RATE)
    recorder = Recorder(optimizer)
    assert recorder.hooks.optimizer is optimizer
    del optimizer
    gc.collect()
    assert recorder.hooks.optimizer is None
    assert recorder.hooks.remove()


def test_without_the_object_that_is_called_a_step_is_a_plain_one() -> None:
    p = weights()
    optimizer = SGD([p], lr=RATE)
    recorder = Recorder(optimizer)
    calls, gone = recorder.calls, weakref.ref(recorder)
    del recorder
    assert gone() is None
    optimizer.step(lambda: None)
    assert calls == []
    assert p.tolist() == [0.5, 1.5]


def test_an_object_that_goes_in_mid_step_is_not_called_again() -> None:
    optimizer = SGD([weights()], lr=RATE)
    recorders = [Recorder(optimizer)]
    calls = recorders[0].calls
    optimizer.step(recorders.clear)
    assert calls == ["due"]
    recorders.append(Recorder(optimizer))
    calls = recorders[0].calls
    optimizer.register_step_pre_hook(lambda *_: recorders.clear())
    optimizer.step()
    assert calls == ["due", "capture"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_an_observed_optimizer_can_be_copied_without_its_hooks(copied) -> None:
    optimizer = SGD([weights()], lr=RATE)
    recorder = Recorder(optimizer)
    copied(optimizer).step()
    assert recorder.calls == []
