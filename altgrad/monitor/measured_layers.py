"""`MeasuredLayers`: the layers of a run that are measured, with their parameters.

Read `layer_settings` first, which decides which layers these are. `watch` comes next and describes
them to other ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.optim import Optimizer

from altgrad.monitor.layer_settings import LayerSettings
from altgrad.observation.parameter_names import ParameterRegistry
from altgrad.quantization.devices import find_exact_device


class MeasuredLayers:
    """The layers of a run that are measured: those with a measured dtype that no rule disables.

    Args:
        registry: All parameters by name.
        settings: Settings of each layer.

    Attributes:
        registry: The `registry` argument.
        settings: The `settings` argument.
    """

    def __init__(self, registry: ParameterRegistry, settings: LayerSettings) -> None:
        self.registry = registry
        self.settings = settings

    @property
    def names(self) -> list[str]:
        """The names of the layers in the order of the model, of frozen ones, too."""
        return self._select(self.registry.parameters.items())

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters that require a gradient, by name."""
        known = self.registry.parameters
        return {name: known[name] for name in self.names if known[name].requires_grad}

    @property
    def measures_on_host(self) -> bool:
        """True if the CPU measures some of the layers."""
        parameters = self.registry.parameters.values()
        return any(find_exact_device(each.device).type == "cpu" for each in parameters)

    def list_stepped(self, optimizer: Optimizer) -> tuple[str, ...]:
        """Return the names of the layers that an optimizer steps, in the order of its groups."""
        stepped = self.registry.find_stepped(optimizer)
        return tuple(self._select((name, parameter) for name, parameter, _ in stepped))

    def find_stepped(self, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
        """Return the parameters that any of these optimizers steps, by name.

        Args:
            optimizers: The optimizers.

        Returns:
            The parameters in the order of the model.
        """
        names = {name for optimizer in optimizers for name in self.list_stepped(optimizer)}
        return {n: p for n, p in self.registry.parameters.items() if n in names}

    def count_elements(self, name: str) -> int:
        """Return the number of elements of a layer that are measured in a step."""
        return self.settings.count_measured(name, self.registry.parameters[name].shape)

    def is_whole(self, name: str) -> bool:
        """Return True if a layer is measured, and all of its elements are, not a sample."""
        parameter = self.registry.parameters.get(name)
        if parameter is None or not self.settings.is_measured(name, parameter):
            return False
        return self.count_elements(name) == parameter.shape.numel()

    def _select(self, layers: Iterable[tuple[str, Tensor]]) -> list[str]:
        return [name for name, each in layers if self.settings.is_measured(name, each)]
