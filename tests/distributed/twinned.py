"""Train a sharded model with twins, and one process with the same gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from altgrad import StepRecord, UpdateMonitor
from tests.distributed.sharded import Net, WholeStep, WholeSteps
from tests.distributed.training import train

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1)


class Twinned:
    """A monitor with twins of a sharded model, with its records and the whole steps."""

    def __init__(self, net: nn.Module, make: MakeOptimizer = adamw, **settings: Any) -> None:
        self.net, self.make, self.settings = net, make, settings
        self.optimizer = make(net.parameters())
        self.truth = WholeSteps(net, self.optimizer)
        self.records: list[StepRecord] = []
        self.told: list[str] = []
        self.monitor = UpdateMonitor(
            net, self.records.append, warn=self.told.append, strict=True, **settings
        )
        self.monitor.attach(self.optimizer)

    def train(self, steps: int) -> None:
        train(self.net, self.optimizer, steps)

    def run_alone(self) -> tuple[UpdateMonitor, list[StepRecord]]:
        """Return a monitor of one process that steps the same gradients, and its records."""
        return run_alone(self.truth.steps, self.make, **self.settings)


def run_alone(
    steps: Sequence[WholeStep], make: MakeOptimizer = adamw, **settings: Any
) -> tuple[UpdateMonitor, list[StepRecord]]:
    net = Net()
    parameters = dict(net.named_parameters())
    optimizer = make(net.parameters())
    records: list[StepRecord] = []
    monitor = UpdateMonitor(net, records.append, strict=True, **settings).attach(optimizer)
    for step in steps:
        for name, parameter in parameters.items():
            parameter.grad = step[name][2].clone() if name in step else None
        optimizer.step()
        for name, (_, after, _) in step.items():
            assert torch.equal(parameters[name].detach().nan_to_num(), after.nan_to_num()), (
                f"{name}: the process went another way"
            )
    return monitor, records


def compare_twins(
    own: Sequence[StepRecord], truth: Sequence[StepRecord], near: float = 1e-12
) -> Iterator[str]:
    """Describe each figure of twins that differs; medians may differ by half a bin."""
    assert len(own) == len(truth)
    for mine, other in zip(own, truth, strict=True):
        pairs = [("model", mine.model, other.model)]
        pairs += [(n, mine.layers[n], figures) for n, figures in other.layers.items()]
        for name, figures, expected in pairs:
            if {*figures.twins} != {*expected.twins}:
                yield f"{name}: {sorted({*figures.twins} ^ {*expected.twins})}"
                continue
            for key in expected.twins:
                tolerance = 0.04 if "_ratio/" in key else near
                if not _is_near(figures.twins[key], expected.twins[key], tolerance):
                    yield f"{mine.index} {name} {key}: {figures.twins[key]}, {expected.twins[key]}"
                error, wanted = (each.twins.standard_error(key) for each in (figures, expected))
                if not _is_near(error**2, wanted**2, 1e-9):
                    yield f"{mine.index} {name} error of {key}: {error}, {wanted}"


def _is_near(value: float, wanted: float, tolerance: float) -> bool:
    if math.isnan(wanted):
        return math.isnan(value)
    return abs(value - wanted) <= tolerance * max(abs(wanted), 1e-3)
