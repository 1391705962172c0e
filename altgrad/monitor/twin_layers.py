"""`TwinLayers`: the layers that the twins of a monitor step, with their samples and scales.

A twin stores a sample of each layer as a recipe says, and makes every step of the optimizer.
`altgrad.twins.twins` steps the twins and asks here which elements they have; `TwinSource` there
documents each method.

Read `measured_layers` and `scale_state` first; `run_samples` comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from altgrad.distributed.peers import Alone
from altgrad.monitor.elements import sample_elements
from altgrad.monitor.measured_layers import MeasuredLayers
from altgrad.monitor.scale_state import ScaleState
from altgrad.monitor.sharding import Sharding
from altgrad.quantization.formats import Scaling
from altgrad.recipes.recipe import Recipe
from altgrad.twins.drawing import find_drawing
from altgrad.twins.layout import CHUNK
from altgrad.twins.sample import draw_sample
from altgrad.twins.twin_source import TwinSource


def count_most_sampled(
    twin_elements: Iterable[int], recipes: Iterable[Recipe], scaling: Scaling | None
) -> int:
    """Return the largest number of elements of a layer that twins step, on all ranks together.

    A twin is a sample of a layer that is stored and stepped as a recipe says.

    Args:
        twin_elements: The maximum for each layer of 64 elements or more, which a whole block may
            exceed.
        recipes: The recipes.
        scaling: Which elements share a scale, as in `altgrad.measure`.
    """
    blocks = (find_drawing(recipe, scaling).block for recipe in recipes)
    return max(CHUNK - 1, *twin_elements, *blocks)


class TwinLayers(TwinSource):
    """The layers of a monitor with their samples and scales, for `altgrad.twins.twins`.

    A twin is a sample of a layer that is stored and stepped as a recipe says.

    Args:
        layers: The layers that are measured.
        scale_state: The amax, largest finite magnitude, of each layer.
        sharding: The ranks that share the parameters.
        warn: Function that is called with each notice for the user.
        warn_here: Function that is called with each notice that concerns this rank alone.
        most_elements: Largest number of sampled elements of a layer on all ranks together.
        warns_about_omissions: True if the user has named recipes. With the default recipes, layers
            without twins are no reason to warn.

    Attributes:
        scaling: Which elements share a scale, as in `altgrad.measure`.
        most_elements: The `most_elements` argument.
    """

    def __init__(
        self,
        layers: MeasuredLayers,
        scale_state: ScaleState,
        sharding: Sharding,
        warn: Callable[[str], None],
        *,
        warn_here: Callable[[str], None],
        most_elements: int,
        warns_about_omissions: bool,
    ) -> None:
        self.scaling = scale_state.scaling
        self.most_elements = most_elements
        self._registry = layers.registry
        self._settings = layers.settings
        self._scale_state = scale_state
        self._sharding = sharding
        self._warn = warn
        self._warn_here = warn_here
        self._warns_about_omissions = warns_about_omissions

    @property
    def names(self) -> Mapping[Tensor, str]:
        return self._registry.names

    @property
    def seed(self) -> int:
        # Each rank rounds other elements, by random numbers of its own.
        return self._settings.seed + (self._sharding.peers.rank << 32)

    @property
    def is_shared(self) -> bool:
        return not isinstance(self._sharding.peers, Alone)

    def is_ready(self, name: str, parameter: Tensor) -> bool:
        is_known = name in self._sharding.peers.known({name: parameter})
        return is_known and self._scale_state.has_amax(name, parameter)

    def tears(self, name: str, block: int) -> bool:
        return self._sharding.peers.tears(name, block)

    def find_part(self, name: str, indices: Tensor | None) -> tuple[Tensor, Tensor]:
        part = self._sharding.peers.part(name, indices)
        assert part.indices is not None, "of a layer that ranks share"
        if part.local is None:  # all elements of the shard
            return part.indices, torch.arange(len(part.indices), device="cpu")
        return part.indices, part.local

    def find_stepped(self, optimizer: Optimizer) -> Sequence[tuple[str, Tensor]]:
        return [(name, each) for name, each, _ in self._registry.find_stepped(optimizer)]

    def has_twins(self, name: str) -> bool:
        layer = self._settings.get(name)
        return layer.enabled and layer.twin_elements > 0

    def draw(self, name: str, shape: torch.Size, block: int) -> Tensor:
        most = self._settings.get(name).twin_elements
        return draw_sample(self._draw_uniformly, name, shape, most, block)

    def _draw_uniformly(
        self, name: str, shape: Sequence[int], most: int, block: int
    ) -> Tensor | None:
        return sample_elements(name, shape, most, seed=self._settings.seed, block=block)

    def find_amaxes(self, name: str, indices: Tensor) -> Tensor:
        parameter = self._registry.parameters[name]
        self._scale_state.ensure_amax({name: parameter}, self._sharding.peers)
        groups = self._scale_state.amaxes(name).groups
        if len(groups) > 1:
            groups = groups[indices // (parameter.numel() // len(groups))]
        return groups

    def warn(self, notice: str) -> None:
        self._warn(notice)

    def warn_here(self, notice: str) -> None:
        self._warn_here(notice)

    def warn_about_omission(self, notice: str) -> None:
        if self._warns_about_omissions:
            self._warn(notice)
