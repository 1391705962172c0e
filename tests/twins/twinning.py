"""Nets, loops and monitors for tests of twins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from altgrad import StepRecord, UpdateMonitor
from altgrad.twins.self_check import Check


def make_net(dtype: torch.dtype = torch.float32, width: int = 130) -> nn.Sequential:
    """Return a net whose layers have tails beyond a full chunk, and one with fewer elements."""
    torch.manual_seed(0)
    layers = nn.Linear(65, width), nn.ReLU(), nn.LayerNorm(width), nn.Linear(width, 10)
    return nn.Sequential(*layers).to(dtype)


def train(
    net: nn.Module,
    optimizer: Optimizer,
    steps: int,
    *,
    first: int = 0,
    before_step: Callable[[int], object] | None = None,
) -> None:
    """Train on inputs that depend on the number of the step alone."""
    dtype = next(net.parameters()).dtype
    for index in range(first, first + steps):
        random = torch.Generator().manual_seed(index)
        inputs = torch.randn(32, 65, generator=random).to(dtype)
        optimizer.zero_grad()
        net(inputs).float().square().mean().backward()
        if before_step is not None:
            before_step(index)
        optimizer.step()


class Watched:
    """A monitor with its records and notices; the arguments are those of `UpdateMonitor`.

    Notices of what is lost in 16 bits are left out: tests/monitor/test_known_losses.py has them.
    """

    def __init__(self, net: nn.Module, *optimizers: Optimizer, **settings: Any) -> None:
        self.records: list[StepRecord] = []
        self.notices: list[str] = []
        defaults = {"formats": ["bf16", "e4m3fn"], "every_n_steps": 7, "strict": True}
        self.monitor = UpdateMonitor(
            net, self.records.append, warn=self.note, **defaults | settings
        ).attach(*optimizers)

    def note(self, notice: str) -> None:
        if not notice.startswith("expects "):
            self.notices.append(notice)


def assert_equal(watched: Watched) -> None:
    """Assert that every reference twin equals its run, and that the user was told nothing."""
    assert watched.notices == []
    assert {*watched.monitor.twins.checks.values()} == {Check.EQUAL}


def copy_weights(net: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in net.parameters()]


def one_thread() -> Any:
    """Return a fixture that runs a test on one thread, as borders between threads make tails."""

    @pytest.fixture(autouse=True)
    def on_one_thread() -> Any:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)

    return on_one_thread
