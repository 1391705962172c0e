"""`Watch`: what a monitor is about to observe, as the other ranks have to know it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from altgrad.monitor.layer_settings import LayerSettings
from altgrad.observation.parameter_names import ParameterRegistry
from altgrad.quantization.format_set import FormatSet


class Watch:
    """The parameters of a monitor, how each is observed, and what it decides by.

    Args:
        registry: The parameters by name.
        settings: How each layer is observed.
        formats: The formats that are judged.
        decides: Returns the arguments under ``"settings"`` and, under ``"state"``, what a loaded
            state brings, by name: ranks decide alike if these are alike.
        tell: Called with what a user is to know.
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
        """Return the layers of an optimizer that are measured."""
        stepped = {name: parameter for name, parameter, _ in self._registry.stepped_by(optimizer)}
        return tuple(self._settings.measured_names([*stepped], stepped))

    def stepped_by(self, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
        """Return all parameters that any of these steps and that are measured, by name."""
        names = {name for optimizer in optimizers for name in self.measured_by(optimizer)}
        return {n: p for n, p in self.parameters.items() if n in names}

    def indices(self, name: str, shape: torch.Size) -> Tensor | None:
        """Return which elements of a layer all ranks together measure.

        Args:
            name: Name of the layer.
            shape: Shape of the whole parameter.

        Returns:
            int64, flat indices on the CPU; None for all.
        """
        return self._settings.measured_indices(name, shape)

    def describe(self) -> Mapping[str, Mapping[str, object]]:
        """Return settings, state and sampling of the layers, which must be alike on all ranks."""
        layers = {name: self._settings.of(name) for name in self.parameters}
        return {**self._decides(), "layers": layers}

    def is_enabled(self, name: str) -> bool:
        """Return whether a layer is observed at all."""
        return self._settings.of(name).enabled

    def leave_out(self, names: Sequence[str], why: str) -> None:
        """Observe these layers no more, and tell the user why.

        Args:
            names: The layers.
            why: The notice.
        """
        self._settings.leave_out(names)
        self._tell(why)
