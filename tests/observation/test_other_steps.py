"""`OtherSteps`: steps of optimizers that nobody observes are found, whatever else happens."""

import gc
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer

from altgrad import StepObserver
from altgrad.observation.other_steps import OtherSteps


@pytest.fixture
def layer() -> nn.Linear:
    return nn.Linear(3, 2)


@pytest.fixture
def others(layer: nn.Linear) -> Iterator[OtherSteps]:
    names = {parameter: name for name, parameter in layer.named_parameters()}
    listening = OtherSteps(lambda: names)
    listening.start()
    yield listening
    listening.stop()


def step(layer: nn.Linear, optimizer: Optimizer) -> None:
    layer.zero_grad()
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()


def test_layers_are_named_by_the_class_of_the_optimizer_that_stepped_them(
    layer: nn.Linear, others: OtherSteps
) -> None:
    step(layer, SGD([layer.weight], lr=0.1))
    step(layer, AdamW(layer.parameters()))
    assert others.found == {"SGD": ["weight"], "AdamW": ["weight", "bias"]}


def test_gradients_of_a_closure_count(layer: nn.Linear, others: OtherSteps) -> None:
    optimizer = LBFGS(layer.parameters(), max_iter=1)

    def closure() -> Tensor:
        loss = layer(torch.ones(1, 3)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert others.found == {"LBFGS": ["weight", "bias"]}


def rest(layer: nn.Linear) -> None:
    step(layer, SGD(layer.parameters(), lr=0.0))


def step_without_gradients(layer: nn.Linear) -> None:
    layer.zero_grad()
    SGD(layer.parameters(), lr=0.1).step()


def step_gradients_of_zero(layer: nn.Linear) -> None:
    layer(torch.zeros(1, 3)).sum().backward()
    layer.bias.grad.zero_()
    SGD(layer.parameters(), lr=0.1).step()


def rest_by_a_tensor(layer: nn.Linear) -> None:
    step(layer, AdamW(layer.parameters(), lr=torch.tensor(0.0), capturable=False, foreach=False))


def step_another_module(_: nn.Linear) -> None:
    another = nn.Linear(3, 2)
    step(another, SGD(another.parameters(), lr=0.1))


def observe(layer: nn.Linear) -> None:
    optimizer = SGD(layer.parameters(), lr=0.1)
    with StepObserver(layer, print).attach(optimizer):
        step(layer, optimizer)
    step(layer, optimizer)  # not observed any more, as the user knows


class Inner(Optimizer):
    """An optimizer that steps by another one, as Lookahead does."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.inner = SGD(self.param_groups, lr=0.1)

    def step(self, closure: Any = None) -> None:
        self.inner.step(closure)


def observe_the_outer_optimizer(layer: nn.Linear) -> None:
    outer = Inner(layer.parameters())
    with StepObserver(layer, print).attach(outer):
        step(layer, outer)


def observe_the_inner_optimizer(layer: nn.Linear) -> None:
    outer = Inner(layer.parameters())
    with StepObserver(layer, print).attach(outer.inner):
        step(layer, outer)


NONE = (
    rest,
    step_without_gradients,
    step_gradients_of_zero,
    rest_by_a_tensor,
    step_another_module,
    observe,
    observe_the_outer_optimizer,
    observe_the_inner_optimizer,
)


@pytest.mark.parametrize("way", NONE)
def test_steps_that_move_nothing_or_are_observed_do_not_count(
    way: Any, layer: nn.Linear, others: OtherSteps
) -> None:
    way(layer)
    assert others.found == {}


def test_a_decay_without_a_gradient_counts(layer: nn.Linear, others: OtherSteps) -> None:
    layer(torch.zeros(1, 3)).sum().backward()
    layer.bias.grad = None
    SGD(layer.parameters(), lr=0.1, weight_decay=0.1).step()
    assert others.found == {"SGD": ["weight"]}


def test_sparse_gradients_count_where_a_sample_misses_them(others: OtherSteps) -> None:
    embedding = nn.Embedding(1000, 2, sparse=True)
    listening = OtherSteps(lambda: {embedding.weight: "weight"})
    listening.start()
    embedding(torch.tensor([1])).sum().backward()
    SGD(embedding.parameters(), lr=0.1).step()
    listening.stop()
    assert listening.found == {"SGD": ["weight"]}


def test_steps_inside_the_backward_pass_are_told_apart(
    layer: nn.Linear, others: OtherSteps
) -> None:
    step(layer, SGD([layer.weight], lr=0.1))
    optimizer = AdamW([layer.bias])
    layer.bias.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    layer(torch.ones(1, 3)).sum().backward()
    assert others.found.keys() == {"SGD", "AdamW"}
    assert others.in_backward == {"AdamW"}


def test_a_step_that_raises_does_not_count(layer: nn.Linear, others: OtherSteps) -> None:
    class Fails(SGD):
        def step(self, closure: Any = None) -> None:
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        step(layer, Fails(layer.parameters(), lr=0.1))
    assert others.found == {}


def test_an_optimizer_that_breaks_the_search_is_left_alone(
    layer: nn.Linear, others: OtherSteps
) -> None:
    class Strange(SGD):
        def step(self, closure: Any = None) -> None:
            self.param_groups = None

    step(layer, Strange(layer.parameters(), lr=0.1))
    assert others.found == {}


def count_global_hooks() -> int:
    module = sys.modules["torch.optim.optimizer"]
    # torch has no public name for them: torch/optim/optimizer.py.
    before, after = module._global_optimizer_pre_hooks, module._global_optimizer_post_hooks
    return len(before) + len(after)


def test_the_global_hooks_go_with_the_listener(layer: nn.Linear, others: OtherSteps) -> None:
    others.stop()
    before = count_global_hooks()
    listening = OtherSteps(dict)
    listening.start()
    listening.start()
    assert count_global_hooks() == before + 2
    listening.stop()
    assert count_global_hooks() == before
    listening.start()
    del listening
    gc.collect()
    assert count_global_hooks() == before


def test_what_was_found_is_forgotten_at_the_next_start(
    layer: nn.Linear, others: OtherSteps
) -> None:
    optimizer = SGD(layer.parameters(), lr=0.1)
    step(layer, optimizer)
    others.stop()
    assert others.found == {"SGD": ["weight", "bias"]}
    others.start()
    assert others.found == {}
    step(layer, optimizer)
    assert others.found == {"SGD": ["weight", "bias"]}


class Plain(Optimizer):
    """An optimizer whose step can be compiled as one graph."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(parameter.grad)


def test_a_step_that_is_compiled_as_one_graph_stays_so(
    layer: nn.Linear, others: OtherSteps
) -> None:
    torch.compiler.reset()
    optimizer = Plain(layer.parameters(), {})
    layer(torch.ones(1, 3)).sum().backward()
    before = layer.weight.detach().clone()
    torch.compile(optimizer.step, backend="eager", fullgraph=True)()
    assert torch.equal(layer.weight, before - layer.weight.grad)
    assert others.found == {"Plain": ["weight", "bias"]}


def test_an_observed_optimizer_whose_step_is_compiled_does_not_count(
    layer: nn.Linear, others: OtherSteps
) -> None:
    torch.compiler.reset()
    optimizer = SGD(layer.parameters(), lr=0.1)
    with StepObserver(layer, print).attach(optimizer):
        layer(torch.ones(1, 3)).sum().backward()
        torch.compile(optimizer.step, backend="eager")()
    assert others.found == {}
