"""`StepObserver`: closures in unusual places, and optimizers that move weights before them."""

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from altgrad import StepObserver
from tests.observation.watching import (
    RATE,
    Kept,
    clone_weights,
    equal,
    raises,
    set_gradients,
    training,
)


class Sam(SGD):
    """A sharpness-aware optimizer: it moves the weights, calls the closure, and moves them back.

    https://arxiv.org/abs/2010.01412
    """

    def step(self, closure):
        parameters = self.param_groups[0]["params"]
        found = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p in parameters:
                p.add_(0.1)
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            for p, old in zip(parameters, found, strict=True):
                p.copy_(old)
        super().step()


class DecaysFirst(SGD):
    def step(self, closure=None):
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.mul_(0.9)
        return super().step(closure)


@pytest.mark.parametrize("kind", [Sam, DecaysFirst])
def test_an_optimizer_that_moves_weights_before_its_closure_is_named_and_not_shown(kind) -> None:
    SGD([torch.ones(1)], lr=1)  # torch patches SGD.step at the first instance
    model, optimizer = training(kind)
    observer = StepObserver(model, raises).attach(optimizer)
    with pytest.warns(UserWarning, match=f"{kind.__name__} moves weights before it calls its clos"):
        optimizer.step(lambda: set_gradients(model))
    assert not observer.is_observing


@pytest.mark.parametrize(
    "call",
    [
        lambda optimizer, closure: optimizer.step("x", closure),
        lambda optimizer, closure: optimizer.step("x", closure=closure),
        lambda optimizer, closure: optimizer.step(closure=closure, x="x"),
    ],
    ids=["second", "by keyword", "keywords"],
)
def test_a_closure_is_found_where_the_step_takes_it(call) -> None:
    class Extra(SGD):
        def step(self, x, closure=None):
            assert x == "x"
            return super().step(closure)

    model, optimizer = training(Extra)
    steps, before = Kept(), clone_weights(model)
    with StepObserver(model, steps).attach(optimizer):
        call(optimizer, lambda: set_gradients(model))
    (step,) = steps
    assert equal(step.before, before)
    assert equal(step.gradients, [p.grad for p in model.parameters()])


@pytest.mark.parametrize("name", ["fn", "loss_function"])
def test_a_closure_of_another_name_is_found(name: str) -> None:
    scope: dict[str, type] = {"SGD": SGD}
    exec(
        f"class Other(SGD):\n def step(self, {name}=None):\n  return SGD.step(self, {name})", scope
    )
    model, optimizer = training(scope["Other"])
    set_gradients(model, seed=5)  # gradients of an earlier step, which are not applied
    steps = Kept()
    with StepObserver(model, steps).attach(optimizer):
        optimizer.step(lambda: set_gradients(model))
    assert equal(steps[0].gradients, [p.grad for p in model.parameters()])


def test_a_closure_may_initialise_the_parameters() -> None:
    """Lazy modules initialise their parameters in the first forward pass."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1))
    optimizer = SGD(model.parameters(), lr=RATE)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).sum()
        loss.backward()
        return loss

    steps = Kept()
    with StepObserver(model, steps, strict=True).attach(optimizer):
        optimizer.step(closure)
        optimizer.step(closure)
    assert [step.names[0] for step in steps] == ["0.weight", "0.weight"]
    assert equal(steps[1].before, steps[0].after)


def test_a_module_as_an_argument_is_not_taken_for_a_closure() -> None:
    class Takes(SGD):
        def step(self, model, closure=None):
            assert isinstance(model, nn.Module)
            return super().step(closure)

    model, optimizer = training(Takes)
    steps = Kept()
    set_gradients(model)
    with StepObserver(model, steps).attach(optimizer):
        optimizer.step(model)
    assert len(steps) == 1


def test_a_closure_keeps_its_attributes() -> None:
    class Asks(SGD):
        def step(self, closure):
            assert closure.name == "mine"
            return super().step(closure)

    model, optimizer = training(Asks)

    def closure():
        set_gradients(model)

    closure.name = "mine"
    steps = Kept()
    with StepObserver(model, steps).attach(optimizer):
        optimizer.step(closure)
    assert len(steps) == 1
