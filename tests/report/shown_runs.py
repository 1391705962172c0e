"""Real runs as reports show them: in float32, in bf16, with NaN; and the text of a terminal."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from altgrad.report import Run, RunReport
from tests.report.twin_runs import make_layers, record

RECIPES = ("bf16", "bf16-kahan", "e5m2")


def record_fp32(folder: Path, recipes: Any = RECIPES) -> Run:
    """Record a run in float32 whose gain would freeze in bf16, and whose bias would not."""
    return _record(folder, torch.float32, recipes)


def record_bf16(folder: Path, recipes: Any = RECIPES) -> Run:
    """Record the same run with weights in bf16: the gain stands still."""
    return _record(folder, torch.bfloat16, recipes)


def _record(folder: Path, dtype: torch.dtype, recipes: Any) -> Run:
    net = make_layers(dtype, gain=torch.ones(64), bias=torch.zeros(32))
    optimizer = torch.optim.SGD(net.parameters(), lr=5e-4)
    settings = {"formats": ["bf16", "e5m2"], "recipes": recipes}
    return record(folder, net, optimizer, prepare=push, **settings)


def push(net: torch.nn.Module, step: int) -> None:
    """Give all weights gradients of 1, and of 0.5 at odd steps."""
    for layer in net.parameters():
        layer.grad = torch.full_like(layer, 1 - 0.5 * (step % 2))


def print_to_text(show: Callable[[Console], object], width: int) -> str:
    """Return what a function prints on a console of a width."""
    file = io.StringIO()
    show(Console(file=file, width=width))
    return file.getvalue()


def report(run: Run) -> RunReport:
    return RunReport.from_run(run)
