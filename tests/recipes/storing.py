"""Optimizers with prescribed updates, a small model, and the scale of a layer."""

from __future__ import annotations

import math

import torch
from torch import nn

from altgrad import WeightStorage, get_format


class Given(torch.optim.Optimizer):
    """An optimizer that applies prescribed updates."""

    def __init__(self, parameters, update=None) -> None:
        super().__init__(parameters, {})
        self.update = update

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                update = self.update(parameter) if callable(self.update) else self.update
                parameter.add_(update)


def make_sgd(parameters, group) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=group["lr"])


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 4))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 16, generator=generator)).square().mean().backward()
        optimizer.step()


def scale_for(amax: float, format: str) -> float:
    """Return the smallest power of two with which the format reaches amax."""
    scale = 2.0 ** math.floor(math.log2(amax / get_format(format).max) - 1)
    while scale * get_format(format).max < amax:
        scale *= 2
    return scale


def scale_of(storage: WeightStorage) -> float:
    ((_, layer),) = storage.state_dict()["layers"].items()
    return layer["scales"].item()
