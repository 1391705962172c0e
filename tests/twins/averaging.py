"""Averages of weights for tests: ways to keep one, and what twins make of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_multi_avg_fn,
)

from altgrad import UpdateMonitor
from altgrad.twins.layout import Bucket, Layout
from tests.twins.twinning import Watched, train


def warm_up(averaged: Tensor, weights: Tensor, count: Tensor) -> Tensor:
    """Return a moving average whose decay rises with the number of updates."""
    decay = torch.clamp((1 + count) / (10 + count), max=0.99)
    return decay * averaged + (1 - decay) * weights


KINDS: dict[str, Callable[[nn.Module], AveragedModel]] = {
    "EMA, lists": lambda net: AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.99)),
    "EMA, tensors": lambda net: AveragedModel(net, avg_fn=get_ema_avg_fn(0.99)),
    "mean": AveragedModel,
    "mean, lists": lambda net: AveragedModel(net, multi_avg_fn=get_swa_multi_avg_fn()),
    "the user's": lambda net: AveragedModel(net, avg_fn=warm_up),
    "with buffers": lambda net: AveragedModel(
        net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True
    ),
}


def make_hand_written(net: nn.Module) -> nn.Module:
    return copy.deepcopy(net).requires_grad_(requires_grad=False)


def update_by_hand(averaged: nn.Module, net: nn.Module, decay: float) -> None:
    with torch.no_grad():
        for average, weights in zip(averaged.parameters(), net.parameters(), strict=True):
            average.mul_(decay).add_(weights, alpha=1 - decay)


def train_averaged(
    net: nn.Module,
    optimizer: Optimizer,
    steps: int,
    update: Callable[[int], object],
    *,
    first: int = 0,
) -> None:
    for index in range(first, first + steps):
        train(net, optimizer, 1, first=index)
        update(index)


def iterate_sampled(
    monitor: UpdateMonitor, twin: str = "reference", name: str = "average"
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield name, indices and averages of each layer's sample, as a checkpoint has them."""
    for lane in monitor.state_dict()["twins"]["lanes"]:
        places = Layout(tuple(Bucket(*each) for each in lane["buckets"])).places
        state: dict[str, Any] = lane[twin] if twin in lane else lane["twins"][twin]
        for layer, place in places.items():
            yield layer, lane["samples"][layer][0], state["averages"][name][place]


def count_differences(monitor: UpdateMonitor, averaged: nn.Module) -> int:
    """Count the sampled elements in which the reference twin's average is not the run's."""
    real = {
        name.removeprefix("module."): each.detach() for name, each in averaged.named_parameters()
    }
    pairs = [
        (own, torch.take(real[layer], indices)) for layer, indices, own in iterate_sampled(monitor)
    ]
    assert all(own.dtype == each.dtype for own, each in pairs)
    return sum(int((own != each).sum()) for own, each in pairs)


def list_notices(watched: Watched) -> list[str]:
    """Return the notices, without those that averages in 16 bits lag behind."""
    return [each for each in watched.notices if "lag behind" not in each]
