"""`StoredStates`: the states that an optimizer keeps of one layer, stored in formats.

Read `rounding` first. `storage` comes next, and stores weights and states of a whole model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from altgrad.observation.stored import StoredState
from altgrad.quantization.arguments import INPUT_DTYPES
from altgrad.quantization.formats import Scaling
from altgrad.quantization.number_format import NumberFormat, get_applied_scaling
from altgrad.quantization.scaling import compute_amax, compute_format_scales
from altgrad.recipes.rounding import StorageRounding, store_

_ALL = "*"
# A counter has the shape of a parameter without dimensions, and stands still in a coarse format.
_COUNTERS = ("step",)


class StoredStates:
    """The states of one layer, by name, and the formats in which they are stored.

    Formats of fewer than 16 bits have scales, powers of two. Scales of weights only grow. Those of
    states are taken anew at each step, because a second moment may fall by many binades, and
    would become 0 under the scale of its largest value ever.

    Args:
        name: The name of the layer.
        formats: The format of each state by its name; ``"*"`` for all others.
        scaling: The elements that share a scale, as in `WeightStorage`.

    Attributes:
        stored: How each state was stored by the last step, by its name.
    """

    def __init__(
        self, name: str, formats: Mapping[str, NumberFormat], scaling: Scaling | None
    ) -> None:
        self.stored: dict[str, StoredState] = {}
        self._name = name
        self._formats = formats
        self._scaling = scaling

    @torch.no_grad()
    def store(
        self,
        parameter: Tensor,
        states: Mapping[str, Any],
        rounding: StorageRounding,
        generator: torch.Generator | None,
    ) -> None:
        """Round the states to their formats, in place.

        Args:
            parameter: The weights of the layer.
            states: What the optimizer keeps of the layer, by name.
            rounding: The way to round.
            generator: The random number generator for ``"stochastic"``, on the device of the layer.

        Raises:
            ValueError: A state has a dtype that is not finer than its format.
        """
        for name, state, format in self._select(parameter, states):
            scale = self._find_scale(state, format)
            store_(state, format.element, scale, rounding=rounding, generator=generator)
            self.stored[name] = StoredState(format.element, scale)

    def _select(
        self, parameter: Tensor, states: Mapping[str, Any]
    ) -> Iterator[tuple[str, Tensor, NumberFormat]]:
        """Yield name, values and format of each state to be stored.

        Raises:
            ValueError: A state has a dtype that is not finer than its format.
        """
        for name, state in states.items():
            format = self._formats.get(name, self._formats.get(_ALL))
            if format is None or not isinstance(state, Tensor) or state.shape != parameter.shape:
                continue
            if not state.is_floating_point() or name in _COUNTERS:
                continue
            if state.dtype == format.element.torch_dtype and format.block_size is None:
                continue  # stored already
            if state.dtype not in INPUT_DTYPES or not format.is_coarser_than(state.dtype):
                raise ValueError(
                    f"the state {name!r} of {self._name} has dtype {state.dtype}, which is not "
                    f"finer than {format.name}: expected float32; name the states to store, "
                    f"without {name!r}"
                )
            yield name, state, format

    def _find_scale(self, state: Tensor, format: NumberFormat) -> Tensor | None:
        """Return the scale of each element; None for a format without scales."""
        scaling = get_applied_scaling(format, self._scaling)
        if scaling is None:
            return None
        scales = compute_format_scales(compute_amax(state, scaling), format)
        return expand_scales(scales, state.shape, scaling)


def expand_scales(scales: Tensor, shape: torch.Size, scaling: Scaling) -> Tensor:
    """Return scales of a shape that broadcasts to that of their elements.

    Args:
        scales: One for the tensor, for each channel or for each block.
        shape: The shape of the elements.
        scaling: The elements that share a scale.

    Returns:
        The scales; those of blocks have the given shape.
    """
    if isinstance(scaling, str) or not shape:
        return scales
    size = max(min(scaling[1], shape[-1]), 1)
    return scales.repeat_interleave(size, dim=-1)[..., : shape[-1]]
