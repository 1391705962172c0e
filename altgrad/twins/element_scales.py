"""`ElementScales`: the scale of each sampled element, for formats whose numbers share scales.

A *twin* steps a sample of each layer, as if its weights were stored in a format. Scales of layers
and channels come from whole layers of the *run*, the training that is watched, since a sample may
miss the element with the amax, the largest magnitude. A number of the twin that exceeds its scale
raises it at once, as in `altgrad.WeightStorage`. Blocks are sampled whole, and have their scales
from the twin's own numbers.

Read `twin_tensors` first; `twin` comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from altgrad.quantization.formats import Scaling
from altgrad.quantization.number_format import NumberFormat, get_applied_scaling
from altgrad.quantization.scaling import (
    compute_amax,
    compute_format_scales,
    compute_scale_from_amax,
)
from altgrad.twins.layout import Layout
from altgrad.twins.sample import Sampled, number_groups


class _Groups(NamedTuple):
    """The groups of sampled elements that share a scale. A group has no gaps, as samples ascend.

    Attributes:
        firsts: The position of each group's first element, int64 (groups).
        numbers: The number of each element's group, int64 (elements).
        own_first: The position of the first element in each element's group, int64 (elements).
    """

    firsts: Tensor
    numbers: Tensor
    own_first: Tensor

    def pick(self, each: Tensor) -> Tensor:
        """Return for each group what its first element has in a tensor (elements)."""
        return each.index_select(0, self.firsts)

    def spread(self, each: Tensor) -> Tensor:
        """Return for each element what its group has in a tensor (groups), in its dtype."""
        return each.index_select(0, self.numbers)  # on a CPU four times as fast as indexing


class ElementScales:
    """The scales of the sampled elements of some layers, for weights and for optimizer states.

    A scale is the factor between the numbers that a format stores and their values. It follows from
    the *amax*, the largest magnitude among the elements that share it.

    Args:
        scaling: The elements that share a scale: ``"tensor"``, ``"channel"`` (along dimension 0),
            ``("block", size)``, or None for no scale.
        find_amaxes: Function that takes the name of a layer and the indices of its sample. It
            returns the amax of each element's group, the weights that share its scale: float32 or
            float64 (elements), or (1) if the layer is one group.
    """

    def __init__(
        self, scaling: Scaling | None, find_amaxes: Callable[[str, Tensor], Tensor]
    ) -> None:
        self._scaling = scaling
        self._find_amaxes = find_amaxes
        self._layout = Layout()
        self._layers: Mapping[str, Sampled] = {}
        self._device = torch.device("cpu")
        self._groups: dict[Scaling, _Groups] = {}  # results of _find_groups
        self._weight_amaxes: Tensor | None = None
        self._state_amaxes: dict[str, dict[str, Tensor]] = {}  # by state, then by layer
        self._known_amaxes: dict[tuple[str, Scaling, torch.dtype], Tensor] = {}  # by group

    def read(
        self,
        layout: Layout,
        layers: Mapping[str, Sampled],
        device: torch.device,
        renewed: Collection[str] = (),
    ) -> None:
        """Set the sampled layers and their places, and drop the amaxes (largest magnitudes) so far.

        Amaxes of optimizer states stay for layers that are still there.

        Args:
            layout: The places of the layers in a flat tensor.
            layers: The layers by name.
            device: The device of the samples.
            renewed: Names of the layers whose twins take their states from the training again.
                Amaxes of their states are dropped, too.
        """
        self._state_amaxes = {
            state: {n: each for n, each in by_layer.items() if n in layers and n not in renewed}
            for state, by_layer in self._state_amaxes.items()
        }
        self._layout, self._layers, self._device = layout, layers, device
        self._groups.clear()
        self._known_amaxes.clear()
        self.forget_amaxes()

    def forget_amaxes(self) -> None:
        """Drop the amaxes (largest magnitudes) of weights; `find_amaxes` is called when needed."""
        self._weight_amaxes = None

    def applied(self, format: NumberFormat) -> Scaling | None:
        """Return which elements share a scale in a format, such as ``"channel"``; or None.

        None says that numbers of the format have no scales.
        """
        return get_applied_scaling(format, self._scaling)

    # --- weights

    def start_amaxes(self, format: NumberFormat, weights: Tensor) -> Tensor:
        """Return the amaxes (largest magnitudes) of the training's layers, for a twin that begins.

        A *twin* is a sample of the layers that is stepped on its own, with weights stored in a
        format.

        Args:
            format: A format with a scale, in which the weights are stored.
            weights: The twin's weights, floating-point (elements).

        Returns:
            The amax of each element's group, (elements), float32 or for float64 weights float64. It
            is 0 at padding, and for blocks, whose amax is that of the twin itself.
        """
        dtype = _get_wide(weights)
        if isinstance(self.applied(format), tuple):
            return torch.zeros(self._layout.length, dtype=dtype, device=self._device)
        if self._weight_amaxes is None:
            each = {n: self._find_amaxes(n, layer.indices) for n, layer in self._layers.items()}
            self._weight_amaxes = self._spread(each)
        return self._weight_amaxes.to(dtype, copy=True)

    def find_for_weights(self, format: NumberFormat, weights: Tensor, amaxes: Tensor) -> Tensor:
        """Return the scale of each weight of a twin, and raise the amaxes that weights exceed.

        A *twin* is a sample of the layers that is stepped on its own. An *amax* is the largest
        magnitude so far among the weights that share a scale.

        Args:
            format: A format with a scale, in which the weights are stored.
            weights: The twin's weights, floating-point (elements).
            amaxes: A result of `start_amaxes` that the twin keeps. It is raised in place, at the
                first element of each group that shares a scale; only these are read.

        Returns:
            Scales in the dtype of `amaxes`, (elements).
        """
        applied = self.applied(format)
        assert applied is not None
        groups = self._find_groups(applied)
        magnitudes = _find_magnitudes(weights, amaxes.dtype)
        amaxes.scatter_reduce_(0, groups.own_first, magnitudes, "amax")
        return groups.spread(_compute_scales(groups.pick(amaxes), format))

    # --- states

    def read_states(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Compute and keep the amaxes (largest magnitudes) of states of the training's optimizer.

        Args:
            states: The whole states, floating-point in the shape of their layers, by name of the
                state and then by name of the layer.
        """
        for state, by_layer in states.items():
            amaxes = zip(by_layer, self._find_state_amaxes([*by_layer.values()]), strict=True)
            self._state_amaxes.setdefault(state, {}).update(amaxes)
        self._known_amaxes.clear()

    def find_unread(self) -> set[str]:
        """Return the names of the layers of which `read_states` got no optimizer state yet."""
        return {*self._layers}.difference(*self._state_amaxes.values())

    def _find_state_amaxes(self, states: list[Tensor]) -> list[Tensor]:
        """Return the largest magnitude of each state, (1), or of each of its channels, (channels).

        The first applies unless channels, the indices of dimension 0, have scales.
        """
        if self._scaling == "channel":
            return [compute_amax(each, "channel").view(-1) for each in states]
        # The norm of order inf is the amax. torch has no public name for norms of many tensors in
        # one call; its gradient clipping uses this one: torch/nn/utils/clip_grad.py.
        return [each.view(1) for each in torch._foreach_norm(states, torch.inf)]  # noqa: SLF001

    def find_for_states(self, format: NumberFormat, name: str, states: Tensor) -> Tensor | None:
        """Return the scale of each number of a twin's optimizer state, computed anew at each call.

        A *twin* is a sample of the layers that is stepped on its own. The scale fits the largest
        magnitude among the twin's numbers and those that `read_states` got.

        Args:
            format: The format in which the state is stored.
            name: Name of the state.
            states: The twin's states of this name, floating-point (elements).

        Returns:
            Scales, (elements), float32 or for float64 states float64; None if the format has no
            scales.
        """
        applied = self.applied(format)
        if applied is None:
            return None
        dtype = _get_wide(states)
        known, groups = self._find_known(name, applied, dtype), self._find_groups(applied)
        magnitudes = _find_magnitudes(states, dtype)
        amaxes = known.scatter_reduce(0, groups.numbers, magnitudes, "amax")
        return groups.spread(_compute_scales(amaxes, format))

    def _find_known(self, name: str, applied: Scaling, dtype: torch.dtype) -> Tensor:
        """Return for each group of elements the amax that `read_states` got for an optimizer state.

        An *amax* is the largest magnitude among the numbers that share a scale: those of a layer or
        of a channel. It is 0 at padding, for blocks, and in layers whose state was not read.

        Args:
            name: Name of the state.
            applied: Which elements share a scale.
            dtype: dtype of the result.

        Returns:
            The amaxes, (groups).
        """
        key = name, applied, dtype
        if key not in self._known_amaxes:
            # Nothing is read for blocks, which the sample has whole, and states that the run lacks.
            by_layer = {} if isinstance(applied, tuple) else self._state_amaxes.get(name, {})
            each = {
                layer: amaxes if len(amaxes) == 1 else self._pick_channels(layer, amaxes)
                for layer, amaxes in by_layer.items()
            }
            spread = self._spread(each).to(dtype).nan_to_num_(0.0, 0.0, 0.0)
            self._known_amaxes[key] = self._find_groups(applied).pick(spread)
        return self._known_amaxes[key]

    def _pick_channels(self, name: str, amaxes: Tensor) -> Tensor:
        """Return for each sampled element of a layer the amax of its channel.

        An amax is a largest magnitude, a channel an index of dimension 0. `amaxes` has one per
        channel.
        """
        layer = self._layers[name]
        channels = number_groups(layer.places, layer.weights.shape, "channel")
        return amaxes.to(self._device)[channels]

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return the amaxes (largest magnitudes) from `read_states`: by state, then by layer."""
        return {state: dict(by_layer) for state, by_layer in self._state_amaxes.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore the amaxes (largest magnitudes) of optimizer states, before the first `read`.

        Args:
            state: A result of `state_dict`.
        """
        self._state_amaxes = {name: dict(by_layer) for name, by_layer in state.items()}

    # --- groups

    def _find_groups(self, scaling: Scaling) -> _Groups:
        """Return the groups of elements that share a scale; each element of padding is a group."""
        if scaling not in self._groups:
            begins = torch.ones(self._layout.length, dtype=torch.bool, device=self._device)
            for name, place in self._layout.places.items():
                layer = self._layers[name]
                numbers = number_groups(layer.indices, layer.shape, scaling)
                begins[place][1:] = numbers[1:] != numbers[:-1]
            firsts, numbers = begins.nonzero().view(-1), begins.cumsum(0) - 1
            self._groups[scaling] = _Groups(firsts, numbers, firsts[numbers])
        return self._groups[scaling]

    def _spread(self, by_layer: Mapping[str, Tensor]) -> Tensor:
        """Return the amax (largest magnitude) for each element, (elements); 0 elsewhere.

        Elsewhere are padding, and layers that are not given.

        Args:
            by_layer: By name of the layer: its amax, (1), or that of each element's group,
                (elements); any floating-point dtype.
        """
        wide = any(each.dtype == torch.float64 for each in by_layer.values())
        dtype = torch.float64 if wide else torch.float32
        spread = torch.zeros(self._layout.length, dtype=dtype, device=self._device)
        places = [self._layout.places[name] for name in by_layer]
        if places and all(len(each) == 1 for each in by_layer.values()):
            starts = torch.tensor([place.start for place in places], device=self._device)
            amaxes = torch.cat([each.to(self._device) for each in by_layer.values()])
            spread[starts] = amaxes.to(dtype)
            groups = self._find_groups("tensor")
            return groups.spread(groups.pick(spread))
        for place, amaxes in zip(places, by_layer.values(), strict=True):
            spread[place] = amaxes.to(self._device)
        return spread


def _get_wide(numbers: Tensor) -> torch.dtype:
    return torch.float64 if numbers.dtype == torch.float64 else torch.float32


def _find_magnitudes(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the magnitude of each number in a dtype; 0 for NaN and ±inf, which set no scale."""
    return numbers.abs().to(dtype).nan_to_num_(0.0, 0.0, 0.0)


@torch.inference_mode()  # under no_grad, each view of the exponent bits is two operations
def _compute_scales(amaxes: Tensor, format: NumberFormat) -> Tensor:
    """Return the scale for each amax, in the same dtype; 1 where the amax is 0."""
    if format.scale == "amax":
        return compute_scale_from_amax(amaxes, format.element)  # without a way through float64
    return compute_format_scales(amaxes, format).to(amaxes.dtype)
