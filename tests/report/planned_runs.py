"""Runs with recipes for plans: real ones of a small net, and choices of made-up numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import altgrad
from altgrad import Recipe
from altgrad.report import Run, read

RECIPES: tuple[str | Recipe, ...] = (
    *("bf16", "bf16-sr", "bf16-true", "e4m3fn-sr", "bf16-kahan"),
    Recipe("low-states", states={"exp_avg_sq": "bf16", "exp_avg": "e5m2"}),
)


class Net(nn.Module):
    """A net with two blocks of equal names, and norms whose weights of 1 freeze in bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(24, 24), nn.LayerNorm(24)) for _ in range(2)
        )
        self.head = nn.Linear(24, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        for block in self.blocks:
            inputs = inputs + torch.tanh(block(inputs))
        return self.head(inputs)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Train a net on random batches, under autocast to bfloat16."""
    random = torch.Generator().manual_seed(1)
    for _ in range(steps):
        inputs = torch.randn(32, 24, generator=random)
        with torch.autocast("cpu", torch.bfloat16):
            loss = (net(inputs).float() - inputs[:, :5].sin()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def make_optimizer(parameters: Any) -> torch.optim.Optimizer:
    """Make the optimizer of all runs: in bf16, its steps move all weights but those of norms."""
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)


def record(
    folder: Path, recipes: Sequence[str | Recipe] = RECIPES, *, steps: int = 40, **settings: Any
) -> Run:
    """Return a run that tried recipes.

    Args:
        folder: Folder of the run file.
        recipes: The recipes.
        steps: Number of steps.
        settings: Arguments of `altgrad.watch`.
    """
    torch.manual_seed(0)
    net = Net()
    optimizer = make_optimizer(net.parameters())
    settings = {"every_n_steps": 10, "recipes": recipes, "twin_elements": 1000} | settings
    with altgrad.watch(net, optimizer, folder, **settings):
        train(net, optimizer, steps)
    return read(folder)
