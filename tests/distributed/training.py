"""Train a sharded model for a few steps, and collect its warnings and errors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

LIMIT = 6.0
"""Time limit of the training's process group in seconds; a monitor waits half of it for a rank."""


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=1e-2)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        rows = torch.randint(0, 7, (6,), generator=generator)
        optimizer.zero_grad()
        net(rows).backward()
        optimizer.step()


def warned(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[str]:
    """Train for some steps and return the warnings of AltGrad."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(net, optimizer, steps)
    told = [(each.filename, str(each.message)) for each in caught]
    return [message for file, message in told if "altgrad" in file or "Obs" in message]


@contextmanager
def all_warnings() -> Iterator[list[str]]:
    """Yield a list that holds all warnings once the context ends."""
    told: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield told
    told += [str(each.message) for each in caught]


def refused(call: Callable[[], Any]) -> str:
    """Return the type and message of the error that `call` raises, or an empty text."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - any error is wanted
        return f"{type(error).__name__}: {error}"
    return ""
