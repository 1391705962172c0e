"""`Watch`: describe what a monitor observes, for the other ranks to compare.

Ranks that share parameters exchange sums at each observed step, and have to agree on layers,
elements and settings. `altgrad.distributed.together` reads a `Watch` on each rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from altgrad.monitor.layer_settings import LayerSettings
from altgrad.observation.parameter_names import ParameterRegistry
from altgrad.quantization.format_set import FormatSet


class Watch:
    """A view of a monitor: its layers, how each is observed, and all that its decisions depend on.

    Args:
        registry: The parameters by name.
        settings: Settings of each layer.
        formats: The formats that are judged.
        decides: Callback that returns all that decisions depend on: the monitor's arguments under
            ``"settings"`` and its loaded state under ``"state"``, each by name.
        tell: Callback with a notice for the user.

    Attributes:
        formats: The `formats` argument.
    """

    def __init__(
        self,
        registry: ParameterRegistry,
        settings: LayerSettings,
        formats: FormatSet,
        decides: Callable[[], Mapping[str, Mapping[str, object]]],
        tell: Callable[[str], object],
    ) -> None:
        self.formats = formats
        self._registry = registry
        self._settings = settings
        self._decides = decides
        self._tell = tell

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The parameters by name, in the order of the model."""
        return self._registry.parameters

    def measured_by(self, optimizer: Optimizer) -> tuple[str, ...]:
        """Return the names of the layers that an optimizer steps and that are measured.

        Args:
            optimizer: The optimizer.

        Returns:
            The names, in the order of the optimizer's parameters.
        """
        stepped = {name: parameter for name, parameter, _ in self._registry.find_stepped(optimizer)}
        return tuple(self._settings.measured_names([*stepped], stepped))

    def find_stepped(self, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
        """Return the parameters that optimizers step and that are measured.

        Args:
            optimizers: The optimizers.

        Returns:
            The parameters by name, in the order of the model.
        """
        names = {name for optimizer in optimizers for name in self.measured_by(optimizer)}
        return {n: p for n, p in self.parameters.items() if n in names}

    def indices(self, name: str, shape: torch.Size) -> Tensor | None:
        """Return the elements of a layer that all ranks together measure.

        Args:
            name: Name of the layer.
            shape: Shape of the whole layer.

        Returns:
            Flat indices, int64 (elements) on the CPU. None for all elements.
        """
        return self._settings.measured_indices(name, shape)

    def describe(self) -> Mapping[str, Mapping[str, object]]:
        """Return settings, state and layers, each of which has to be equal on all ranks."""
        # By name: ranks that differ are then told which layer or setting differs.
        layers = {name: self._settings.get(name) for name in self.parameters}
        return {**self._decides(), "layers": layers}

    def is_enabled(self, name: str) -> bool:
        """Return True if a layer is enabled."""
        return self._settings.get(name).enabled

    def leave_out(self, names: Sequence[str], why: str) -> None:
        """Stop observing some layers, and give a notice.

        Args:
            names: Names of the layers.
            why: The notice.
        """
        self._settings.leave_out(names)
        self._tell(why)
