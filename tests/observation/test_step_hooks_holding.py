"""`StepHooks`: `forget`, `remove`, and the objects that they keep alive."""

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
from tests.observation.watching import hook_count


def test_forget_keeps_the_running_step_from_being_finished() -> None:
    p = weights()
    optimizer = SGD([p], lr=RATE)
    recorder = Recorder(optimizer)

    def closure() -> None:
        p.grad = torch.ones(2)
        recorder.hooks.forget()

    optimizer.step(closure)
    assert recorder.calls == ["due"]
    assert_next_step_is_exact(recorder, optimizer, p, index=1)


def test_forget_releases_what_was_captured() -> None:
    optimizer = Failing([weights()], lr=RATE)
    recorder = Recorder(optimizer)
    optimizer.late = ValueError("late")
    with pytest.raises(ValueError, match="late"):
        optimizer.step()
    assert [each() is None for each in recorder.copies] == [False, False]
    recorder.hooks.forget()
    assert [each() is None for each in recorder.copies] == [True, True]


def test_a_finished_step_is_released() -> None:
    optimizer = SGD([weights()], lr=RATE)
    recorder = Recorder(optimizer)
    optimizer.step()
    held = [weakref.ref(tensor) for tensor in recorder.steps.pop()[1:]]
    assert all(each() is None for each in held)


def test_removed_hooks_make_no_calls() -> None:
    optimizer = SGD([weights()], lr=RATE)
    recorder = Recorder(optimizer)
    assert recorder.hooks.remove()
    assert hook_count(optimizer) == 0
    optimizer.step()
    assert recorder.calls == []
    assert recorder.hooks.remove()  # harmless


@pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
def test_hooks_are_not_removed_during_a_step(register: str) -> None:
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


def test_hooks_of_a_collected_optimizer_are_removed() -> None:
    optimizer = SGD([weights()], lr=RATE)
    recorder = Recorder(optimizer)
    assert recorder.hooks.optimizer is optimizer
    del optimizer
    gc.collect()
    assert recorder.hooks.optimizer is None
    assert recorder.hooks.remove()


def test_a_collected_owner_is_not_called_and_the_step_is_made() -> None:
    p = weights()
    optimizer = SGD([p], lr=RATE)
    recorder = Recorder(optimizer)
    calls, gone = recorder.calls, weakref.ref(recorder)
    del recorder
    assert gone() is None
    optimizer.step(lambda: None)
    assert calls == []
    assert p.tolist() == [0.5, 1.5]


def test_an_owner_collected_during_a_step_is_not_called_again() -> None:
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
