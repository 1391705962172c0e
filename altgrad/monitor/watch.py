"""`Watch`: describe what a monitor observes, for the other ranks to compare.

Ranks that share parameters add up their sums at each observed step. For this, their layers,
elements and settings must be equal. `altgrad.distributed.together` reads a `Watch` on each rank;
its class `Watched` documents each method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from altgrad.distributed.together import Watched
from altgrad.distributed.twin_message import TwinPlan
from altgrad.monitor.layer_settings import LayerSettings
from altgrad.observation.parameter_names import ParameterRegistry
from altgrad.quantization.format_set import FormatSet


class Watch(Watched):
    """A description of a monitor for other ranks: layers, their settings, and the monitor's state.

    Args:
        registry: The parameters by name.
        settings: Settings of each layer.
        formats: The formats for which figures (values of metrics) are computed.
        decides: Function that returns all that decides what is observed: the monitor's arguments
            under ``"setting"`` and its loaded state under ``"state"``, each by name.
        warn: Function that is called with each notice for the user.
        twins: The recipes whose twins, samples that are stepped as the recipes say, are measured.

    Attributes:
        formats: The `formats` argument.
        twins: The `twins` argument.
    """

    def __init__(
        self,
        registry: ParameterRegistry,
        settings: LayerSettings,
        formats: FormatSet,
        decides: Callable[[], Mapping[str, Mapping[str, object]]],
        warn: Callable[[str], object],
        twins: TwinPlan,
    ) -> None:
        self.formats = formats
        self.twins = twins
        self._registry = registry
        self._settings = settings
        self._decides = decides
        self._warn = warn

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        return self._registry.parameters

    def measured_by(self, optimizer: Optimizer) -> tuple[str, ...]:
        stepped = {name: parameter for name, parameter, _ in self._registry.find_stepped(optimizer)}
        return tuple(self._settings.measured_names([*stepped], stepped))

    def find_stepped(self, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
        """Return the measured parameters that any of these optimizers steps.

        Args:
            optimizers: The optimizers.

        Returns:
            The parameters by name, in the order of the model.
        """
        names = {name for optimizer in optimizers for name in self.measured_by(optimizer)}
        return {n: p for n, p in self.parameters.items() if n in names}

    def indices(self, name: str, shape: torch.Size) -> Tensor | None:
        return self._settings.measured_indices(name, shape)

    def describe(self) -> list[str]:
        sampling = {name: self._settings.get(name) for name in self.parameters}
        kinds = {**self._decides(), "sampling": sampling}
        return [
            f"{kind} {name}={value!r}"
            for kind, values in kinds.items()
            for name, value in values.items()
        ]

    def leave_out(self, names: Sequence[str], why: str) -> None:
        self._settings.leave_out(names)
        self._warn(why)
