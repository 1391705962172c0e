"""`Together`: measure each optimizer step of a model whose parameters are sharded over ranks.

A rank is one process of a torch.distributed run. Each rank measures the elements that it holds: it
sums up quantities such as update², from which metrics follow. `Together` checks that all ranks
observe the same layers, and adds up the sums of all ranks.
"""

from __future__ import annotations

import itertools
import zlib
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from altgrad._messages import few
from altgrad.distributed.host_group import LostRankError
from altgrad.distributed.layers import ShardedLayers
from altgrad.distributed.peers import StepSums
from altgrad.distributed.ranks import DisagreementError, Ranks
from altgrad.distributed.replicas import find_different_replicas
from altgrad.distributed.shards import Part
from altgrad.distributed.step_message import StepMessage
from altgrad.distributed.twin_message import TwinPlan
from altgrad.measurement.ever_moved import PackedBits, scatter_packed_bits
from altgrad.observation.dtensor import to_local_tensor
from altgrad.observation.observer import RankError
from altgrad.quantization.devices import copy_to_host
from altgrad.quantization.format_set import FormatSet
from altgrad.quantization.formats import Scaling
from altgrad.quantization.scale_groups import compute_layer_amaxes


class Watched(Protocol):
    """The interface (Protocol) by which `Together` reads what this rank observes, to compare ranks.

    `altgrad.monitor.watch.Watch` implements it. A layer is one parameter tensor.

    Attributes:
        formats: The number formats that updates are measured for.
        twins: The recipes whose twins, samples that are stepped as the recipes say, are measured.
    """

    formats: FormatSet
    twins: TwinPlan

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The parameters of the observed module by name, in the order of the module."""

    def measured_by(self, optimizer: Optimizer) -> tuple[str, ...]:
        """Return the names of the measured layers that an optimizer steps.

        Returns:
            The names, in the order of the optimizer's parameters.
        """

    def indices(self, name: str, shape: torch.Size) -> Tensor | None:
        """Return the elements of a layer that all ranks together measure.

        Args:
            name: Name of the layer.
            shape: Shape of the whole layer.

        Returns:
            Flat indices, int64 (elements) on the CPU. None for all elements.
        """

    def describe(self) -> list[str]:
        """Return the monitor's settings, sampling and state as texts, to compare between ranks.

        All ranks must have the same texts, in the same order.
        """

    def leave_out(self, names: Sequence[str], why: str) -> None:
        """Stop observing some layers, and warn the user.

        Args:
            names: Names of the layers.
            why: The text of the warning.
        """


class Together(Ranks):
    """A rank of a run with sharded parameters, which measures its shards together with other ranks.

    Each rank sums up quantities such as update² over its elements. An all-reduce then adds up the
    sums of all ranks, from which metrics follow. Ranks compare their layers before they measure,
    because an all-reduce needs tensors of equal length. `altgrad.distributed.peers.Peers` documents
    the methods.

    Args:
        watched: The layers and settings that this rank observes.

    Raises:
        RuntimeError: There is no process group.
    """

    def __init__(self, watched: Watched) -> None:
        super().__init__()
        self._watched = watched
        self._layers = ShardedLayers(watched.indices, self.rank)
        self._agreed: set[tuple[str, ...]] = set()  # the layers of each optimizer
        self._are_new = False  # until the first observed step after an agreement
        self._stepping: WeakKeyDictionary[Optimizer, tuple[str, ...]] = WeakKeyDictionary()

    # --- before a step

    def attach(self, check: Callable[[], Sequence[Optimizer]]) -> None:
        self.group.meet()
        try:
            self._agree("attach()", check)
        except DisagreementError as error:
            raise error.__cause__ or error from None

    def before_step(self, optimizer: Optimizer) -> bool:
        names = self._watched.measured_by(optimizer)
        parameters = self._watched.parameters  # read last, and therefore with new ones
        stepped = {name: parameters[name] for name in names}
        if names not in self._agreed or len(self._layers.known(stepped)) < len(stepped):
            self._agree("optimizer.step()", lambda: [optimizer])
        are_new, self._are_new = self._are_new, False
        if are_new:
            self._leave_out_different_replicas()
            names = self._watched.measured_by(optimizer)
            self._agreed.add(names)  # all ranks have left out the same
        self._stepping[optimizer] = names
        return are_new

    def _agree(self, call: str, find: Callable[[], Sequence[Optimizer]]) -> None:
        """Check that all ranks have the same layers, optimizers and settings for the next steps.

        Args:
            call: Name of the user's call, such as ``attach()``, for errors.
            find: Function that returns the optimizers whose steps are to be observed.

        Raises:
            DisagreementError: A rank differs from rank 0, or cannot observe its optimizers.
            LostRankError: A rank does not answer.
        """
        stepped: list[tuple[str, ...]] = []

        def describe() -> list[str]:
            optimizers = find()
            self._layers.read(self._watched.parameters)
            _check_formats(self._watched.formats)
            self._leave_out_torn_layers(optimizers)
            stepped.extend(map(self._watched.measured_by, optimizers))
            return self._describe(stepped)

        self.check_alike(call, describe)
        self._agreed.update(stepped)
        self._are_new = True

    def _describe(self, stepped: Sequence[Sequence[str]]) -> list[str]:
        layers = [
            f"layer {name} {tuple(parameter.shape)} {parameter.dtype} {self._layers.describe(name)}"
            for name, parameter in self._watched.parameters.items()
        ]
        optimizers = [
            f"optimizer {k} steps {name}" for k, names in enumerate(stepped) for name in names
        ]
        return [*layers, *optimizers, *self._watched.describe()]

    def _leave_out_torn_layers(self, optimizers: Sequence[Optimizer]) -> None:
        sizes = self._watched.formats.block_sizes
        names = dict.fromkeys(n for each in optimizers for n in self._watched.measured_by(each))
        if torn := self._layers.torn(names, sizes):
            self._watched.leave_out(
                torn,
                f"leaves out {few(torn)}: several ranks hold parts of blocks of {sizes} elements "
                "that share a scale",
            )

    def _leave_out_different_replicas(self) -> None:
        """Stop observing layers whose copies on several ranks differ, such as experts; warn."""
        if different := find_different_replicas(self.agreed(dict), self._layers.shard, self):
            self._watched.leave_out(
                different,
                f"leaves out {few(different)}: not all ranks have the same values of what should "
                "be replicas, so that they are different experts or models, or were not "
                "initialised alike",
            )

    # --- local shards

    def part(self, name: str, indices: Tensor | None) -> Part:
        return self._layers.part(name, indices)

    def tears(self, name: str, block: int) -> bool:
        return bool(self._layers.torn([name], [block]))

    def parts(self, names: Sequence[str]) -> dict[str, tuple[int, Tensor]]:
        return {
            name: (each.elements, self._positions(name))
            for name, each in self._layers.expected(names).items()
        }

    def _positions(self, name: str) -> Tensor:
        positions = self._layers.measured_part(name).positions
        assert positions is not None, "of a shard"
        return positions

    def known(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._layers.known(parameters)

    def agreed(self, stepped: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:  # noqa: ARG002
        # Layers that this rank alone has got, or has changed, must not make its messages longer.
        names = {name for names in self._agreed for name in names}
        return {n: p for n, p in self._watched.parameters.items() if n in names}

    # --- an observed step

    def combine(self, optimizer: Optimizer, index: int, local: StepSums) -> StepSums:
        if isinstance(local.error, RankError):  # which every rank has
            raise local.error
        layers = self._layers.expected(self._stepping.get(optimizer, ()))
        rows = max(map(len, self._agreed), default=0)
        step = f"step {index} of {type(optimizer).__name__}"
        formats, twins = len(self._watched.formats), self._watched.twins
        return self.merge(StepMessage(step, layers, rows, formats, twins), local)

    def amax(
        self, parameters: Mapping[str, Tensor], scaling: Scaling | None
    ) -> tuple[list[Tensor], list[bool]]:
        shapes = [self._layers.shard(name).shape for name in parameters]
        groups = [shape[0] if shape and scaling == "channel" else 1 for shape in shapes]
        found = self.maximum(lambda: self._local_amax(parameters, groups, scaling), sum(groups))
        on_device = {p.device: found.to(p.device) for p in parameters.values()}
        by_device = {device: torch.split(each, groups) for device, each in on_device.items()}
        amax = [
            by_device[p.device][k].to(torch.float64 if p.dtype == torch.float64 else torch.float32)
            for k, p in enumerate(parameters.values())
        ]
        return amax, [bool((each == 0).any()) for each in torch.split(found, groups)]

    def _local_amax(
        self, parameters: Mapping[str, Tensor], groups: list[int], scaling: Scaling | None
    ) -> Tensor:
        """Return the largest finite magnitudes in all local shards, one shard after the other.

        Args:
            parameters: Parameters by name.
            groups: For each parameter the number of magnitudes: its size in dimension 0 if
                `scaling` is ``"channel"``, otherwise 1.
            scaling: Which elements share a scale.

        Returns:
            float64 (sum of `groups`) on the host; 0 for channels that other ranks hold.
        """
        here = {name: to_local_tensor(parameter.detach()) for name, parameter in parameters.items()}
        filled = {name: each for name, each in here.items() if each.numel()}
        numbers = torch.zeros(sum(groups), dtype=torch.float64, device="cpu")
        if not filled:
            return numbers
        each, _ = compute_layer_amaxes([*filled.values()], scaling)
        on_host = torch.cat([amax.double() for amax in copy_to_host(each)])
        amax_by_layer = dict(zip(filled, torch.split(on_host, [*map(len, each)]), strict=True))
        for name, own in zip(parameters, torch.split(numbers, groups), strict=True):
            if name in amax_by_layer:
                own[slice(None) if len(own) == 1 else self._layers.channels_here(name)] = (
                    amax_by_layer[name]
                )
        return numbers

    # --- beside steps

    def whole_history(
        self, here: dict[str, PackedBits], names: Sequence[str], kinds: int
    ) -> dict[str, PackedBits]:
        expected = self._layers.expected([name for name in names if name in self._layers])
        if not expected:  # as before attach()
            return {}
        shapes = {name: (kinds, each.elements) for name, each in expected.items()}
        bits = [
            scatter_packed_bits(here.get(name), shape, self._positions(name))
            for name, shape in shapes.items()
        ]
        joined = self._joined(torch.cat(bits))
        pairs = zip(shapes.items(), torch.split(joined, [*map(len, bits)]), strict=True)
        return {name: (shape, each.clone()) for (name, shape), each in pairs if each.any()}

    def exchange(self, own: bytes) -> list[bytes]:
        if not self._agreed:  # as before attach()
            return [own]
        # The store is slow for more than a few kB: only lengths go through it.
        lengths = self.group.gather("state_dict()", len(own))
        ends = list(itertools.accumulate(lengths))
        joined = torch.zeros(ends[-1], dtype=torch.uint8, device="cpu")
        start = ends[self.rank] - len(own)
        joined[start : ends[self.rank]] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
        self.group.reduce(joined, "SUM")
        parts = torch.split(joined, lengths)
        return [part.numpy().tobytes() for part in parts]

    def _joined(self, bits: Tensor) -> Tensor:
        """Return the bitwise OR of the flags of all ranks, eight flags to a byte.

        Args:
            bits: The packed flags of this rank, uint8 (bytes).

        Returns:
            uint8 (bytes).

        Raises:
            LostRankError: A rank does not answer, or has flags of another length.
        """
        packed = b64encode(zlib.compress(bytes(bits.tolist()), 1)).decode()
        for each in self.group.gather("state_dict()", packed):
            said = torch.frombuffer(bytearray(zlib.decompress(b64decode(each))), dtype=torch.uint8)
            if len(said) != len(bits):
                raise LostRankError(
                    f"state_dict(): ranks have flags of {len(said)} and {len(bits)} bytes: give "
                    "every rank the same layers and sampling"
                )
            bits = bits | said
        return bits


def _check_formats(formats: FormatSet) -> None:
    if formats.needs_tensor_amax:
        raise ValueError(
            f"formats={formats.names}: expected none that scales by the amax of the whole tensor "
            "in each step, which is unknown where parameters are sharded; leave out 'nvfp4', or "
            "observe an unsharded run"
        )
