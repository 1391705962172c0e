"""`LayerSettings`: how often and for which formats each layer is observed, and which elements.

Read `altgrad.observation.rules` first, which resolves rules, and `elements`, which draws samples.

`measured_layers` comes next.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from altgrad.monitor.elements import SAMPLING_VERSION, sample_elements
from altgrad.observation.rules import (
    TWIN_ELEMENTS,
    LayerSampling,
    SamplingRule,
    resolve_layers,
)
from altgrad.quantization.arguments import INPUT_DTYPES
from altgrad.quantization.block_formats import get_formats
from altgrad.quantization.format_set import FormatSet
from altgrad.quantization.number_format import NumberFormat

WHOLE_UP_TO = 2048
"""Maximum number of elements of a layer that is measured whole; sampling it would take longer."""


class LayerSettings:
    """The settings of each layer, from the rules and the arguments of a monitor.

    Args:
        names: Names of the layers.
        rules: Rules for single layers; the first one that matches a layer's name applies to it.
        formats: All formats, including those that only a rule names.
        own_formats: The `formats` argument of the monitor, for layers whose rule names none.
        every_n_steps: Interval in steps, for layers without a rule.
        max_elements: Maximum number of elements of a sample, for layers without a rule. None for
            all elements.
        seed: Seed of the samples.
        twin_elements: Maximum number of elements in twins, samples that are stored and stepped as
            recipes say, for layers without a rule.

    Attributes:
        by_name: Settings of each layer, by name.
        seed: The `seed` argument.

    Raises:
        ValueError: A rule matches no layer.
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
        twin_elements: int = TWIN_ELEMENTS,
    ) -> None:
        self._rules = tuple(rules)
        self._formats = formats
        self.seed = seed
        self._defaults: dict[str, Any] = {
            "every_n_steps": every_n_steps,
            "max_elements": max_elements,
            "formats": tuple(format.name for format in own_formats),
            "twin_elements": twin_elements,
        }
        self._blocks: dict[str, int] = {}
        self.by_name = self._resolved(names, self._rules)

    def get(self, name: str) -> LayerSampling:
        """Return the settings of a layer; those of a new name are found by the rules and kept."""
        if name not in self.by_name:
            # `resolve_layers` raises for rules that match no layer, as most do with a single layer.
            matching = [rule for rule in self._rules if rule.matches(name)]
            self.by_name |= self._resolved([name], matching)
        return self.by_name[name]

    def leave_out(self, names: Sequence[str]) -> None:
        """Change the settings of some layers, so that they are no longer observed."""
        for name in names:
            self.by_name[name] = replace(self.by_name[name], enabled=False)

    def leave_out_formats(self, name: str, formats: Sequence[str]) -> None:
        """Change the settings of a layer, so that it is no longer measured for some formats.

        Args:
            name: Name of the layer.
            formats: Names of the formats to leave out.
        """
        layer = self.get(name)
        kept = tuple(format for format in layer.formats if format not in formats)
        self.by_name[name] = replace(layer, formats=kept)

    def is_measured(self, name: str, parameter: Tensor) -> bool:
        """Return True if rules let a layer be observed, and its parameter has a dtype to measure.

        Args:
            name: Name of the layer.
            parameter: The layer's parameter.
        """
        # A lazy parameter (torch.nn.LazyLinear) has no shape before the first forward pass.
        if is_lazy(parameter) or parameter.dtype not in INPUT_DTYPES:
            return False
        return self.get(name).enabled

    def enabled(self, names: Sequence[str]) -> list[str]:
        """Return those of the given names whose layers are observed: `enabled` by their rule."""
        known = self.by_name  # a step asks for all layers, and calling `get` for each takes longer
        return [n for n in names if (known[n] if n in known else self.get(n)).enabled]

    def judged(self, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Return for each layer the number formats, such as ``bf16``, that it is measured for.

        For each of them, the metrics say how much of an update would be left if the layer's weights
        were stored in the format.

        Args:
            names: Names of the layers.

        Returns:
            The names of the formats of each layer.
        """
        known = self.by_name
        return {n: (known[n] if n in known else self.get(n)).formats for n in names}

    def is_due(self, name: str, index: int, last: int) -> bool:
        """Return True if the interval of a layer has passed, so that the step measures it.

        Args:
            name: Name of the layer.
            index: Index of the step.
            last: Index of the last observed step that the layer was part of; `index` if there was
                no such step.
        """
        layer = self.get(name)
        # last >= index: never observed so far, or steps are counted from 0 again.
        return layer.enabled and (last >= index or index - last >= layer.every_n_steps)

    def block(self, name: str) -> int:
        """Return the size of the blocks, neighbouring elements, in which a layer's sample is drawn.

        A block format, such as ``mxfp4``, has one scale for a block of neighbours, so that the
        sample must have whole blocks. Every block size of the layer's formats divides the result.
        Without a block format the result is 1: elements are drawn one by one.
        """
        self.get(name)
        return self._blocks[name]

    def describe_samples(self) -> dict[str, Any]:
        """Return all that decides which elements are drawn, except names and shapes of layers.

        Returns:
            A dict with three keys: ``version``, the `SAMPLING_VERSION`; ``seed``; and ``blocks``, a
            dict of the layers that are drawn in blocks, with the number of elements in a block.
        """
        blocks = {name: block for name, block in self._blocks.items() if block > 1}
        return {"version": SAMPLING_VERSION, "seed": self.seed, "blocks": blocks}

    def find_other_samples(
        self, names: Iterable[str], described: Mapping[str, Any] | None
    ) -> list[str]:
        """Return the layers whose samples hold other elements than in an earlier run.

        Args:
            names: Names of layers.
            described: The result of `describe_samples` in the earlier run. None for a run of
                version 0.1.0, which drew blocks in all layers and did not state its seed.

        Returns:
            Those of the names whose samples differ.
        """
        now = self.describe_samples()
        if described is None:
            blocks = dict.fromkeys(self._blocks, self._formats.block)
            described = {**now, "version": 1, "blocks": blocks}
        if described.keys() != now.keys() or any(
            described[key] != now[key] for key in ("version", "seed")
        ):
            return [*names]
        before, after = (each["blocks"] for each in (described, now))
        return [name for name in names if before.get(name, 1) != after.get(name, 1)]

    def indices(self, name: str, shape: torch.Size) -> Tensor | None:
        """Draw the sample of a layer's elements, also if the layer could be measured whole.

        Args:
            name: Name of the layer.
            shape: Shape of the whole layer.

        Returns:
            Indices into the flattened layer, int64 (elements) on the CPU. None for all elements.
        """
        most = self.get(name).max_elements
        return sample_elements(name, shape, most, seed=self.seed, block=self.block(name))

    def measured_indices(self, name: str, shape: torch.Size) -> Tensor | None:
        """Return the elements of a layer that are measured: all up to 2,048, else the sample.

        Args:
            name: Name of the layer.
            shape: Shape of the whole layer.

        Returns:
            Indices into the flattened layer, int64 (elements) on the CPU. None for all elements.
        """
        return None if shape.numel() <= WHOLE_UP_TO else self.indices(name, shape)

    def count_measured(self, name: str, shape: torch.Size) -> int:
        """Return the number of elements of a layer that are measured.

        Args:
            name: Name of the layer.
            shape: Shape of the whole layer.
        """
        indices = self.measured_indices(name, shape)
        return shape.numel() if indices is None else len(indices)

    def _resolved(
        self, names: Sequence[str], rules: Sequence[SamplingRule]
    ) -> dict[str, LayerSampling]:
        """Return the settings of layers by the rules, and remember the sizes of blocks to draw.

        Args:
            names: Names of the layers.
            rules: Rules; the first one that matches a layer's name applies to the layer.

        Returns:
            Settings by name of the layer, with canonical names of formats, such as ``"e4m3fn"`` for
            ``"e4m3"``.
        """
        known = self._formats.names
        resolved = {
            name: replace(
                layer,
                formats=tuple(f if f in known else get_formats(f)[0].name for f in layer.formats),
            )
            for name, layer in resolve_layers(names, rules, **self._defaults).items()
        }
        find_block = self._formats.find_block
        # Set once: formats that are left out later must not change the sample.
        self._blocks |= {name: find_block(layer.formats) for name, layer in resolved.items()}
        return resolved
