"""Scales of many layers and several formats: which elements share a scale, and its value.

A layer is one parameter tensor. An amax is the largest finite magnitude of the elements that share
a scale.

`Sharing` maps each element to its group (its layer, or a channel of the layer) and to its block.
`compute_element_scales` turns amaxes into the scale of each element and format. The amaxes of
layers and channels are kept between steps, in `altgrad.monitor.scale_state`. The amaxes of blocks
are computed in every step from the measured elements, which are always whole blocks.

Read `scaling` and `format_set` first; the next file is `grids`, which rounds under these scales.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from altgrad.quantization.format_set import FormatSet
from altgrad.quantization.formats import Scaling
from altgrad.quantization.scaling import compute_amax, compute_format_scales


def compute_layer_amax(x: Tensor, scaling: Scaling | None) -> Tensor:
    """Return the amax (largest finite magnitude) of a tensor, or of each of its channels.

    Args:
        x: The weights: float16, bfloat16, float32 or float64, any shape.
        scaling: Which elements share a scale. Only ``"channel"`` gives an amax for each channel, an
            index of dimension 0; any other value gives one amax for all of x.

    Returns:
        float32 (float64 for float64 x): (channels,) for ``"channel"``, otherwise (1,).
    """
    return compute_amax(x, "channel" if scaling == "channel" else "tensor").view(-1)


@torch.no_grad()
def compute_layer_amaxes(
    parameters: Sequence[Tensor], scaling: Scaling | None
) -> tuple[list[Tensor], list[bool]]:
    """Return the amax (largest finite magnitude) of many tensors, and for each whether it is 0.

    The amaxes are read on the host once for all tensors on a device, and once more for float64
    tensors.

    Args:
        parameters: The tensors: float16, bfloat16, float32 or float64, any shape.
        scaling: Which elements share a scale. Only ``"channel"`` gives an amax for each channel, an
            index of dimension 0; any other value gives one amax for each tensor.

    Returns:
        Two lists with an item for each tensor. The first has its amaxes: float32 (float64 for
        float64 parameters), (channels,) for ``"channel"``, otherwise (1,). The second has True if
        any of these amaxes is 0.
    """
    amax: dict[int, Tensor] = {}
    has_zero: dict[int, bool] = {}
    # Tensors of different devices or result dtypes cannot be stacked.
    kinds = [(each.dtype == torch.float64, each.device) for each in parameters]
    take = _compute_channel_amaxes if scaling == "channel" else _compute_tensor_amaxes
    for kind in dict.fromkeys(kinds):
        alike = [position for position, each in enumerate(kinds) if each == kind]
        found, least = take([parameters[position] for position in alike])
        amax |= zip(alike, found, strict=True)
        has_zero |= zip(alike, [each == 0 for each in least], strict=True)
    positions = range(len(parameters))
    return [amax[position] for position in positions], [has_zero[each] for each in positions]


class Amaxes(NamedTuple):
    """The amaxes of one or several layers (parameter tensors), from which scales are computed.

    An amax is the largest finite magnitude of the weights before a step. For a channel (an index of
    dimension 0) of zeros, `groups` has the amax after the step instead, because 0 sets no scale. In
    `layers` the amax is that before the step, unless the whole layer is 0.

    Attributes:
        groups: The amax of each layer, or of each channel if channels have scales, (groups,).
        layers: The amax of each whole layer, (layers,). Only formats whose block scales are
            multiplied by a scale of the whole tensor use it, such as nvfp4.
    """

    groups: Tensor
    layers: Tensor

    @classmethod
    def from_groups(cls, groups: Tensor) -> Amaxes:
        """Return the `Amaxes` of one layer, given the largest finite magnitude of each group.

        Args:
            groups: The largest finite magnitude of the layer, (1,), or of each channel, an index of
                dimension 0, (channels,).

        Returns:
            `groups` as given, and their maximum as `layers`; 0 for a layer without channels.
        """
        if len(groups) == 1:
            return cls(groups, groups)
        return cls(groups, groups.amax().view(1) if len(groups) else groups.new_zeros(1))

    def fill_zeros(self, other: Amaxes) -> Amaxes:
        """Return a copy with each 0 replaced by the entry at the same place in `other`."""
        pairs = zip(self, other, strict=True)
        return Amaxes(*(torch.where(mine == 0, later, mine) for mine, later in pairs))


def update_tensor_amaxes(before: Tensor, amax: Tensor, sharing: Sharing | None = None) -> Tensor:
    """Return the maximum of each layer's amax and the largest finite magnitude in `before`.

    A layer is one parameter tensor. The result is the new amax of each layer; `amax` itself does
    not change.

    Args:
        before: Weights before the step: elements of one layer, or of the layers in `sharing`.
        amax: The largest finite magnitude of each layer as kept from an earlier step, (layers,).
            Its dtype may differ from that of `before`, after a model was cast.
        sharing: The groups and layers of the elements; None if all elements are in one layer.

    Returns:
        A tensor (layers,): float64 if `before` or `amax` is float64, otherwise float32.
    """
    if sharing is None:
        # Of one dimension: torch does not promote a dtype to that of a tensor without dimensions.
        return torch.maximum(amax, compute_amax(before, "tensor").view(1))
    magnitude = _finite_magnitude(before)
    dtype = torch.promote_types(amax.dtype, magnitude.dtype)
    layer = sharing.group_layer[sharing.group]
    return amax.to(dtype).scatter_reduce(0, layer, magnitude.to(dtype), "amax")


def compute_single_scales(amax: Tensor, formats: FormatSet) -> Tensor:
    """Return the scale of each layer (parameter tensor) in each of several formats.

    A scale is the factor from stored numbers to weights.

    Args:
        amax: The largest finite magnitude of each layer, float32 or float64, (layers,).
        formats: Formats of which each has at most one scale for a layer (`FormatSet.is_single`).

    Returns:
        float64 (layers, formats); 1 for a format without scales.
    """
    one = torch.ones(len(amax), dtype=torch.float64, device=amax.device)
    columns = [
        compute_format_scales(amax, format) if isinstance(applied, str) else one
        for format, applied in zip(formats, formats.applied, strict=True)
    ]
    return torch.stack(columns, dim=1) if columns else one.view(-1, 1)[:, :0]


class _Blocks(NamedTuple):
    """A map from elements to the blocks of one size that share a scale, and from blocks to layers.

    Attributes:
        element_block: The number of the block of each element, int64 (elements,).
        layer: The number of the layer of each block, int64 (blocks,).
    """

    element_block: Tensor
    layer: Tensor


class Sharing(NamedTuple):
    """A map from each element to its group and block, whose elements share a scale.

    The elements of several layers (parameter tensors) follow each other. A group is a layer, or a
    channel (an index of dimension 0) if each channel has a scale. A block is a fixed number of
    neighbours in the last dimension. Groups, blocks and layers are numbered from 0. All tensors are
    on one device. For two layers of 2 and 4 elements, with scaling by tensor and blocks of 2::

        element       | 0 1 2 3 4 5
        group         | 0 0 1 1 1 1
        element_block | 0 0 1 1 2 2
        layer         | 0   1   1    (of each block)

    Attributes:
        layers: The number of layers.
        group: The number of the group of each element, int64 (elements,).
        group_layer: The number of the layer of each group, int64 (groups,).
        blocks: For each block size in elements, the block of each element and the layer of each
            block.
    """

    layers: int
    group: Tensor
    group_layer: Tensor
    blocks: dict[int, _Blocks]

    @classmethod
    def from_indices(
        cls, shape: torch.Size, indices: Tensor, sizes: Sequence[int], scaling: Scaling | None
    ) -> Sharing:
        """Return the map from elements of one layer to the groups and blocks that share a scale.

        Args:
            shape: The shape of the layer.
            indices: Ascending indices of the elements into the flattened layer, int64 (elements,)
                on the CPU.
            sizes: The block sizes in elements.
            scaling: Which elements share a scale. With ``"channel"`` each index of dimension 0 is a
                group, otherwise the whole layer is.

        Returns:
            The map, on the CPU.
        """
        length = shape[-1] if shape else 1
        channels = shape[0] if shape and scaling == "channel" else 1
        group = indices // max(shape.numel() // max(channels, 1), 1)
        row, column = indices // max(length, 1), indices % max(length, 1)
        blocks = {}
        for size in sizes:
            # Blocks are numbered row by row; -(-length // size) is the number of blocks in a row.
            number = row * -(-length // size) + column // size
            # Indices ascend, so that elements of a block are consecutive.
            different, element_block = torch.unique_consecutive(number, return_inverse=True)
            blocks[size] = _Blocks(element_block, torch.zeros_like(different))
        return cls(
            1, group, torch.zeros(1, dtype=torch.int64, device="cpu").expand(channels), blocks
        )

    def trim_groups(self) -> tuple[Sharing, slice]:
        """Return a map without the groups before the first and after the last one with an element.

        A group is a layer or channel whose elements share a scale; its numbers must ascend along
        the elements. Neighbouring elements of one layer lie in few of its channels, so that most
        groups are dropped.

        Returns:
            The map with groups numbered from 0 again, and the slice of the kept groups among all
            groups of this map, such as for `Amaxes.groups`.
        """
        if not len(self.group):
            return self, slice(None)
        groups = slice(int(self.group[0]), int(self.group[-1]) + 1)
        group, group_layer = self.group - groups.start, self.group_layer[groups]
        return self._replace(group=group, group_layer=group_layer), groups

    def pad(self, count: int) -> Sharing:
        """Return the map from elements to groups and blocks, extended to a buffer's length.

        The appended elements belong to group 0 and block 0; their scales mean nothing.

        Args:
            count: The number of elements in the result, at least as many as in this map.
        """
        more = count - len(self.group)
        group = torch.nn.functional.pad(self.group, (0, more))
        blocks = {
            size: _Blocks(torch.nn.functional.pad(each.element_block, (0, more)), each.layer)
            for size, each in self.blocks.items()
        }
        return self._replace(group=group, blocks=blocks)

    @classmethod
    def join(cls, layers: Sequence[Sharing]) -> Sharing:
        """Concatenate the maps of several layers, so that one call can scale all their elements.

        A `Sharing` maps each element to the group and the block with which it shares a scale.

        Args:
            layers: One map for each layer, with equal block sizes, on one device.

        Returns:
            One map for the elements of all layers, one layer after the other. Groups, blocks and
            layers are numbered in one sequence.
        """
        numbered = [*enumerate(layers)]
        blocks = {
            size: _Blocks(
                _joined([each.blocks[size] for each in layers]),
                torch.cat([each.blocks[size].layer + number for number, each in numbered]),
            )
            for size in layers[0].blocks
        }
        return cls(
            len(layers),
            _joined([(each.group, each.group_layer) for each in layers]),
            torch.cat([each.group_layer + number for number, each in numbered]),
            blocks,
        )

    def to(self, device: torch.device) -> Sharing:
        """Return the map from elements to groups and blocks, with its tensors on a device."""
        blocks = {
            size: _Blocks(*(part.to(device) for part in each)) for size, each in self.blocks.items()
        }
        group, group_layer = self.group.to(device), self.group_layer.to(device)
        return Sharing(self.layers, group, group_layer, blocks)


def compute_element_scales(
    before: Tensor,
    after: Tensor,
    amaxes: Amaxes | None,
    sharing: Sharing,
    formats: FormatSet,
) -> Tensor:
    """Return the scale of each element in every format, the factor from stored numbers to values.

    Args:
        before: The elements before the step, any floating-point dtype, (elements,). NaN and ±inf
            count as 0.
        after: The elements after the step, (elements,), which set the scale of a block whose
            elements before the step are all 0.
        amaxes: The largest finite magnitudes of all groups and layers; None if no format needs
            them.
        sharing: The group and the blocks of each element.
        formats: The formats.

    Returns:
        float64 (formats, elements); 1 for a format without scales.
    """
    magnitudes = _finite_magnitude(before), _finite_magnitude(after)
    block_amax = {
        size: _compute_block_amaxes(blocks.element_block, len(blocks.layer), *magnitudes)
        for size, blocks in sharing.blocks.items()
    }
    scales = torch.ones(len(formats), len(before), dtype=torch.float64, device=before.device)
    for format, applied, scale in zip(formats, formats.applied, scales.unbind(), strict=True):
        if applied is None:
            continue
        if isinstance(applied, str):
            assert amaxes is not None
            scale.copy_(compute_format_scales(amaxes.groups, format)[sharing.group])
            continue
        blocks, largest = sharing.blocks[applied[1]], block_amax[applied[1]]
        tensor_amaxes = None
        if format.has_tensor_scale and amaxes is not None:
            tensor_amaxes = amaxes.layers[blocks.layer]
        scale.copy_(compute_format_scales(largest, format, tensor_amaxes)[blocks.element_block])
    return scales


def _joined(each: Sequence[tuple[Tensor, Tensor] | _Blocks]) -> Tensor:
    """Concatenate the group or block numbers of several layers into one sequence of numbers.

    Args:
        each: For each layer the number of each element's group or block, int64 (elements,), and a
            tensor with one entry for each group or block.

    Returns:
        int64 (all elements): for each element the number of its group or block among those of all
        layers, one layer after the other.
    """
    joined, start = [], 0
    for numbers, table in each:
        joined.append(numbers + start)
        start += len(table)
    return torch.cat(joined)


def _finite_magnitude(x: Tensor) -> Tensor:
    """Return ``abs(x)`` in float32 or float64, with 0 for NaN and ±inf."""
    wide = x.abs().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return wide.nan_to_num_(0.0, 0.0, 0.0)


def _compute_block_amaxes(
    element_block: Tensor, count: int, before: Tensor, after: Tensor
) -> Tensor:
    """Return the largest magnitude in each block before the step, or after it for a block of zeros.

    Args:
        element_block: The number of the block of each element, int64 (elements,).
        count: The number of blocks.
        before: Finite magnitudes before the step, (elements,).
        after: Finite magnitudes after the step, (elements,).

    Returns:
        A tensor (blocks,) with the dtype of the magnitudes.
    """
    first, second = (
        size.new_zeros(count).scatter_reduce_(0, element_block, size, "amax")
        for size in (before, after)
    )
    # A block of zeros has no scale yet; that after the step shows whether an update is kept.
    return torch.where(first == 0, second, first)


def _compute_tensor_amaxes(parameters: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[float]]:
    """Return the amax (largest finite magnitude) of each tensor, on its device and on the host.

    Args:
        parameters: Tensors on one device, either all float64 or all narrower.

    Returns:
        For each tensor a float32 or float64 tensor (1,), and the same amax as a float.
    """
    wide = torch.float64 if parameters[0].dtype == torch.float64 else torch.float32
    zero = torch.zeros((), dtype=wide, device=parameters[0].device)
    # aminmax reads each tensor once and creates no temporary, unlike abs().amax().
    ends = [torch.aminmax(each) if each.numel() else (zero, zero) for each in parameters]
    least, most = (torch.stack([end[side].to(wide) for end in ends]) for side in (0, 1))
    amax = torch.maximum(-least, most)
    numbers = amax.tolist()  # one synchronisation for all tensors
    found = [*amax.view(-1, 1).unbind()]
    for position, number in enumerate(numbers):
        # aminmax passes NaN and inf on. Such tensors are rare, so only they pay for a second look.
        if not math.isfinite(number):
            found[position] = compute_layer_amax(parameters[position], "tensor")
            numbers[position] = found[position].item()
    return found, numbers


def _compute_channel_amaxes(parameters: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[float]]:
    """Return the largest finite magnitude in each channel (index of dimension 0) of each tensor.

    Args:
        parameters: Tensors on one device, either all float64 or all narrower.

    Returns:
        For each tensor the magnitudes of its channels, float32 or float64 (channels,), and the
        smallest of them on the host, as a float; 1 if the tensor has no channels.
    """
    found = [compute_layer_amax(each, "channel") for each in parameters]
    one = found[0].new_ones(())
    return found, torch.stack([each.amin() if len(each) else one for each in found]).tolist()
