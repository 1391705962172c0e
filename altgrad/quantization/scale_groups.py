"""From the largest magnitude of a layer, channel or block to the scale of each element and format.

Of layers and channels that magnitude is state: see `altgrad.monitor.scale_state`. Of blocks it is
that of the elements at hand, which are whole blocks, in every step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from altgrad.quantization.format_set import FormatSet
from altgrad.quantization.formats import Scaling
from altgrad.quantization.scaling import amax_of, format_scales


def layer_amax(x: Tensor, scaling: Scaling | None) -> Tensor:
    """(1), or (channels) where those have scales of their own: the largest finite magnitudes."""
    return amax_of(x, "channel" if scaling == "channel" else "tensor").view(-1)


@torch.no_grad()
def layer_amax_of_each(
    parameters: Sequence[Tensor], scaling: Scaling | None
) -> tuple[list[Tensor], list[bool]]:
    """`layer_amax` of many, and whether any that it holds is 0, which is read on the host.

    For whole tensors that is an operation for each and some for all.
    """
    amax: dict[int, Tensor] = {}
    has_zero: dict[int, bool] = {}
    kinds = [(each.dtype == torch.float64, each.device) for each in parameters]
    take = _amax_of_channels if scaling == "channel" else _amax_of_tensors
    for kind in dict.fromkeys(kinds):
        alike = [position for position, each in enumerate(kinds) if each == kind]
        found, least = take([parameters[position] for position in alike])
        amax |= zip(alike, found, strict=True)
        has_zero |= zip(alike, [each == 0 for each in least], strict=True)
    positions = range(len(parameters))
    return [amax[position] for position in positions], [has_zero[each] for each in positions]


def tensor_amax_of(before: Tensor, amax: Tensor, sharing: Sharing | None = None) -> Tensor:
    """(layers): the amax of each when last looked at, or what is seen of it now, if that is more.

    Args:
        before: Elements of one layer, or those that `sharing` says.
        amax: Of the groups of all these layers.
        sharing: Which element and which group is of which layer.
    """
    if sharing is None:
        return torch.maximum(amax.amax(), amax_of(before, "tensor")).view(1)
    largest = amax.new_zeros(sharing.layers)
    largest.scatter_reduce_(0, sharing.layer_of_group, amax, "amax")
    layer = sharing.layer_of_group[sharing.group]
    return largest.scatter_reduce_(0, layer, _finite_magnitude(before), "amax")


def single_scales(amax: Tensor, formats: FormatSet) -> Tensor:
    """Return the scales of layers that have a single one in every format.

    Args:
        amax: Largest magnitude of each layer, (layers).
        formats: The formats.

    Returns:
        float64, (layers, formats); 1 for a format that is not scaled by layers.
    """
    one = torch.ones(len(amax), dtype=torch.float64, device=amax.device)
    columns = [
        format_scales(amax, format) if isinstance(applied, str) else one
        for format, applied in zip(formats, formats.applied, strict=True)
    ]
    return torch.stack(columns, dim=1) if columns else one.view(-1, 1)[:, :0]


class _Blocks(NamedTuple):
    of_element: Tensor
    layer: Tensor  # of each block


class Sharing(NamedTuple):
    """Which elements, side by side, share a scale; int64, on one device.

    Attributes:
        layers: How many layers they are of.
        group: Of each element, the layer or channel that has an amax, numbered through.
        layer_of_group: The layer of each of these.
        blocks: By their size, to which block each element belongs, and to which layer that.
    """

    layers: int
    group: Tensor
    layer_of_group: Tensor
    blocks: dict[int, _Blocks]

    @classmethod
    def of(
        cls, shape: torch.Size, indices: Tensor, sizes: Sequence[int], scaling: Scaling | None
    ) -> Sharing:
        """Of elements of one layer, with ascending indices in row-major order, on the CPU."""
        length = shape[-1] if shape else 1
        channels = shape[0] if shape and scaling == "channel" else 1
        group = indices // max(shape.numel() // max(channels, 1), 1)
        row, column = indices // max(length, 1), indices % max(length, 1)
        blocks = {}
        for size in sizes:
            number = row * -(-length // size) + column // size
            different, of_element = torch.unique_consecutive(number, return_inverse=True)
            blocks[size] = _Blocks(of_element, torch.zeros_like(different))
        return cls(1, group, torch.zeros(1, dtype=torch.int64).expand(channels), blocks)

    def of_its_groups(self) -> tuple[Sharing, slice]:
        """Of elements of one layer, with no group before or after theirs, and which those are."""
        if not len(self.group):
            return self, slice(None)
        groups = slice(int(self.group[0]), int(self.group[-1]) + 1)
        group, layer_of_group = self.group - groups.start, self.layer_of_group[groups]
        return self._replace(group=group, layer_of_group=layer_of_group), groups

    def padded(self, count: int) -> Sharing:
        """With as many elements, the new ones anywhere."""
        more = count - len(self.group)
        group = torch.nn.functional.pad(self.group, (0, more))
        blocks = {
            size: _Blocks(torch.nn.functional.pad(each.of_element, (0, more)), each.layer)
            for size, each in self.blocks.items()
        }
        return self._replace(group=group, blocks=blocks)

    @classmethod
    def joined(cls, layers: Sequence[Sharing]) -> Sharing:
        """Of several layers, one after the other."""
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
            _joined([(each.group, each.layer_of_group) for each in layers]),
            torch.cat([each.layer_of_group + number for number, each in numbered]),
            blocks,
        )

    def to(self, device: torch.device) -> Sharing:
        """On another device."""
        blocks = {
            size: _Blocks(*(part.to(device) for part in each)) for size, each in self.blocks.items()
        }
        group, layer_of_group = self.group.to(device), self.layer_of_group.to(device)
        return Sharing(self.layers, group, layer_of_group, blocks)


def element_scales(
    before: Tensor,
    after: Tensor,
    amax: Tensor | None,
    tensor_amax: Tensor | None,
    sharing: Sharing,
    formats: FormatSet,
) -> Tensor:
    """Return the scale of each element in every format: float64, (formats, elements).

    Args:
        before: The elements before the step, in one dimension; what is not finite is left out.
        after: The elements after it: of a block of zeros, which sets no scale, these do.
        amax: Largest magnitude of each group; None where no scale of groups is needed.
        tensor_amax: Largest magnitude of each layer; None where no format needs that beside the
            amax of its blocks.
        sharing: Which elements share what.
        formats: The formats.
    """
    sizes = _finite_magnitude(before), _finite_magnitude(after)
    block_amax = {
        size: _largest_of_each(blocks.of_element, len(blocks.layer), *sizes)
        for size, blocks in sharing.blocks.items()
    }
    scales = torch.ones(len(formats), len(before), dtype=torch.float64, device=before.device)
    for format, applied, scale in zip(formats, formats.applied, scales.unbind(), strict=True):
        if applied is None:
            continue
        if isinstance(applied, str):
            assert amax is not None
            scale.copy_(format_scales(amax, format)[sharing.group])
            continue
        blocks, largest = sharing.blocks[applied[1]], block_amax[applied[1]]
        of_tensor = None
        if format.has_tensor_scale and tensor_amax is not None:
            of_tensor = tensor_amax[blocks.layer]
        scale.copy_(format_scales(largest, format, of_tensor)[blocks.of_element])
    return scales


def _joined(each: Sequence[tuple[Tensor, Tensor] | _Blocks]) -> Tensor:
    """Numbers into a table of each layer, as numbers into all these tables together."""
    joined, start = [], 0
    for numbers, table in each:
        joined.append(numbers + start)
        start += len(table)
    return torch.cat(joined)


def _finite_magnitude(x: Tensor) -> Tensor:
    wide = x.abs().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return wide.nan_to_num_(0.0, 0.0, 0.0)


def _largest_of_each(of_element: Tensor, count: int, before: Tensor, after: Tensor) -> Tensor:
    """Of each block before the step, and where that is 0 after it."""
    first, second = (
        size.new_zeros(count).scatter_reduce_(0, of_element, size, "amax")
        for size in (before, after)
    )
    return torch.where(first == 0, second, first)


def _amax_of_tensors(parameters: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[float]]:
    """Of those of one kind, each as (1), and the same on the host; float32 or float64."""
    wide = torch.float64 if parameters[0].dtype == torch.float64 else torch.float32
    zero = torch.zeros((), dtype=wide, device=parameters[0].device)
    ends = [torch.aminmax(each) if each.numel() else (zero, zero) for each in parameters]
    least, most = (torch.stack([end[side].to(wide) for end in ends]) for side in (0, 1))
    amax = torch.maximum(-least, most)
    numbers = amax.tolist()
    found = [*amax.view(-1, 1).unbind()]
    for position, number in enumerate(numbers):
        if not math.isfinite(number):
            found[position] = layer_amax(parameters[position], "tensor")  # the largest finite one
            numbers[position] = found[position].item()
    return found, numbers


def _amax_of_channels(parameters: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[float]]:
    """Likewise, with the least of each on the host."""
    found = [layer_amax(each, "channel") for each in parameters]
    one = found[0].new_ones(())
    return found, torch.stack([each.amin() if len(each) else one for each in found]).tolist()
