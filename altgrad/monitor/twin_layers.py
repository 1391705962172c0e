"""`TwinLayers`: the layers that the twins of a monitor step, with their samples and scales.

A twin stores a sample of each layer as a recipe says, and makes every step of the optimizer.
`altgrad.twins.twins` steps the twins and asks here which elements they have; `TwinSource` there
documents each method.

Read `layer_settings` and `scale_state` first; `monitor` comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from altgrad.distributed.peers import Peers
from altgrad.monitor.elements import sample_elements
from altgrad.monitor.layer_settings import LayerSettings
from altgrad.monitor.scale_state import ScaleState
from altgrad.observation.parameter_names import ParameterRegistry
from altgrad.twins.sample import draw_sample
from altgrad.twins.twin_source import TwinSource


class TwinLayers(TwinSource):
    """The layers of a monitor with their samples and scales, for `altgrad.twins.twins`.

    A twin is a sample of a layer that is stored and stepped as a recipe says.

    Args:
        registry: The parameters by name.
        settings: Settings of each layer.
        scale_state: The amax, largest finite magnitude, of each layer.
        get_peers: Function that returns the ranks that share the parameters.
        warn: Function that is called with each notice for the user.
        warns_about_omissions: True if the user has named recipes. With the default recipes, layers
            without twins are no reason to warn.

    Attributes:
        scaling: Which elements share a scale, as in `altgrad.measure`.
        seed: Seed of the samples and of the stochastic rounding of twins.
    """

    def __init__(
        self,
        registry: ParameterRegistry,
        settings: LayerSettings,
        scale_state: ScaleState,
        get_peers: Callable[[], Peers],
        warn: Callable[[str], None],
        *,
        warns_about_omissions: bool,
    ) -> None:
        self.scaling = scale_state.scaling
        self.seed = settings.seed
        self._registry = registry
        self._settings = settings
        self._scale_state = scale_state
        self._get_peers = get_peers
        self._warn = warn
        self._warns_about_omissions = warns_about_omissions

    @property
    def names(self) -> Mapping[Tensor, str]:
        return self._registry.names

    @property
    def can_step(self) -> bool:
        # If parameters are sharded, no rank holds a whole sample.
        return self._get_peers().size == 1

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
        return sample_elements(name, shape, most, seed=self.seed, block=block)

    def find_amaxes(self, name: str, indices: Tensor) -> Tensor:
        parameter = self._registry.parameters[name]
        self._scale_state.ensure_amax({name: parameter}, self._get_peers())
        groups = self._scale_state.amaxes(name).groups
        if len(groups) > 1:
            groups = groups[indices // (parameter.numel() // len(groups))]
        return groups

    def warn(self, notice: str) -> None:
        self._warn(notice)

    def warn_about_omission(self, notice: str) -> None:
        if self._warns_about_omissions:
            self._warn(notice)
