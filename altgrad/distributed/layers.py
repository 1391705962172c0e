"""`ShardedLayers`: the layers of a model that several processes share, as one of them sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from altgrad.distributed.ranks import Expected, Ranks
from altgrad.distributed.shards import Part, Shard
from altgrad.measurement.ever_moved import PackedBits, whole_of
from altgrad.observation.dtensor import local_of
from altgrad.quantization.format_set import FormatSet
from altgrad.quantization.formats import Scaling
from altgrad.quantization.scale_groups import layer_amax_of_each

_SAMPLED = 16
_TOLERANCE = 0.01
"""Of the largest: copies that each process steps by itself may drift in their last digits."""


class ShardedLayers:
    """What lies here of each layer, and what all processes know of it together.

    Args:
        indices_of: From a name and a shape to the elements that are measured; None for all.
        scaling: As in `altgrad.measure`.

    Attributes:
        ranks: The processes.
    """

    def __init__(
        self, indices_of: Callable[[str, torch.Size], Tensor | None], scaling: Scaling | None
    ) -> None:
        self.ranks = Ranks()
        self._indices_of = indices_of
        self._scaling = scaling
        self._shards: dict[str, Shard] = {}
        self._placed: dict[str, tuple[Any, ...]] = {}  # as each was when its shard was read
        self._expected: dict[str, Expected] = {}

    def look_at(self, parameters: Mapping[str, Tensor]) -> None:
        """Read what lies here of those that are new, or are placed otherwise now.

        Raises:
            ValueError: As `Shard.of`.
        """
        for name, parameter in parameters.items():
            placed = _placed(parameter)
            if self._placed.get(name) != placed:
                shard = Shard.of(name, parameter, self.ranks.rank)
                self._shards[name], self._placed[name] = shard, placed
                self._expected.pop(name, None)

    def are_placed_as_before(self, parameters: Mapping[str, Tensor]) -> bool:
        """Whether `look_at` would find nothing new."""
        return len(self.known(parameters)) == len(parameters)

    def known(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those that lie as they did when they were looked at."""
        placed = self._placed
        return {n: p for n, p in parameters.items() if placed.get(n) == _placed(p)}

    def different_copies(self, parameters: Mapping[str, Tensor]) -> list[str]:
        """Layers of which processes that should have copies of them have other values.

        So have those of which each has experts or a model of its own, which nothing says.
        """
        shards = {name: self._shards[name] for name in parameters}
        return _different_copies(parameters, shards, self.ranks)

    def placements(self, name: str) -> str:
        """How a layer lies in the processes."""
        return str(self._placed[name][2])

    # --- what lies here

    def measured_part_of(self, name: str) -> Part:
        """The elements of a layer that are measured here."""
        return self.part_of(name, self._indices_of(name, self._shards[name].shape))

    def part_of(self, name: str, indices: Tensor | None) -> Part:
        """As `Shard.part_of`."""
        return self._shards[name].part_of(indices)

    def here(self, parameter: Tensor) -> Tensor:
        """What of it lies here."""
        return local_of(parameter.detach())

    def expected(self, names: Iterable[str]) -> dict[str, Expected]:
        """How many elements all processes together measure of layers, of how many."""
        for name in names:
            if name not in self._expected:
                shape = self._shards[name].shape
                indices = self._indices_of(name, shape)
                elements = shape.numel() if indices is None else len(indices)
                self._expected[name] = Expected(shape.numel(), elements)
        return {name: self._expected[name] for name in names}

    def measured_parts_of(self, names: Sequence[str]) -> dict[str, tuple[int, Tensor]]:
        """By layer, how many elements are measured in all, and which of them here."""
        return {
            name: (expected.elements, self.measured_part_of(name).positions)
            for name, expected in self.expected(names).items()
        }

    def check_formats(self, formats: FormatSet) -> None:
        """ValueError for formats whose scales are not known where parameters are sharded."""
        if formats.needs_tensor_amax:
            raise ValueError(
                f"formats={formats.names}: one of them scales blocks by the amax of the whole "
                "tensor in each step, which is not known where parameters are sharded; leave out "
                "'nvfp4', or observe an unsharded run"
            )

    def torn(self, names: Iterable[str], block_sizes: Sequence[int]) -> list[str]:
        """Layers of which a block that shares a scale lies in several processes."""
        return [n for n in names if any(self._shards[n].tears(size) for size in block_sizes)]

    def amax_of(self, parameters: Mapping[str, Tensor]) -> tuple[list[Tensor], list[bool]]:
        """As `layer_amax_of_each`, of the whole parameters; one MAX over the processes."""
        shapes = [self._shards[name].shape for name in parameters]
        groups = [shape[0] if shape and self._scaling == "channel" else 1 for shape in shapes]
        found = self.ranks.largest(lambda: self._amax_here(parameters, groups), sum(groups))
        on_device = {p.device: found.to(p.device) for p in parameters.values()}
        wide = [
            torch.float64 if p.dtype == torch.float64 else torch.float32
            for p in parameters.values()
        ]
        has_zero = [bool((each == 0).any()) for each in torch.split(found, groups)]
        each = {device: torch.split(numbers, groups) for device, numbers in on_device.items()}
        return [
            each[parameter.device][k].to(wide[k]) for k, parameter in enumerate(parameters.values())
        ], has_zero

    def ever_moved_state(
        self, own: Mapping[str, PackedBits], names: Iterable[str], kinds: int
    ) -> dict[str, PackedBits]:
        """What the elements of layers have done in whichever process; the same in all of them.

        Args:
            own: What those that lie here have done.
            names: Of the layers.
            kinds: How many bits there are of each element.
        """
        known = [name for name in names if name in self._shards]
        shapes = {name: (kinds, e.elements) for name, e in self.expected(known).items()}
        if not shapes:
            return {}
        bits = [
            whole_of(own.get(name), shape, self.measured_part_of(name).positions)
            for name, shape in shapes.items()
        ]
        joined = torch.split(self.ranks.joined(torch.cat(bits)), [*map(len, bits)])
        pairs = zip(shapes.items(), joined, strict=True)
        return {name: (shape, each.clone()) for (name, shape), each in pairs if each.any()}

    def _amax_here(self, parameters: Mapping[str, Tensor], groups: list[int]) -> Tensor:
        here = {name: local_of(parameter.detach()) for name, parameter in parameters.items()}
        filled = {name: each for name, each in here.items() if each.numel()}
        numbers = torch.zeros(sum(groups), dtype=torch.float64)
        if not filled:
            return numbers
        each, _ = layer_amax_of_each([*filled.values()], self._scaling)
        on_host = torch.cat([amax.double().to(each[0].device) for amax in each]).cpu()
        of_layer = dict(zip(filled, torch.split(on_host, [*map(len, each)]), strict=True))
        for name, own in zip(parameters, torch.split(numbers, groups), strict=True):
            if name in of_layer:
                own[self._groups_here(name, len(own))] = of_layer[name]
        return numbers

    def _groups_here(self, name: str, groups: int) -> slice | Tensor:
        held = self._shards[name].held
        if groups == 1 or not held:
            return slice(None)
        return slice(held[0].start, held[0].stop) if isinstance(held[0], range) else held[0]


def _placed(parameter: Any) -> tuple[Any, ...]:
    """What says what lies here of a parameter."""
    mesh = getattr(parameter, "device_mesh", None)
    return parameter.shape, parameter.dtype, getattr(parameter, "placements", None), mesh


def _different_copies(
    parameters: Mapping[str, Tensor], shards: Mapping[str, Shard], ranks: Ranks
) -> list[str]:
    """The names of layers of which processes have different copies, equal in all processes.

    A few values of each are compared, in one MAX, if there are any copies.

    Args:
        parameters: By name, alike in all processes.
        shards: What lies here of each.
        ranks: The processes.
    """
    copied = {name: each for name, each in parameters.items() if shards[name].part[1] < ranks.size}
    if not copied:
        return []
    parts = [shards[name].part for name in copied]
    slots = sum(count for _, count in parts)

    def take() -> Tensor:
        said = torch.full((3, slots), -torch.inf, dtype=torch.float64)
        first = 0
        for (own, count), values in zip(parts, _sampled(copied), strict=True):
            said[:, first + own] = torch.stack((values.sum(), -values.sum(), values.abs().max()))
            first += count
        return said.flatten()

    largest, minus_smallest, magnitude = ranks.largest_beside(take, 3 * slots).view(3, slots)
    differ = largest + minus_smallest > _TOLERANCE * magnitude
    by_name = torch.split(differ, [count for _, count in parts])
    return [name for name, each in zip(copied, by_name, strict=True) if each.any()]


def _sampled(parameters: Mapping[str, Tensor]) -> list[Tensor]:
    """Float64, on the host: some elements of what lies here of each, and a 0."""
    flat = [local_of(each.detach()).reshape(-1) for each in parameters.values()]
    some = [each[:: max(1, -(-len(each) // _SAMPLED))].double() for each in flat]
    on_host = torch.cat([each.to(some[0].device) for each in some]).cpu()
    finite = on_host.nan_to_num(0.0, 0.0, 0.0)
    return [torch.cat((each, each.new_zeros(1))) for each in torch.split(finite, [*map(len, some)])]
