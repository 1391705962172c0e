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
from altgrad.observation.snapshots import WHOLE_UP_TO
from altgrad.quantization.arguments import INPUT_DTYPES
from altgrad.quantization.block_formats import get_formats
from altgrad.quantization.format_set import FormatSet
from altgrad.quantization.number_format import NumberFormat


class LayerSettings:
    """What the rules and a monitor's own settings come to, layer by layer.

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
        """Those of one layer, also of one that the module has got since."""
        if name not in self.by_name:
            matching = [rule for rule in self._rules if rule.matches(name)]
            self.by_name |= self._resolved([name], matching)
        return self.by_name[name]

    def leave_out(self, names: Sequence[str]) -> None:
        """Observe these no more."""
        for name in names:
            self.by_name[name] = replace(self.by_name[name], enabled=False)

    def leave_out_formats(self, name: str, formats: Sequence[str]) -> None:
        """Judge this one no more for these."""
        layer = self.of(name)
        kept = tuple(format for format in layer.formats if format not in formats)
        self.by_name[name] = replace(layer, formats=kept)

    def is_measured(self, name: str, parameter: Tensor) -> bool:
        """Whether a layer can and should be."""
        if is_lazy(parameter) or parameter.dtype not in INPUT_DTYPES:
            return False
        return self.of(name).enabled

    def measured_names(self, names: Sequence[str], parameters: Mapping[str, Tensor]) -> list[str]:
        """Those of some names that are."""
        return [name for name in names if self.is_measured(name, parameters[name])]

    def measured(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of some parameters that are, as long as they are trained."""
        return {
            name: parameter
            for name, parameter in parameters.items()
            if parameter.requires_grad and self.is_measured(name, parameter)
        }

    def is_due(self, name: str, index: int, last: int) -> bool:
        """Whether a layer is wanted in an observed step, from that in which it last was."""
        layer = self.of(name)
        return layer.enabled and (last >= index or index - last >= layer.every_n_steps)

    def indices(self, name: str, shape: torch.Size) -> Tensor | None:
        """The sample of a layer's elements; None for all."""
        most, block = self.of(name).max_elements, self._formats.block
        return sample_elements(name, shape, most, seed=self.seed, block=block)

    def measured_indices(self, name: str, shape: torch.Size) -> Tensor | None:
        """Likewise, of which small layers are measured whole."""
        return None if shape.numel() <= WHOLE_UP_TO else self.indices(name, shape)

    def _resolved(
        self, names: Sequence[str], rules: Sequence[SamplingRule]
    ) -> dict[str, LayerSampling]:
        """With the formats' own names."""
        known = self._formats.names
        return {
            name: replace(
                layer,
                formats=tuple(f if f in known else get_formats(f)[0].name for f in layer.formats),
            )
            for name, layer in resolve_layers(names, rules, **self._own).items()
        }
