"""`ElementScales`: the scale of each sampled element, for formats whose weights share scales.

Scales come from whole layers, never from the largest element of a sample: a sample would miss the
element that sets the scale. Only blocks lie in the sample as a whole, and have their scales from
the twin's own numbers. `twin` comes next and stores its weights under these scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from altgrad.quantization.formats import Scaling
from altgrad.quantization.number_format import NumberFormat, get_applied_scaling
from altgrad.quantization.scaling import compute_format_scales
from altgrad.recipes.layout import Layout


class ElementScales:
    """The scales of the sampled elements of some layers.

    Args:
        scaling: The elements that share a scale, as in `altgrad.measure`.
        find_amaxes: Function that takes the name of a layer and the indices of its sample, and
            returns the amax of the elements that share a scale with each, and the amax of the
            layer: float32 or float64 (elements) and (1).
    """

    def __init__(
        self,
        scaling: Scaling | None,
        find_amaxes: Callable[[str, Tensor], tuple[Tensor, Tensor]],
    ) -> None:
        self._scaling = scaling
        self._find_amaxes = find_amaxes
        self._layout = Layout()
        self._indices: Mapping[str, Tensor] = {}
        self._like = torch.zeros(0, device="cpu")
        self._blocks: dict[int, Tensor] = {}  # the block of each element, by size
        self._layers: tuple[Tensor, Tensor] | None = None
        self._amaxes: tuple[Tensor, Tensor] | None = None
        self._state_amaxes: dict[str, Tensor] = {}
        self._scales: dict[tuple[NumberFormat, str, torch.dtype], Tensor] = {}  # not of blocks

    def read(self, layout: Layout, indices: Mapping[str, Tensor], like: Tensor) -> None:
        """Take over another layout.

        Args:
            layout: The layout.
            indices: The sample of each layer, int64 (elements), by name.
            like: Tensor with the device of the samples.
        """
        self._layout, self._indices, self._like = layout, indices, like
        self._blocks.clear()
        self._layers = None
        self._state_amaxes.clear()
        self.forget_amaxes()

    def forget_amaxes(self) -> None:
        """Find the amax of each layer anew, since some have changed."""
        self._amaxes = None
        self._scales.clear()

    def set_state_amaxes(self, amaxes: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over the largest magnitude of each state of the run's optimizer.

        Args:
            amaxes: By name of a state, then by name of a layer: the amax, one element.
        """
        self._state_amaxes = {
            state: self._spread({name: amax.view(1) for name, amax in by_layer.items()})
            for state, by_layer in amaxes.items()
        }
        self._scales.clear()

    def applied(self, format: NumberFormat) -> Scaling | None:
        """Return which elements share a scale in a format; None without a scale."""
        return get_applied_scaling(format, self._scaling)

    def find_for_weights(self, format: NumberFormat, weights: Tensor) -> Tensor | None:
        """Return the scale of each weight.

        Args:
            format: The format in which the weights are stored.
            weights: The twin's weights, (elements), from which blocks have their scales.

        Returns:
            float32 (elements), float64 for float64 weights; None without a scale. 0 in blocks of
            zeros.
        """
        applied = self.applied(format)
        if applied is None:
            return None
        if isinstance(applied, tuple):
            layers = self._find_all_amaxes()[1] if format.has_tensor_scale else None
            return self._scale_blocks(format, applied[1], weights, layers)
        key = format, "", _wide(weights)
        if key not in self._scales:
            groups, _ = self._find_all_amaxes()
            self._scales[key] = compute_format_scales(groups, format).to(_wide(weights))
        return self._scales[key]

    def find_for_state(
        self, format: NumberFormat, name: str, state: Tensor, place: slice
    ) -> Tensor | None:
        """Return the scale of each number of an optimizer's state of one bucket.

        Args:
            format: The format in which the state is stored.
            name: Name of the state.
            state: The state, of any shape, from which blocks have their scales.
            place: The elements of the bucket.

        Returns:
            float32, float64 for a float64 state, in the shape of the state; None without a scale.
        """
        applied = self.applied(format)
        if applied is None:
            return None
        amax = self._state_amaxes.get(name)
        if isinstance(applied, tuple):
            whole = state.new_zeros(self._layout.length)
            whole[place] = state.view(-1)
            return self._scale_blocks(format, applied[1], whole, amax)[place].view(state.shape)
        if amax is None:  # the run has no such state: the sample is all that is known of it
            scale = compute_format_scales(self._find_largest(state, place), format)
            return scale.to(_wide(state)).view(state.shape)
        key = format, name, _wide(state)
        if key not in self._scales:
            self._scales[key] = compute_format_scales(amax, format).to(_wide(state))
        return self._scales[key][place].view(state.shape)

    def _scale_blocks(
        self, format: NumberFormat, size: int, numbers: Tensor, layers: Tensor | None
    ) -> Tensor:
        block = self._number_blocks(size)
        magnitude = numbers.abs().to(_wide(numbers)).nan_to_num_(0.0, 0.0, 0.0)
        largest = magnitude.new_zeros(self._layout.length).scatter_reduce_(
            0, block, magnitude, "amax"
        )[block]
        scale = compute_format_scales(largest, format, layers).to(magnitude.dtype)
        return torch.where(largest == 0, 0, scale)

    def _number_blocks(self, size: int) -> Tensor:
        """Return the number of the block of each element, int64 (elements).

        The elements of a block follow each other in a sample of whole blocks.
        """
        if size not in self._blocks:
            numbers = torch.arange(self._layout.length, device="cpu")
            for place in self._layout.places.values():
                within = torch.arange(place.stop - place.start, device="cpu")
                numbers[place] = place.start + within // size
            self._blocks[size] = numbers.to(self._like.device)
        return self._blocks[size]

    def _find_all_amaxes(self) -> tuple[Tensor, Tensor]:
        if self._amaxes is None:
            each = {name: self._find_amaxes(name, self._indices[name]) for name in self._indices}
            self._amaxes = (
                self._spread({name: groups for name, (groups, _) in each.items()}),
                self._spread({name: layer for name, (_, layer) in each.items()}),
            )
        return self._amaxes

    def _spread(self, by_layer: Mapping[str, Tensor]) -> Tensor:
        """Return numbers of layers as one number for each element; 0 where there is none.

        Args:
            by_layer: Numbers by name of the layer, (elements) or (1).
        """
        none = torch.zeros(1, device=self._like.device)
        each = [by_layer.get(name, none).to(none.device) for name in self._layout.places]
        if all(len(numbers) == 1 for numbers in each):
            layer, is_layer = self._find_layers()
            return torch.where(is_layer, torch.cat(each)[layer], 0)
        wide = torch.float64 if any(n.dtype == torch.float64 for n in each) else torch.float32
        spread = torch.zeros(self._layout.length, dtype=wide, device=none.device)
        for numbers, place in zip(each, self._layout.places.values(), strict=True):
            spread[place] = numbers
        return spread

    def _find_largest(self, state: Tensor, place: slice) -> Tensor:
        """Return the largest magnitude in the sample of each layer of a bucket, by element."""
        whole = torch.zeros(self._layout.length, dtype=_wide(state), device=state.device)
        whole[place] = state.view(-1).abs().nan_to_num(0.0, 0.0, 0.0).to(whole.dtype)
        layer, _ = self._find_layers()
        return torch.zeros_like(whole).scatter_reduce_(0, layer, whole, "amax")[layer][place]

    def _find_layers(self) -> tuple[Tensor, Tensor]:
        """Return the number of the layer of each element, int64, and False at padding: (elements).

        The number is 0 at padding.
        """
        if self._layers is None:
            layer = torch.full((self._layout.length,), -1, dtype=torch.int64, device="cpu")
            for number, place in enumerate(self._layout.places.values()):
                layer[place] = number
            layer = layer.to(self._like.device)
            self._layers = layer.clamp(min=0), layer >= 0
        return self._layers


def _wide(numbers: Tensor) -> torch.dtype:
    return torch.float64 if numbers.dtype == torch.float64 else torch.float32
