"""Training whose bits do not depend on the device: gradients are given, not computed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from altgrad import StepRecord
from tests.devices.simulated import Traffic, counting


def make_layers(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return layers of several shapes, one with strides of its own and one of zeros."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 20, 3), nn.LayerNorm(72), nn.Linear(72, 33), nn.Linear(33, 10))
    return net.to(dtype=dtype, memory_format=torch.channels_last)


def give_gradients(model: nn.Module, step: int) -> None:
    """Give each parameter a gradient that depends on the step alone, of many magnitudes."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        drawn = torch.randn((2, *parameter.shape), generator=generator)
        gradient = 1e-2 * drawn[0] * drawn[1].mul(2).exp()
        # Strides are those of the parameter, as a backward pass leaves them.
        parameter.grad = torch.empty_like(parameter).copy_(gradient)


def make_slow_but(quick: Iterable[Any], values: Iterable[Any]) -> list[Any]:
    """Return values for a parametrized test, of which only some are in the quick suite."""
    few = [*quick]
    return [each if each in few else pytest.param(each, marks=pytest.mark.slow) for each in values]


def make_pairs(quick: tuple[Any, Any], first: Iterable[Any], second: Iterable[Any]) -> list[Any]:
    """Return a pair for the quick suite and, for the slow one, each first value with a second."""
    pairs = zip(first, itertools.cycle(second), strict=False)
    return [
        quick,
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in pairs if pair != quick),
    ]


def assert_equal_states(
    here: tuple[nn.Module, Optimizer], there: tuple[nn.Module, Optimizer]
) -> None:
    """Assert that two trainings have the same bits in their weights and optimizer states."""
    pairs: list[tuple[Any, Any]] = [*zip(here[0].parameters(), there[0].parameters(), strict=True)]
    for one, other in [*pairs]:
        states = here[1].state[one], there[1].state[other]
        assert states[0].keys() == states[1].keys()
        pairs += [(states[0][key], states[1][key]) for key in states[0]]
    for one, other in pairs:
        if isinstance(one, Tensor):
            assert torch.equal(one, other.cpu())


def step_often(model: nn.Module, optimizer: Optimizer, steps: int, first: int = 0) -> list[Traffic]:
    traffics = []
    for step in range(first, first + steps):
        give_gradients(model, step)
        with counting() as traffic:
            optimizer.step()
        traffics.append(traffic)
    return traffics


def assert_equal_records(
    here: list[StepRecord], there: list[StepRecord], tolerance: float = 0
) -> None:
    assert len(here) == len(there) > 0
    for one, other in zip(here, there, strict=True):
        pairs = {None: (one.model, other.model)}
        pairs |= {name: (figures, other.layers[name]) for name, figures in one.layers.items()}
        for figures, others in pairs.values():
            assert dict(figures) == pytest.approx(dict(others), rel=tolerance, abs=0, nan_ok=True)
            assert figures.histogram("weights") == others.histogram("weights")
