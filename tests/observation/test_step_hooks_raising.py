"""`StepHooks`: a step that raises an error is not finished, and the next one is exact."""

import pytest
import torch
from torch.optim import SGD

from altgrad.observation.step_hooks import count_step_calls
from tests.observation.recorder import (
    RATE,
    Failing,
    Recorder,
    assert_next_step_is_exact,
    weights,
)


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("place", ["early", "late", "closure"])
def test_after_a_step_that_raised_the_next_one_is_exact(place: str, kind: type) -> None:
    SGD([weights()], lr=RATE)
    p = weights()
    optimizer = Failing([p], lr=RATE)
    recorder = Recorder(optimizer)
    optimizer.step()
    recorder.calls.clear()

    def closure() -> None:
        raise kind("here")

    if place != "closure":
        setattr(optimizer, place, kind("here"))
    with pytest.raises(kind, match="here"):
        optimizer.step(closure if place == "closure" else None)
    optimizer.early = optimizer.late = None
    assert "finish" not in recorder.calls
    assert count_step_calls(optimizer) == 0
    assert_next_step_is_exact(recorder, optimizer, p, index=1)


def test_a_step_with_a_closure_after_one_that_raised_captures_again() -> None:
    p = weights()
    optimizer = Failing([p], lr=RATE)
    recorder = Recorder(optimizer)
    optimizer.late = ValueError("late")
    with pytest.raises(ValueError, match="late"):
        optimizer.step()
    optimizer.late = None

    def closure() -> None:
        p.grad = torch.full((2,), 8.0)

    before = p.detach().clone()
    optimizer.step(closure)
    ((_, shown, gradient, after),) = recorder.steps
    assert torch.equal(shown, before)
    assert gradient.tolist() == [8, 8]
    assert torch.equal(after, before - 4)


def test_an_unobserved_step_after_one_that_raised_is_not_finished_with_its_copies() -> None:
    optimizer = Failing([weights()], lr=RATE)
    recorder = Recorder(optimizer)
    optimizer.late = ValueError("late")
    with pytest.raises(ValueError, match="late"):
        optimizer.step()
    optimizer.late, recorder.due = None, False
    recorder.calls.clear()
    assert [each() is None for each in recorder.copies] == [False, False]
    optimizer.step()
    assert recorder.calls == ["due"]
    assert [each() is None for each in recorder.copies] == [True, True]


def test_an_inner_step_that_raised_may_be_called_again() -> None:
    failures = [RuntimeError("once")]

    class Parent(SGD):
        def step(self, closure=None):
            super().step()
            if failures:
                raise failures.pop()

    class Stubborn(Parent):
        def step(self, closure=None):
            try:
                super().step()
            except RuntimeError:
                super().step()

    Parent([weights()], lr=RATE)
    p = weights()
    optimizer = Stubborn([p], lr=RATE)
    recorder = Recorder(optimizer)
    optimizer.step()
    assert not failures
    assert recorder.calls == ["due", "capture", "finish"]
    ((_, before, _, after),) = recorder.steps
    assert before.tolist() == [1, 2]
    assert after.tolist() == [0, 1]


def test_a_plain_step_after_a_nested_one_that_raised_is_finished() -> None:
    """The hooks must forget the nesting of the step that raised an error."""

    class Parent(SGD):
        def step(self, closure=None):
            return super().step()

    class Child(Parent):
        nests = True

        def step(self, closure=None):
            if self.nests:
                super().step()
                raise ValueError("nested")
            with torch.no_grad():
                p.sub_(RATE * p.grad)

    Parent([weights()], lr=RATE)
    p = weights()
    optimizer = Child([p], lr=RATE)
    recorder = Recorder(optimizer)
    with pytest.raises(ValueError, match="nested"):
        optimizer.step()
    optimizer.nests = False
    assert_next_step_is_exact(recorder, optimizer, p, index=0)
