"""Helpers that record the calls of `StepHooks`, and optimizers whose steps nest or raise."""

import weakref

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from altgrad.observation.step_hooks import StepHooks

RATE = 0.5


class Recorder:
    """A record of the calls that hooks make, with weights and gradients at each call."""

    def __init__(self, optimizer: Optimizer, due: bool = True) -> None:
        self.due = due
        self.calls: list[str] = []
        self.copies: list[weakref.ref[Tensor]] = []  # of all captured tensors
        self.steps: list[tuple[int, Tensor | None, Tensor | None, Tensor]] = []
        self.hooks = StepHooks(optimizer, self.is_due, self.capture, self.finish)

    def is_due(self, hooks: StepHooks) -> bool:
        assert hooks is self.hooks
        self.calls.append("due")
        return self.due

    def capture(self, hooks: StepHooks, optimizer: Optimizer) -> tuple[Tensor, Tensor]:
        self.calls.append("capture")
        (p,) = optimizer.param_groups[0]["params"]
        captured = p.detach().clone(), p.grad.clone()
        self.copies += map(weakref.ref, captured)
        return captured

    def finish(self, hooks: StepHooks, optimizer: Optimizer, captured) -> None:
        assert hooks is self.hooks
        self.calls.append("finish")
        (p,) = optimizer.param_groups[0]["params"]
        self.steps.append((hooks.index, *(captured or (None, None)), p.detach().clone()))


def weights(gradient: float | None = 1.0) -> nn.Parameter:
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    if gradient is not None:
        p.grad = torch.full((2,), gradient)
    return p


def assert_next_step_is_exact(
    recorder: Recorder, optimizer: Optimizer, p: Tensor, index: int, gradient: float = 3.0
) -> None:
    recorder.calls.clear()
    recorder.steps.clear()
    p.grad = torch.full_like(p, gradient)
    before = p.detach().clone()
    optimizer.step()
    assert recorder.calls == ["due", "capture", "finish"]
    ((shown_index, *tensors),) = recorder.steps
    expected = (before, torch.full_like(p, gradient), before - RATE * gradient)
    assert shown_index == index
    assert all(map(torch.equal, tensors, expected))
    assert torch.equal(p, expected[2])


def nested(parent_patched: bool, depth: int) -> type[Optimizer]:
    """Return a class whose `step` calls ``super().step()`` `depth` times.

    The classes are new each time, because torch patches `step` of a class at its first instance:
    torch/optim/optimizer.py, Optimizer._patch_step_function.
    """

    class Parent(Optimizer):
        def __init__(self, params, **options) -> None:
            super().__init__(params, options)

        @torch.no_grad()
        def step(self, closure=None):
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            for p in self.param_groups[0]["params"]:
                p.sub_(RATE * p.grad)
            return loss

    def make_child(parent: type[Optimizer]) -> type[Optimizer]:
        class Child(parent):
            def step(self, closure=None):
                return super().step(closure)

        if parent_patched:
            parent([weights()], lr=RATE)
        assert getattr(parent.step, "hooked", False) is parent_patched
        return Child

    kind = Parent
    for _ in range(depth):
        kind = make_child(kind)
    return kind


class Failing(SGD):
    """An optimizer that raises a given error before or after the weights change."""

    early: BaseException | None = None
    late: BaseException | None = None

    def step(self, closure=None):
        if self.early is not None:
            raise self.early
        result = super().step(closure)
        if self.late is not None:
            raise self.late
        return result
