"""Random actions on each rank kill no rank, and make no rank wait for ever."""

from __future__ import annotations

import functools
import random
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch

from altgrad import UpdateMonitor
from tests.distributed.sharded import fsdp
from tests.processes import run

SIZE, ACTIONS = 2, 16
LIMIT = 2.0  # seconds, the time limit of the process group


def act(rank: int, seed: int) -> float:
    """Use two monitors of two optimizers at random; many actions are made by this rank alone.

    Gradients are set by hand: training would wait for the other rank.
    """
    own, shared = random.Random(seed * 10 + rank), random.Random(seed)
    net = fsdp(SIZE)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    up = {*net.up.parameters()}
    first = torch.optim.SGD(up, lr=1e-2)
    second = torch.optim.SGD([p for p in net.parameters() if p not in up], lr=1e-2)

    def on_record(_: object) -> None:
        if own.random() < 0.1:
            raise ArithmeticError

    def monitor() -> UpdateMonitor:
        missed = own.choice([0, 0, 0.3])
        every = lambda _: own.random() >= missed  # noqa: E731
        return UpdateMonitor(net, on_record, every_n_steps=every).attach(first, second)

    monitors = [monitor() for _ in range(2)]
    start = time.monotonic()
    for _ in range(ACTIONS):
        watching = monitors[shared.randrange(2)]
        actions: list[tuple[int, Callable[[], Any]]] = [
            (10, functools.partial(watching.attach, first, second)),
            (20, watching.state_dict),
            (5, watching.detach),
            (5, lambda: net.requires_grad_(own.random() < 0.5)),
            (30, first.step),
            (30, second.step),
        ]
        chance = own if own.random() < 0.4 else shared
        (action,) = chance.choices([each for _, each in actions], [weight for weight, _ in actions])
        with suppress(RuntimeError, ValueError):  # errors that the monitor means to raise
            action()
    return time.monotonic() - start


def act_quietly(rank: int, seed: int) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return act(rank, seed)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))]
)
def test_no_rank_is_killed_by_actions_of_other_ranks(seed: int) -> None:
    for seconds in run(act_quietly, SIZE, seed, collective=LIMIT):
        assert seconds < ACTIONS * LIMIT
