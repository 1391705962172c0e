"""Helpers: two layers whose samples are in one tensor, and their optimizer, without a monitor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from altgrad.twins.layer_plan import LaneKind, LayerPlan, Stepped

KIND = LaneKind(torch.float32, torch.float32, torch.device("cpu"), 1)


class Source:
    """Layers whose samples are every second one of their elements."""

    is_shared = False

    def draw(self, name: str, shape: torch.Size, block: int) -> Tensor:
        return torch.arange(0, shape.numel(), 2)

    def warn(self, notice: str) -> None:
        pytest.fail(notice)


class Planned:
    """Two layers of 128 weights with a plan of their samples."""

    def __init__(self, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD) -> None:
        torch.manual_seed(0)
        self.net = nn.ParameterDict({name: torch.randn(128) for name in "ab"})
        self.net.requires_grad_(False)  # twins act without autograd
        self.optimizer = optimizer(self.net.parameters(), lr=0.5)
        self.stepped = [Stepped(name, self.net[name], 0) for name in "ab"]
        self.plan = LayerPlan(KIND, Source())  # type: ignore[arg-type]

    def set_gradients(self, *names: str) -> None:
        for name in "ab":
            gradient = torch.arange(128.0) + 100 * (name == "b")
            self.net[name].grad = gradient if name in names else None

    def arrange(self, *names: str) -> list[Stepped]:
        """Plan a step in which some layers have a gradient, and return these."""
        self.set_gradients(*names)
        self.plan.arrange(self.optimizer, self.stepped, {*names})
        return [each for each in self.stepped if each.name in names]
