"""Runs of a Trainer that stores weights, the same without a Trainer, and a comparison of states."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from altgrad import Recipe, UpdateMonitor, WeightStorage
from tests.lightning.runs import Net, batches, trainer

LOW = Recipe("low", weights="e4m3fn", rounding="stochastic", states={"exp_avg": "e4m3fn"})
KAHAN = Recipe("kahan", weights="mxfp8", compensation="kahan", states={"*": "bf16"})
QUIET = {"logger": False}


def fit(folder: Path, *callbacks: pl.Callback, module: Any = Net, steps: int = 4, **options: Any):
    """Train a new module, and return it and the Trainer."""
    ckpt_path = options.pop("ckpt_path", None)
    torch.manual_seed(0)
    net = module()
    run = trainer(folder, *callbacks, **(QUIET | options))
    run.fit(net, batches(steps), ckpt_path=ckpt_path)
    return net, run


def train_plainly(
    attach: Callable[..., WeightStorage], steps: int = 4, **monitoring: Any
) -> tuple[Net, torch.optim.Optimizer, WeightStorage]:
    """Train as `fit` does, without a Trainer, and perhaps with an `UpdateMonitor`."""
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    storage = attach(optimizer, module=net)
    with contextlib.ExitStack() as attached:
        if monitoring:
            attached.enter_context(UpdateMonitor(net, **monitoring).attach(optimizer))
        for (batch,) in batches(steps):
            optimizer.zero_grad()
            (net.layers(batch).square().mean() + net.layers(batch).sum()).backward()
            optimizer.step()
    return net, optimizer, storage


def assert_equal(found: Any, expected: Any) -> None:
    """Compare nested states bit for bit."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_equal(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    elif isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


def is_stored(module: nn.Module, dtype: torch.dtype = torch.bfloat16) -> bool:
    return all(torch.equal(p, p.to(dtype).float()) for p in module.parameters())
