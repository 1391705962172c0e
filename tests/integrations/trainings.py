"""Small trainings for adapters, and an optimizer that records the truth of its own steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from altgrad import Figures

FORMAT = "bf16"
SHARE = "stall_frac/bf16"


class RecordingAdamW(torch.optim.AdamW):
    """An AdamW that clones its weights around each step, without hooks."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.steps: list[list[tuple[Tensor, Tensor]]] = []

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in parameters]
        result = super().step(closure)
        after = [p.detach().clone() for p in parameters]
        self.steps.append([*zip(before, after, strict=True)])
        return result


def make_model(seed: int = 0) -> nn.Module:
    """Return a model with dropout, so that a random number drawn by an observer would show."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.LayerNorm(16), nn.Linear(16, 4))


def make_training(**options: Any) -> tuple[nn.Module, RecordingAdamW]:
    model = make_model()
    return model, RecordingAdamW(model.parameters(), lr=1e-3, **options)


def train(
    model: nn.Module,
    optimizer: Any,
    steps: int,
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        backward((model(torch.randn(4, 8)) - 1).square().mean())
        optimizer.step()


def clone_weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_equal(some: list[Tensor], others: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def assert_true(
    layers: Mapping[str, Figures], names: list[str], step: list[tuple[Tensor, Tensor]]
) -> None:
    """Compare figures with those of the recorded weights, computed by torch's own bfloat16."""
    assert {*layers} == {*names}
    for name, (before, after) in zip(names, step, strict=True):
        update = after.double() - before.double()
        rms = update.square().mean().sqrt().item()
        assert layers[name]["update_rms"] == pytest.approx(rms, rel=1e-6), name
        stored = before.bfloat16()
        kept = (stored.double() + update).bfloat16()
        moved = update != 0
        share = (moved & (kept == stored)).sum().item() / moved.sum().item()
        assert layers[name][SHARE] == pytest.approx(share, abs=1e-9), name
