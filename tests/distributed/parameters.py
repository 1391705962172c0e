"""`Parameters` stands in for a monitor, and `attached` makes ranks that observe them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from altgrad.distributed.together import Together
from altgrad.distributed.twin_message import TwinPlan
from altgrad.quantization.block_formats import get_formats
from altgrad.quantization.format_set import FormatSet


class Parameters:
    """A `Watched` whose parameters are stepped by one optimizer."""

    def __init__(self, parameters: Mapping[str, Tensor], indices: Any = lambda *_: None) -> None:
        self.parameters = parameters
        self.indices = indices
        self.formats = FormatSet(get_formats("bf16"), "tensor")
        self.twins = TwinPlan()
        self.left_out: list[str] = []

    def measured_by(self, optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
        return (*self.parameters,)

    def describe(self) -> dict[str, dict[str, object]]:
        return {"settings": {}, "state": {}}

    def leave_out(self, names: Sequence[str], why: str) -> None:
        self.left_out += names


def attached(parameters: Mapping[str, Tensor], indices: Any = lambda *_: None) -> Together:
    """Return ranks that shard the parameters, and have met and agreed."""
    ranks = Together(Parameters(parameters, indices))
    ranks.attach(list)
    return ranks
