"""Loops with gradient accumulation for tests of twins, and the same with low-precision sums."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from altgrad import Recipe
from tests.twins.twinning import Watched

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]

LOW = Recipe("low", accumulate="bf16")
RANDOM = Recipe("random", accumulate="bf16", rounding="stochastic")


def make_adam(held: list[nn.Parameter]) -> AdamW:
    return AdamW(held, 1e-3)


def watch(net: nn.Module, *optimizers: Any, recipes: Any = LOW, **settings: Any) -> Watched:
    return Watched(net, *optimizers, **{"recipes": recipes, "twin_elements": 10**6} | settings)


def make_batches(index: int, count: int) -> list[Tensor]:
    """Return inputs of the micro-batches of a step, which depend on the step's number alone."""
    random = torch.Generator().manual_seed(index)
    return [torch.randn(8, 65, generator=random) for _ in range(count)]


def find_loss(net: nn.Module, inputs: Tensor, count: int) -> Tensor:
    dtype = next(net.parameters()).dtype
    return (net(inputs.to(dtype)).float() - 1).square().mean() / count


def accumulate(net: nn.Module, index: int, count: int, factor: float = 1.0) -> None:
    """Do the backward passes of a step."""
    for inputs in make_batches(index, count):
        (factor * find_loss(net, inputs, count)).backward()


class LowSums:
    """A copy of a net that adds up its gradients in buffers of a low dtype, as real trainings do.

    It gets the micro-gradients of another net, so that both see the same ones.
    """

    def __init__(self, net: nn.Module, make: MakeOptimizer, dtype: torch.dtype) -> None:
        self.net = copy.deepcopy(net)
        self.optimizer = make([*self.net.parameters()])
        self._dtype = dtype

    def step(self, other: nn.Module, index: int, count: int, change: Any = None) -> None:
        """Step with the sums of the other net's gradients, computed without touching its `grad`."""
        parameters = [*other.parameters()]
        sums = [torch.zeros_like(each, dtype=self._dtype) for each in parameters]
        for inputs in make_batches(index, count):
            micro = torch.autograd.grad(find_loss(other, inputs, count), parameters)
            for total, each in zip(sums, micro, strict=True):
                total.add_(each)
        for own, total in zip(self.net.parameters(), sums, strict=True):
            own.grad = total.to(own.dtype)
        if change is not None:
            change(self.net)
        self.optimizer.step()


def read_weights(state: dict[str, Any], recipe: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield name, sampled indices and weights of each layer of a twin, from a monitor's state."""
    for lane in state["twins"]["lanes"]:
        start, weights = 0, lane["twins"][recipe]["tensors"]["weights"]
        for _, counts, *_ in lane["buckets"]:
            for name, count in counts.items():
                yield name, lane["samples"][name][0], weights[start : start + count]
                start += count
            start += -start % 64  # each bucket begins at a multiple of 64


def assert_same_weights(state: dict[str, Any], recipe: str | Recipe, net: nn.Module) -> None:
    """Assert that a twin has exactly the weights of a net at its samples."""
    parameters = dict(net.named_parameters())
    name = recipe if isinstance(recipe, str) else recipe.name
    seen = set()
    for layer, indices, weights in read_weights(state, name):
        expected = parameters[layer].detach().flatten()[indices]
        assert torch.equal(weights, expected.to(weights.dtype)), layer
        seen.add(layer)
    assert seen == {layer for layer, each in parameters.items() if each.requires_grad}
