"""`find_bypass_reason`: signs of steps that pass no hook."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR

from altgrad import UpdateMonitor
from altgrad.observation.bypass_reason import find_bypass_reason


@pytest.fixture
def layer() -> nn.Linear:
    return nn.Linear(3, 2)


def explain(layer: nn.Module, optimizer: Optimizer | None, *attached: Optimizer) -> str | None:
    return find_bypass_reason("SGD", optimizer, [*layer.parameters()], attached)


def test_without_a_sign_there_is_no_reason(layer: nn.Linear) -> None:
    optimizer = SGD(layer.parameters(), lr=0.1)
    unrelated = AdamW(nn.Linear(3, 2).parameters())
    assert explain(layer, optimizer, optimizer) is None
    assert unrelated.state == {}


def test_the_step_of_a_scheduler_is_no_sign(layer: nn.Linear) -> None:
    optimizer = SGD(layer.parameters(), lr=0.1)
    StepLR(optimizer, 1)
    assert "step" in vars(optimizer)
    assert explain(layer, optimizer, optimizer) is None


def test_a_replaced_step_is_a_sign(layer: nn.Linear) -> None:
    optimizer = SGD(layer.parameters(), lr=0.1)
    optimizer.step = print
    assert "was replaced by a function" in explain(layer, optimizer, optimizer)


class Hookless(Optimizer):
    """An optimizer whose class skips the constructor of Optimizer, so that no hook shows a step."""

    def __init__(self, parameters: Any) -> None:
        self.param_groups = [{"params": [*parameters]}]
        self.state: dict[Tensor, int] = {}

    def step(self, closure: Any = None) -> None:
        self.state |= dict.fromkeys(self.param_groups[0]["params"], 1)

    def __repr__(self) -> str:
        return "without hooks"


def test_another_optimizer_without_hooks_is_a_sign_and_its_class_is_named(layer: Any) -> None:
    optimizer, other = SGD(layer.parameters(), lr=0.1), Hookless([layer.bias])
    assert explain(layer, optimizer, optimizer) is None  # it has not stepped yet
    other.step()
    reason = explain(layer, optimizer, optimizer)
    assert reason == "Hookless has these layers, too, and is not attached; attach it"
    assert explain(layer, optimizer, optimizer, other) is None
    assert "SGD that was attached no longer exists, and Hookless" in explain(layer, None, optimizer)


def test_another_optimizer_whose_steps_would_call_hooks_is_no_sign(layer: nn.Linear) -> None:
    optimizer, idle = (SGD(layer.parameters(), lr=0.1) for _ in range(2))
    earlier = AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    earlier.step()
    assert explain(layer, optimizer, optimizer) is None
    assert not idle.state


class Wrapper(Optimizer):
    """A wrapper of a trainer: its constructor does not call that of Optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    def __repr__(self) -> str:
        return "a wrapper"


def test_a_wrapper_of_an_optimizer_with_hooks_is_no_sign(layer: nn.Linear) -> None:
    optimizer = SGD(layer.parameters(), lr=0.1)
    wrapper = Wrapper(Wrapper(optimizer))
    assert explain(layer, optimizer, optimizer) is None
    assert explain(layer, None) is None
    assert wrapper.param_groups is optimizer.param_groups


def test_a_wrapper_of_an_optimizer_without_hooks_is_a_sign(layer: nn.Linear) -> None:
    wrapper = Wrapper(Hookless(layer.parameters()))
    assert "Wrapper" in explain(layer, SGD(layer.parameters(), lr=0.1))
    assert isinstance(wrapper.optimizer, Hookless)


def test_an_unfinished_optimizer_elsewhere_is_passed_over(layer: nn.Linear) -> None:
    unfinished = Optimizer.__new__(SGD)
    optimizer = SGD(layer.parameters(), lr=0.1)
    assert explain(layer, optimizer, optimizer) is None
    assert not hasattr(unfinished, "param_groups")


def test_hooks_on_gradients_are_a_sign(layer: nn.Linear) -> None:
    optimizer = SGD(layer.parameters(), lr=0.1)

    def step(parameter: Tensor) -> None:
        parameter.grad = None

    handle = layer.bias.register_post_accumulate_grad_hook(step)
    assert "inside the backward pass" in explain(layer, optimizer, optimizer)
    handle.remove()
    assert explain(layer, optimizer, optimizer) is None
    # torch/distributed/optim/apply_optimizer_in_backward.py keeps its optimizers in this attribute.
    layer.bias._in_backward_optimizers = [torch.optim.SGD]
    assert "inside the backward pass" in explain(layer, optimizer, optimizer)


def test_steps_under_other_names_are_a_sign(layer: nn.Linear) -> None:
    class TwoSteps(SGD):
        def first_step(self) -> None:
            raise NotImplementedError

    optimizer = TwoSteps(layer.parameters(), lr=0.1)
    assert "by first_step() and second_step()" in explain(layer, optimizer, optimizer)


def test_hooks_on_gradients_are_no_sign_without_a_backward_pass(layer: nn.Linear) -> None:
    optimizer = SGD(layer.parameters(), lr=0.1)
    layer.bias.register_post_accumulate_grad_hook(print)
    layers = [*layer.parameters()]
    assert find_bypass_reason("SGD", optimizer, layers, [optimizer], has_backward=False) is None


def test_a_wrapper_of_an_optimizer_that_was_attached_elsewhere_is_no_sign(layer: Any) -> None:
    optimizer, other = (SGD(layer.parameters(), lr=0.1) for _ in range(2))
    wrapper = Wrapper(other)
    monitor = UpdateMonitor(layer).attach(other)
    assert explain(layer, optimizer, optimizer) is None
    monitor.detach()
    assert explain(layer, optimizer, optimizer) is None
    assert wrapper.optimizer is other
