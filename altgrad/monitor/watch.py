"""`Watch`: describe what a monitor observes, for the other ranks to compare.

Ranks that share parameters add up their sums at each observed step. For this, their layers,
elements and settings must be equal. `altgrad.distributed.together` reads a `Watch` on each rank;
its class `Watched` documents each method.

Read `measured_layers` first; `monitor` comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from altgrad.distributed.together import Watched
from altgrad.distributed.twin_message import TwinPlan
from altgrad.monitor.measured_layers import MeasuredLayers
from altgrad.quantization.format_set import FormatSet


class Watch(Watched):
    """A description of a monitor for other ranks: layers, their settings, and the monitor's state.

    Args:
        layers: The layers that are measured.
        formats: The formats for which figures (values of metrics) are computed.
        arguments: The monitor's arguments that decide what is observed, by name.
        describe_state: Function that returns the state that decides what is observed next, by name.
        warn: Function that is called with each notice for the user.
        twins: The recipes whose twins, samples that are stepped as the recipes say, are measured.

    Attributes:
        formats: The `formats` argument.
        twins: The `twins` argument.
    """

    def __init__(
        self,
        layers: MeasuredLayers,
        formats: FormatSet,
        arguments: Mapping[str, object],
        describe_state: Callable[[], Mapping[str, object]],
        warn: Callable[[str], object],
        twins: TwinPlan,
    ) -> None:
        self.formats = formats
        self.twins = twins
        self._layers = layers
        self._arguments = arguments
        self._describe_state = describe_state
        self._warn = warn

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        return self._layers.registry.parameters

    def measured_by(self, optimizer: Optimizer) -> tuple[str, ...]:
        return self._layers.list_stepped(optimizer)

    def indices(self, name: str, shape: torch.Size) -> Tensor | None:
        return self._layers.settings.measured_indices(name, shape)

    def describe(self) -> list[str]:
        sampling = {name: self._layers.settings.get(name) for name in self.parameters}
        state = self._describe_state()
        kinds = {"setting": self._arguments, "state": state, "sampling": sampling}
        return [
            f"{kind} {name}={value!r}"
            for kind, values in kinds.items()
            for name, value in values.items()
        ]

    def leave_out(self, names: Sequence[str], why: str) -> None:
        self._layers.settings.leave_out(names)
        self._warn(why)
