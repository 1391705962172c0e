"""`Watched` compares a monitor of a sharded model with one process that sees the same steps."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

import torch
from torch import nn

from altgrad import StepRecord, UpdateMonitor
from tests.distributed.comparing import differences, without
from tests.distributed.sharded import WholeSteps, replayed


class Watched:
    """A monitor of a sharded model, and the same steps in one process."""

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.records: list[StepRecord] = []
        self.told: list[str] = []
        self.truth = WholeSteps(net, optimizer)
        self.monitor = UpdateMonitor(net, self.records.append, warn=self.told.append, strict=True)
        self.monitor.attach(optimizer)

    def problems(self, left_out: AbstractSet[str] = frozenset()) -> list[str]:
        """Describe the differences from one process, except in layers that are left out."""
        parameters: dict[str, nn.Parameter] = {}
        for step in self.truth.steps:
            for name, (before, _, _) in step.items():
                parameters.setdefault(name, nn.Parameter(before.clone()))
        expected = replayed(self.truth.steps, parameters=parameters).records
        assert expected
        assert len(self.records) == len(expected)
        pairs = zip(self.records, expected, strict=True)
        pairs = [(own, without(other, left_out)) for own, other in pairs]
        return [found for own, other in pairs for found in differences(own, other)]
