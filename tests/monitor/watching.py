"""Helpers: a monitor on a small model, and an optimizer that records its steps."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from altgrad import StepRecord, UpdateMonitor

FORMATS = ("bf16", "e4m3fn", "e2m1")
Step = dict[str, tuple[Tensor, Tensor, Tensor]]


class RecordingSGD(torch.optim.SGD):
    """An optimizer that records before, after and gradient of each step, by name."""

    def __init__(self, named: Any, **options: Any) -> None:
        self.named = dict(named)
        self.steps: list[Step] = []
        super().__init__(self.named.values(), **options)

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        taken = {
            name: (p.detach().clone(), p.grad.clone())
            for name, p in self.named.items()
            if p.grad is not None
        }
        result = super().step(closure)
        self.steps.append(
            {name: (b, self.named[name].detach().clone(), g) for name, (b, g) in taken.items()}
        )
        return result


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 20, 3), nn.Flatten(), nn.LayerNorm(720), nn.Linear(720, 32), nn.Linear(32, 10)
    )


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1, seed: int = 1
) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(4, 3, 8, 8, generator=generator)
        x = x.to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def watched(
    model: nn.Module, **options: Any
) -> tuple[RecordingSGD, UpdateMonitor, list[StepRecord]]:
    optimizer = RecordingSGD(model.named_parameters(), lr=0.05)
    records: list[StepRecord] = []
    settings = {"formats": FORMATS, "max_elements": None, "strict": True} | options
    return optimizer, UpdateMonitor(model, records.append, **settings).attach(optimizer), records


def sharing_out(elements: int) -> Any:
    """Limit the elements of one call of the kernel: segments are small, and layers large."""
    return mock.patch("altgrad.measurement.measurer.compute_capacity", return_value=elements)


def assert_equal_figures(actual: Any, expected: Any, but: tuple[str, ...] = ()) -> None:
    for key, value in expected.items():
        if key.split("/")[0] in but:
            continue
        exact = key.split("/")[0].endswith(("_frac", "_max", "_min", "_log2"))
        exact &= not key.startswith("stochastic_move")
        tolerance = 0 if exact else 1e-11
        assert actual[key] == pytest.approx(
            value, rel=tolerance, abs=tolerance / 1e3, nan_ok=True
        ), key


class Model(nn.Module):
    """A model with measured, complex, disabled and frozen parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.ones(50, 60))
        self.waves = nn.Parameter(torch.ones(3, dtype=torch.complex64))
        self.quiet = nn.Parameter(torch.ones(4))
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
        self.last = nn.Parameter(torch.ones(6))
