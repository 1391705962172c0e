"""A few steps of a model that ranks share, what is warned of in them, and what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

LIMIT = 6.0
"""Seconds, of a group that trains, where a rank is waited for: who observes waits half of it."""


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
    """What AltGrad warns of in so many steps."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(net, optimizer, steps)
    told = [(each.filename, str(each.message)) for each in caught]
    return [message for file, message in told if "altgrad" in file or "Obs" in message]


@contextmanager
def all_warnings() -> Iterator[list[str]]:
    """A list, which holds what was warned of within, of whomever, once that is done."""
    told: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield told
    told += [str(each.message) for each in caught]


def refused(call: Callable[[], Any]) -> str:
    """The kind of error and what it says; nothing if there was none."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - whichever it is
        return f"{type(error).__name__}: {error}"
    return ""
