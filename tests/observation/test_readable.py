"""`find_unreadable`: parameters of a class that lacks an operation are left out, and no others."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from altgrad import StepObserver, UpdateMonitor
from altgrad.observation.readable import find_unreadable
from tests.observation.wrapped import WithoutCopies, WithoutTake, Wrapped


def make(kind: type[Wrapped]) -> tuple[nn.Module, SGD]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].weight = nn.Parameter(kind(model[0].weight.detach().clone()))
    return model, SGD(model.parameters(), lr=0.1, foreach=False)


def train(model: nn.Module, optimizer: SGD) -> None:
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(5, 3)).square().mean().backward()
        optimizer.step()


REST = ["0.bias", "1.weight", "1.bias"]


@pytest.mark.parametrize("kind", [WithoutTake, WithoutCopies])
@pytest.mark.parametrize("recipes", [(), "bf16"])
def test_a_parameter_that_cannot_be_read_is_named_and_the_rest_goes_on(
    kind: type[Wrapped], recipes: Any
) -> None:
    (model, optimizer), told = make(kind), []
    plain, reference = make(Wrapped)
    monitor = UpdateMonitor(model, formats="bf16", recipes=recipes, warn=told.append, strict=True)
    with monitor.attach(optimizer):
        train(model, optimizer)
    train(plain, reference)
    assert [*monitor.latest.layers] == REST
    (notice,) = told
    assert notice.startswith(
        f"leaves out 0.weight: {kind.__name__} cannot be read: {kind.__name__}"
    )
    assert all(map(torch.equal, list(model.parameters())[1:], list(plain.parameters())[1:]))
    assert torch.equal(model[0].weight.inner, plain[0].weight.inner)


def test_an_observer_leaves_the_parameter_out_too() -> None:
    model, optimizer = make(WithoutTake)
    steps: list[tuple[str, ...]] = []
    with pytest.warns(UserWarning, match="StepObserver leaves out 0.weight: WithoutTake"):
        observer = StepObserver(model, lambda step: steps.append(step.names)).attach(optimizer)
    train(model, optimizer)
    observer.detach()
    assert steps == [tuple(REST)] * 2


def test_a_class_that_has_what_is_needed_is_observed() -> None:
    model, optimizer = make(Wrapped)
    monitor = UpdateMonitor(model, formats="bf16", recipes=(), strict=True)
    with monitor.attach(optimizer):
        train(model, optimizer)
    assert [*monitor.latest.layers] == ["0.weight", *REST]


def test_a_module_of_such_parameters_alone_is_refused() -> None:
    weights = nn.ParameterList([nn.Parameter(WithoutTake(torch.ones(2)))])
    with pytest.raises(ValueError, match="there is no parameter that can be read"):
        StepObserver(weights, print)


def test_ordinary_frozen_and_lazy_parameters_are_not_tried() -> None:
    frozen = nn.Parameter(WithoutTake(torch.ones(2)), requires_grad=False)
    plain = [nn.Parameter(torch.ones(2)), torch.ones(2), nn.Parameter(torch.ones(2), False)]
    assert find_unreadable([frozen, nn.LazyLinear(2).weight, *plain]) == {}


def test_a_large_parameter_is_not_copied_whole() -> None:
    large = nn.Parameter(WithoutCopies(torch.ones(3000)))
    small = nn.Parameter(WithoutCopies(torch.ones(30)))
    assert [*find_unreadable([large, small])] == [small]
