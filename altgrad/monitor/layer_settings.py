"""`LayerSettings`: how each layer is observed, and which of its elements are measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from altgrad.monitor.elements import sample_elements
from altgrad.observation.rules import LayerSampling, SamplingRule, resolve_layers
from altgrad.quantization.arguments import INPUT_DTYPES
from altgrad.quantization.block_formats import get_formats
from altgrad.quantization.format_set import FormatSet
from altgrad.quantization.number_format import NumberFormat

WHOLE_UP_TO = 2048
"""Up to this size a layer is measured whole: to choose elements would take longer."""


class LayerSettings:
    """The settings of each layer, from the rules and the monitor's own arguments.

    Args:
        names: Of the layers.
        rules: The first that matches a name holds.
        formats: All formats, also those that only rules name.
        own_formats: The monitor's own.
        every_n_steps, max_elements: Likewise.
        seed: Of the choice of elements.

    Attributes:
        by_name: Of each layer.
        seed: As given.

    Raises:
        ValueError: A rule that matches no layer.
    """

    def __init__(
        self,
        names: Sequence[str],
        rules: Sequence[SamplingRule],
        formats: FormatSet,
        own_formats: Sequence[NumberFormat],
        *,
        every_n_steps: int,
        max_elements: int | None,
        seed: int,
    ) -> None:
        self._rules = tuple(rules)
        self._formats = formats
        self.seed = seed
        self._own: dict[str, Any] = {
            "every_n_steps": every_n_steps,
            "max_elements": max_elements,
            "formats": tuple(format.name for format in own_formats),
        }
        self.by_name = self._resolved(names, self._rules)

    def of(self, name: str) -> LayerSampling:
        """Return the settings of a layer, also of one that the module has got since."""
        if name not in self.by_name:
            matching = [rule for rule in self._rules if rule.matches(name)]
            self.by_name |= self._resolved([name], matching)
        return self.by_name[name]

    def leave_out(self, names: Sequence[str]) -> None:
        """Observe these layers no more."""
        for name in names:
            self.by_name[name] = replace(self.by_name[name], enabled=False)

    def leave_out_formats(self, name: str, formats: Sequence[str]) -> None:
        """Judge a layer no more for some formats.

        Args:
            name: Name of the layer.
            formats: Names of the formats.
        """
        layer = self.of(name)
        kept = tuple(format for format in layer.formats if format not in formats)
        self.by_name[name] = replace(layer, formats=kept)

    def is_measured(self, name: str, parameter: Tensor) -> bool:
        """Return whether a layer is enabled, and its parameter has a dtype that is measured.

        Args:
            name: Name of the layer.
            parameter: The parameter.
        """
        if is_lazy(parameter) or parameter.dtype not in INPUT_DTYPES:
            return False
        return self.of(name).enabled

    def measured_names(self, names: Sequence[str], parameters: Mapping[str, Tensor]) -> list[str]:
        """Return the names among these whose layers are measured.

        Args:
            names: Names of layers.
            parameters: The parameters by name.
        """
        return [name for name in names if self.is_measured(name, parameters[name])]

    def measured(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters among these that are measured and trained, by name."""
        return {
            name: parameter
            for name, parameter in parameters.items()
            if parameter.requires_grad and self.is_measured(name, parameter)
        }

    def enabled(self, names: Sequence[str]) -> list[str]:
        """Return the layers among these that are observed at all."""
        known = self.by_name
        return [n for n in names if (known[n] if n in known else self.of(n)).enabled]

    def judged(self, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Return the names of the formats that each of these layers is judged for."""
        known = self.by_name
        return {n: (known[n] if n in known else self.of(n)).formats for n in names}

    def is_due(self, name: str, index: int, last: int) -> bool:
        """Return whether a layer is part of an observed step.

        Args:
            name: Name of the layer.
            index: Index of the step.
            last: Index of the last observed step that the layer was part of; `index` if none.
        """
        layer = self.of(name)
        return layer.enabled and (last >= index or index - last >= layer.every_n_steps)

    def indices(self, name: str, shape: torch.Size) -> Tensor | None:
        """Return the sample of a layer's elements.

        Args:
            name: Name of the layer.
            shape: Shape of the whole parameter.

        Returns:
            int64, flat indices on the CPU; None for all.
        """
        most, block = self.of(name).max_elements, self._formats.block
        return sample_elements(name, shape, most, seed=self.seed, block=block)

    def measured_indices(self, name: str, shape: torch.Size) -> Tensor | None:
        """Return the elements of a layer that are measured; of up to 2,048 elements all.

        Args:
            name: Name of the layer.
            shape: Shape of the whole parameter.

        Returns:
            int64, flat indices on the CPU; None for all.
        """
        return None if shape.numel() <= WHOLE_UP_TO else self.indices(name, shape)

    def _resolved(
        self, names: Sequence[str], rules: Sequence[SamplingRule]
    ) -> dict[str, LayerSampling]:
        """Apply the rules, and replace spellings of formats by the formats' own names."""
        known = self._formats.names
        return {
            name: replace(
                layer,
                formats=tuple(f if f in known else get_formats(f)[0].name for f in layer.formats),
            )
            for name, layer in resolve_layers(names, rules, **self._own).items()
        }
