"""`StepHooks`: the calls around steps with and without closures, and around nested steps."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, Optimizer, optimizer as torch_optimizer

from altgrad.observation.step_hooks import count_backward_passes, count_step_calls
from tests.observation.recorder import (
    RATE,
    Recorder,
    assert_next_step_is_exact,
    nested,
    weights,
)

# Without and with a closure


def test_a_step_without_a_closure_makes_three_calls_and_counts() -> None:
    p = weights()
    optimizer = SGD([p], lr=RATE)
    recorder = Recorder(optimizer)
    for index in range(3):
        assert recorder.hooks.index == index
        assert_next_step_is_exact(recorder, optimizer, p, index, gradient=index + 1.0)


def test_a_step_that_is_not_due_makes_one_call_and_counts() -> None:
    p = weights()
    optimizer = SGD([p], lr=RATE)
    recorder = Recorder(optimizer, due=False)
    optimizer.step()
    closures = []
    optimizer.step(lambda: closures.append(None))
    assert recorder.calls == ["due", "due"]
    assert len(closures) == 1
    recorder.due = True
    assert_next_step_is_exact(recorder, optimizer, p, index=2)


@pytest.mark.parametrize("keyword", [False, True], ids=["positional", "keyword"])
def test_a_closure_computes_the_gradients_that_are_captured(keyword: bool) -> None:
    p = weights(gradient=None)
    optimizer = SGD([p], lr=RATE)
    recorder = Recorder(optimizer)

    def closure() -> str:
        recorder.calls.append("closure")
        p.grad = torch.tensor([4.0, 5.0])
        return "loss"

    result = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
    assert result == "loss"
    assert recorder.calls == ["due", "closure", "capture", "finish"]
    ((_, before, gradient, after),) = recorder.steps
    assert before.tolist() == [1, 2]
    assert gradient.tolist() == [4, 5]
    assert after.tolist() == [-1, -0.5]


def test_a_closure_of_none_is_treated_like_no_closure() -> None:
    p = weights()
    optimizer = SGD([p], lr=RATE)
    recorder = Recorder(optimizer)
    optimizer.step(None)
    optimizer.step(closure=None)
    assert recorder.calls == ["due", "capture", "finish"] * 2


def test_the_first_of_many_calls_of_a_closure_is_captured() -> None:
    p = weights(gradient=None)
    optimizer = LBFGS([p], lr=1e-2, max_iter=4)
    recorder = Recorder(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p**4).sum()
        loss.backward()
        recorder.calls.append("closure")
        return loss

    optimizer.step(closure)
    assert recorder.calls.count("closure") > 1
    assert recorder.calls[:3] == ["due", "closure", "capture"]
    assert recorder.calls.count("capture") == recorder.calls.count("finish") == 1
    ((_, before, gradient, after),) = recorder.steps
    assert before.tolist() == [1, 2]
    assert torch.equal(gradient, 4 * before**3)
    assert torch.equal(after, p)


def test_nothing_is_captured_if_the_optimizer_does_not_call_its_closure() -> None:
    class Deaf(SGD):
        def step(self, closure=None):
            return None

    p = weights()
    optimizer = Deaf([p], lr=RATE)
    recorder = Recorder(optimizer)
    optimizer.step(lambda: None)
    assert recorder.calls == ["due", "finish"]
    assert recorder.steps[0][1] is None
    assert recorder.hooks.index == 1


def test_other_arguments_of_a_step_and_of_its_closure_pass_through() -> None:
    got = []

    class Particular(SGD):
        def step(self, closure, *others, **options):
            got.append((others, options, closure(1, option=2)))
            return super().step()

    optimizer = Particular([weights()], lr=RATE)
    recorder = Recorder(optimizer)

    def closure(*inputs, **options):
        return inputs, options

    optimizer.step(closure, "other", option="own")
    optimizer.step(closure=closure, option="own")
    returned = ((1,), {"option": 2})
    assert got == [(("other",), {"option": "own"}, returned), ((), {"option": "own"}, returned)]
    assert len(recorder.steps) == 2


def test_a_first_argument_that_is_not_a_closure_reaches_the_step_unchanged() -> None:
    got = []

    class Informed(SGD):
        def step(self, metric):
            got.append(metric)
            return super().step()

    optimizer = Informed([weights()], lr=RATE)
    recorder = Recorder(optimizer)
    optimizer.step(0.25)
    assert got == [0.25]
    assert len(recorder.steps) == 1
    assert recorder.steps[0][1] is not None


@pytest.mark.parametrize("why", ["not due", "gone"])
def test_the_closure_is_not_wrapped_if_the_step_is_not_observed(why: str) -> None:
    got = []

    class Listening(SGD):
        def step(self, closure=None):
            got.append(closure)

    def closure() -> None:
        """Return None; never called."""

    optimizer = Listening([weights()], lr=RATE)
    recorder = Recorder(optimizer, due=False)
    if why == "gone":
        del recorder
    optimizer.step(closure)
    assert got == [closure]


def test_hooks_registered_during_a_step_do_not_count_that_step() -> None:
    p = weights()
    optimizer = SGD([p], lr=RATE)
    recorders = []
    optimizer.step(lambda: recorders.append(Recorder(optimizer)))
    assert recorders[0].calls == []
    assert_next_step_is_exact(recorders[0], optimizer, p, index=0)


# Steps that call super().step()


@pytest.mark.parametrize("call", ["none", "positional", "keyword"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("parent_patched", [True, False], ids=["patched", "not_patched"])
def test_a_step_that_calls_the_step_of_its_parent_is_one_step(
    parent_patched: bool, depth: int, call: str
) -> None:
    p = weights(gradient=None if call != "none" else 6.0)
    optimizer = nested(parent_patched, depth)([p], lr=RATE)
    recorder = Recorder(optimizer)

    def closure() -> None:
        recorder.calls.append("closure")
        p.grad = torch.full((2,), 6.0)

    for index in range(2):
        recorder.calls.clear()
        recorder.steps.clear()
        before = p.detach().clone()
        if call != "none":
            p.grad = None
        {
            "none": optimizer.step,
            "positional": lambda: optimizer.step(closure),
            "keyword": lambda: optimizer.step(closure=closure),
        }[call]()
        assert [each for each in recorder.calls if each != "closure"] == [
            "due",
            "capture",
            "finish",
        ]
        ((shown_index, *tensors),) = recorder.steps
        assert shown_index == index
        assert all(map(torch.equal, tensors, (before, torch.full((2,), 6.0), before - 3)))
    assert recorder.hooks.index == 2


def test_changes_by_a_subclass_after_the_step_of_its_parent_belong_to_the_step() -> None:
    class Shrinking(SGD):
        def step(self, closure=None):
            super().step()
            with torch.no_grad():
                self.param_groups[0]["params"][0].mul_(0.5)

    SGD([weights()], lr=RATE)
    p = weights()
    optimizer = Shrinking([p], lr=RATE)
    recorder = Recorder(optimizer)
    optimizer.step()
    assert recorder.steps[0][3].tolist() == [0.25, 0.75]


def test_is_due_is_called_once_for_a_nested_step() -> None:
    optimizer = nested(parent_patched=True, depth=1)([weights()], lr=RATE)
    recorder = Recorder(optimizer, due=False)
    optimizer.step()
    assert recorder.calls == ["due"]
    assert recorder.hooks.index == 1


# count_step_calls


def test_torch_puts_a_function_named_wrapper_with_a_local_self_around_each_step() -> None:
    SGD([weights()], lr=RATE)
    code = SGD.step.__code__
    assert code.co_name == "wrapper"
    assert code.co_filename == torch_optimizer.__file__
    assert "self" in code.co_varnames


def test_the_depth_counts_steps_of_this_optimizer_only() -> None:
    depths = []
    inner, outer = (
        nested(parent_patched=True, depth=depth)([weights()], lr=RATE) for depth in (0, 1)
    )
    outer.register_step_pre_hook(lambda *_: inner.step())
    for optimizer in (inner, outer):
        optimizer.register_step_post_hook(
            lambda *_: depths.append((count_step_calls(inner), count_step_calls(outer)))
        )
    assert (count_step_calls(inner), count_step_calls(outer)) == (0, 0)
    outer.step()
    assert depths == [(1, 1), (1, 2), (0, 2), (0, 1)]


def test_other_functions_with_a_local_self_are_not_counted() -> None:
    optimizer = SGD([weights()], lr=RATE)
    depths = []
    optimizer.register_state_dict_pre_hook(lambda _: depths.append(count_step_calls(optimizer)))
    optimizer.state_dict()  # defined in the same file as torch's wrapper of `step`

    def wrapper(self: Optimizer) -> None:
        depths.append(count_step_calls(self))

    wrapper(optimizer)
    assert depths == [0, 0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_backward_passes_are_counted_without_those_that_count(mode: Any) -> None:
    weight = torch.ones(2, requires_grad=True)
    with mode():
        before = count_backward_passes()
        assert count_backward_passes() == before
    for _ in range(3):
        weight.sum().backward()
    with mode():
        assert count_backward_passes() == before + 3
