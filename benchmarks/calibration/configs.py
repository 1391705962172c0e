"""The ways to train, on which the verdicts are calibrated, and those that are held out.

`CALIBRATION` sets the thresholds of verdicts; `HELD_OUT` tests them. Read `tasks` and `ways` first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import nn
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RMSprop

MakeOptimizer = Callable[..., Optimizer]


class Config(NamedTuple):
    """A way to train.

    Attributes:
        task: Name of the task.
        optimizer: Name in `OPTIMIZERS`.
        lr: Learning rate.
        schedule: ``"constant"`` or ``"cosine"``, which decays to 0.
        start: ``"fresh"`` or ``"tuned"``, to fine-tune a trained net.
        steps: Number of steps.
        seed: Seed of weights and batches.
        ways: Name of the set of ways in `ways.WAYS` in which the run is repeated.
    """

    task: str
    optimizer: str
    lr: float
    schedule: str = "constant"
    start: str = "fresh"
    steps: int = 300
    seed: int = 0
    ways: str = "stored"

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, which counts from 0."""
        if self.schedule == "constant":
            return self.lr
        return self.lr * (1 + math.cos(math.pi * step / self.steps)) / 2


OPTIMIZERS: Mapping[str, MakeOptimizer] = {
    "sgd": SGD,
    "momentum": partial(SGD, momentum=0.9),
    "adam": partial(Adam, betas=(0.9, 0.99)),
    "adamw": partial(AdamW, betas=(0.9, 0.99), weight_decay=0.1),
    "adamw-95": partial(AdamW, betas=(0.9, 0.95), weight_decay=0.1),
    "adamw-999": partial(AdamW, betas=(0.9, 0.999), weight_decay=0.01),
    "rmsprop": RMSprop,
    "nadam": partial(NAdam, betas=(0.9, 0.999)),
}
"""Optimizers by name; those of `ways.LIBRARY_OPTIONS` have the arguments of AdamW."""
NEVER_SEEN = ("nadam",)
"""The held-out optimizer with which no run was done before."""

_RATES = {
    "sgd": (0.03, 0.1, 0.3, 1.0),
    "momentum": (0.003, 0.01, 0.03, 0.1),
    "adam": (0.0003, 0.001, 0.003, 0.01),
    "adamw": (0.0003, 0.001, 0.003, 0.01),
    "rmsprop": (0.0001, 0.0003, 0.001, 0.003),
    "nadam": (0.0003, 0.001, 0.003, 0.01),
}


def make_optimizer(config: Config, parameters: Iterable[nn.Parameter], **options: Any) -> Optimizer:
    """Make the optimizer of a way to train.

    Args:
        config: The way to train.
        parameters: The parameters.
        options: Further arguments of the optimizer.
    """
    return OPTIMIZERS[config.optimizer](parameters, lr=config.lr, **options)


def _list_stored(tasks: Iterable[str], optimizers: Iterable[str]) -> list[Config]:
    return [Config(task, o, lr) for task in tasks for o in optimizers for lr in _RATES[o]]


def _list_real(tasks: Iterable[str], seeds: Iterable[int]) -> list[Config]:
    """List ways to train for real runs in 16 bits: from the start, and fine-tuning."""
    return [
        Config(task, optimizer, lr, schedule, start, seed=seed, ways="real")
        for task in tasks
        for seed in seeds
        for optimizer, lr, schedule, start in (
            ("adamw-999", 1e-3, "constant", "fresh"),
            ("adamw-95", 1e-3, "cosine", "fresh"),
            ("adamw-95", 1e-4, "cosine", "fresh"),
            ("adamw-999", 1e-4, "constant", "tuned"),
            ("adamw-95", 1e-4, "cosine", "tuned"),
            ("adamw-999", 1e-5, "constant", "tuned"),
        )
    ]


CALIBRATION = [
    *_list_stored(("logistic", "mlp", "transformer"), ("sgd", "momentum", "adam")),
    *_list_real(("mlp",), (0, 1, 2)),
    *_list_real(("transformer",), (0,)),
    Config("mlp", "adamw-999", 1e-3, steps=3000, ways="real"),
    Config("mlp", "adamw-95", 1e-4, "cosine", "tuned", steps=1000, ways="real"),
    Config("mlp", "adamw-999", 1e-5, start="tuned", steps=3000, ways="real"),
    Config("transformer", "adamw-95", 1e-3, "cosine", steps=600, ways="real"),
]
HELD_OUT = [
    *_list_stored(("conv", "gru"), ("adamw", "rmsprop")),
    *_list_stored(("residual", "brackets"), ("adamw", "nadam")),
    *_list_real(("conv", "gru"), (0,)),
    *_list_real(("residual", "brackets"), (0, 1)),
    *(
        Config(task, "nadam", lr, start=start, ways="real")
        for task in ("residual", "brackets")
        for lr, start in ((1e-3, "fresh"), (1e-4, "tuned"))
    ),
    Config("brackets", "adamw-95", 1e-3, "cosine", steps=1000, ways="real"),
    Config("residual", "adamw-999", 1e-3, steps=2000, ways="real"),
]
PARTS = {"calibration": CALIBRATION, "held_out": HELD_OUT}
