"""Runs whose verdicts are known: weights of 1 that a step of 0.001 moves, or one of 0.25."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from altgrad import UpdateMonitor
from altgrad.monitor.weight_octaves import weight_octaves
from altgrad.report import RunFile

SCRIPT, MARKUP = "<script>alert('x')</script>", "[red]layers[/].0|*b*.weight"
FORMATS = ("bf16", "e5m2")


def written_run(
    folder: Path,
    frozen: Sequence[str] = ("gain", SCRIPT),
    fine: Sequence[str] = ("matrix", MARKUP),
    *,
    steps: int = 3,
    formats: Sequence[str] = FORMATS,
) -> Path:
    """A run file: the gains stall in all formats with up to 8 bits of significand."""
    parameters = {name: nn.Parameter(torch.ones(8)) for name in (*frozen, *fine)}
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    monitor = UpdateMonitor([*parameters.items()], formats=formats, scaling=None, strict=True)
    with RunFile.create(folder, monitor.run_header()) as file, monitor.attach(optimizer):
        for step in range(steps):
            for name, parameter in parameters.items():
                size = 1e-3 if name in frozen else 0.25
                parameter.grad = torch.full((8,), size if step % 2 else -size)
            optimizer.step()
            weights = weight_octaves(parameters)
            file.append(10 * step, monitor.latest, skipped={"inf": step}, weights=weights)
    return file.path


def empty_run(folder: Path) -> Path:
    """Killed before its first observed step."""
    return written_run(folder, steps=0)
