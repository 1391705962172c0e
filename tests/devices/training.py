"""Training whose bits do not depend on the device: gradients are given, not computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


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
        parameter.grad = gradient.to(parameter.device, parameter.dtype)


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
