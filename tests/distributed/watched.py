"""`Watched`: a model that ranks share, beside one process that sees the same steps of all."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

import torch
from torch import nn

from altgrad import StepRecord, UpdateMonitor
from tests.distributed.comparing import differences, without
from tests.distributed.sharded import WholeSteps, replayed


class Watched:
    """A monitor of a model that is shared, and what one process says of the same steps."""

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.records: list[StepRecord] = []
        self.told: list[str] = []
        self.truth = WholeSteps(net, optimizer)
        self.monitor = UpdateMonitor(net, self.records.append, tell=self.told.append, strict=True)
        self.monitor.attach(optimizer)

    def problems(self, left_out: AbstractSet[str] = frozenset()) -> list[str]:
        """Where they differ, of other layers than these."""
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
