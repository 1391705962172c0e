"""`Together`: peers that share the parameters of a model, and observe each step as one."""

from __future__ import annotations

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
from altgrad.distributed.ranks import Call, Description, DisagreementError, Ranks
from altgrad.distributed.replicas import different_replicas
from altgrad.distributed.shards import Part
from altgrad.distributed.step_message import StepMessage
from altgrad.measurement.ever_moved import PackedBits, scatter_packed_bits
from altgrad.observation.dtensor import to_local_tensor
from altgrad.observation.observer import RankError
from altgrad.quantization.format_set import FormatSet
from altgrad.quantization.formats import Scaling
from altgrad.quantization.scale_groups import compute_layer_amaxes


class Watched(Protocol):
    """A description of what this rank is about to observe, for its peers."""

    @property
    def formats(self) -> FormatSet:
        """The formats that are judged."""

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The parameters by name, in the order of the model."""

    def measured_by(self, optimizer: Optimizer) -> tuple[str, ...]:
        """Return the layers of an optimizer that are measured."""

    def indices(self, name: str, shape: torch.Size) -> Tensor | None:
        """Return which elements of a layer all ranks together measure.

        Args:
            name: Name of the layer.
            shape: Shape of the whole parameter.

        Returns:
            int64, flat indices on the CPU; None for all.
        """

    def describe(self) -> Mapping[str, Mapping[str, object]]:
        """Return settings, state and sampling of the layers, which must be alike on all ranks."""

    def is_enabled(self, name: str) -> bool:
        """Return whether a layer is observed at all."""

    def leave_out(self, names: Sequence[str], why: str) -> None:
        """Observe these layers no more.

        Args:
            names: The layers.
            why: The notice for the user.
        """


class Together(Ranks):
    """The ranks of a run whose parameters are sharded, from `attach` on.

    The ranks agree on the layers before they measure: otherwise messages would differ in length.

    Args:
        watched: What this rank is about to observe.

    Raises:
        RuntimeError: There is no process group.
    """

    def __init__(self, watched: Watched) -> None:
        super().__init__()
        self._watched = watched
        self._layers = ShardedLayers(watched.indices, self.rank)
        self._agreed: set[tuple[str, ...]] = set()  # the layers of each optimizer
        self._stepping: WeakKeyDictionary[Optimizer, tuple[str, ...]] = WeakKeyDictionary()
        self._rows = 0  # layers that an optimizer has at most
        self._are_replicas_known = False

    # --- before a step

    def attach(self, check: Callable[[], Sequence[Optimizer]]) -> None:
        """Meet the other ranks, and make sure that all are about to observe the same.

        Raises:
            Exception: What `check` raises here.
            ValueError: Another rank has a problem, or something else to observe.
            LostRankError: One does not come.
        """
        self.meet()
        try:
            self._agree("attach()", check)
        except DisagreementError as error:
            raise error.__cause__ or error from None

    def before_step(self, optimizer: Optimizer) -> bool:
        """Compare with the other ranks what has changed, before an observed step.

        Returns:
            Whether all ranks are to look for layers that are new.

        Raises:
            DisagreementError: It has not changed alike.
            LostRankError: It has changed here alone.
        """
        self._leave_out_different_replicas()
        names = self._watched.measured_by(optimizer)
        parameters = self._watched.parameters
        stepped = {name: parameters[name] for name in names}
        has_changed = names not in self._agreed or len(self._layers.known(stepped)) < len(stepped)
        if has_changed:
            self._agree("optimizer.step()", lambda: [optimizer])
            names = self._watched.measured_by(optimizer)
        is_other = self._stepping.get(optimizer) != names
        self._stepping[optimizer] = names
        return has_changed or is_other

    def _agree(self, during: Call, find: Callable[[], Sequence[Optimizer]]) -> None:
        description: Description = {}
        layers: list[tuple[str, ...]] = []
        problem = None
        try:
            optimizers = find()
            self._layers.read(self._watched.parameters)
            _check_formats(self._watched.formats)
            self._leave_out_torn_layers()
            layers = [self._watched.measured_by(each) for each in optimizers]
            description = self._description(layers)
        except Exception as error:  # noqa: BLE001 - the others are told, and then it is raised
            problem = error
        self.check_alike(description, problem, during)
        self._agreed |= {*layers}
        self._rows = max(map(len, self._agreed), default=0)

    def _description(self, layers: Sequence[Sequence[str]]) -> Description:
        described = self._watched.describe()
        alike = {
            kind: [f"{name}={value!r}" for name, value in described[kind].items()]
            for kind in ("settings", "state")
        }
        layers_in_words = [
            f"{name} {tuple(parameter.shape)} {parameter.dtype} {self._layers.describe(name)} "
            f"{described['layers'][name]}"
            for name, parameter in self._watched.parameters.items()
        ]
        optimizers = [f"of {', '.join(names)}" for names in layers]
        return alike | {"layers": layers_in_words, "optimizers": optimizers}

    def _leave_out_torn_layers(self) -> None:
        sizes = self._watched.formats.block_sizes
        names = filter(self._watched.is_enabled, self._watched.parameters)
        if torn := self._layers.torn(names, sizes):
            self._watched.leave_out(
                torn,
                f"leaves out {few(torn)}, of which blocks of {sizes} elements that share a scale "
                "lie on several ranks",
            )

    def _leave_out_different_replicas(self) -> None:
        """Before the first observed step, when weights are sure to be those that are trained."""
        if self._are_replicas_known:
            return
        self._are_replicas_known = True
        parameters = self.agreed(dict)
        if different := different_replicas(parameters, self._layers.shard, self):
            self._watched.leave_out(
                different,
                f"leaves out {few(different)}: not all ranks have the same values of what "
                "should be copies, so that they are different experts or models, or were not "
                "initialised alike",
            )

    # --- what lies here

    def part(self, name: str, indices: Tensor | None) -> Part:
        """Return the elements among `indices` that this rank measures.

        Args:
            name: Name of the layer.
            indices: int64, flat indices of the elements that all ranks measure; None for all.
        """
        return self._layers.part(name, indices)

    def parts(self, names: Sequence[str]) -> dict[str, tuple[int, Tensor]]:
        """Return which of the measured elements of each layer lie on this rank.

        Args:
            names: The layers.

        Returns:
            By layer, how many elements all ranks measure, and int64 positions among these.
        """
        return {
            name: (each.elements, self._positions(name))
            for name, each in self._layers.expected(names).items()
        }

    def _positions(self, name: str) -> Tensor:
        positions = self._layers.measured_part(name).positions
        assert positions is not None, "of a shard"
        return positions

    def known(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters whose placement on the ranks is known, by name."""
        return self._layers.known(parameters)

    def agreed(self, stepped: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the parameters of all layers that were agreed on, in the order of the model.

        Layers that this rank alone has got, or has changed, must not make its messages longer.

        Args:
            stepped: Not called: what this rank steps now may differ from other ranks.

        Returns:
            The parameters by name.
        """
        names = {name for names in self._agreed for name in names}
        return {n: p for n, p in self._watched.parameters.items() if n in names}

    # --- an observed step

    def combine(self, optimizer: Optimizer, index: int, local: StepSums) -> StepSums:
        """Return the sums of all ranks; one SUM and one MAX.

        Args:
            optimizer: The optimizer that stepped.
            index: Index of the step.
            local: The sums of this rank.

        Raises:
            RankError: A rank has failed, or ranks do not observe the same.
            LostRankError: One does not answer.
        """
        if isinstance(local.error, RankError):  # which every rank has
            raise local.error
        names = self._stepping.get(optimizer, ())
        message = StepMessage(len(self._watched.formats), self._rows, index, names)
        what = f"step {index} of {type(optimizer).__name__}"
        return self.merge(message, self._layers.expected(names), local, what)

    def amax(
        self, parameters: Mapping[str, Tensor], scaling: Scaling | None
    ) -> tuple[list[Tensor], list[bool]]:
        """Return the amax of whole parameters; one MAX.

        Args:
            parameters: By name.
            scaling: Which elements share a scale.

        Returns:
            float32 (float64 for float64) (1) or (channels) for each parameter, on its device; and
            whether any of these is 0.
        """
        shapes = [self._layers.shard(name).shape for name in parameters]
        groups = [shape[0] if shape and scaling == "channel" else 1 for shape in shapes]

        def take() -> Tensor:
            return self._amax_here(parameters, groups, scaling)

        found = self.maximum(take, sum(groups))
        on_device = {p.device: found.to(p.device) for p in parameters.values()}
        by_device = {device: torch.split(each, groups) for device, each in on_device.items()}
        amax = [
            by_device[p.device][k].to(torch.float64 if p.dtype == torch.float64 else torch.float32)
            for k, p in enumerate(parameters.values())
        ]
        return amax, [bool((each == 0).any()) for each in torch.split(found, groups)]

    def _amax_here(
        self, parameters: Mapping[str, Tensor], groups: list[int], scaling: Scaling | None
    ) -> Tensor:
        """Return the amax of what lies here, float64 (all groups) on the host; 0 for nothing."""
        here = {name: to_local_tensor(parameter.detach()) for name, parameter in parameters.items()}
        filled = {name: each for name, each in here.items() if each.numel()}
        numbers = torch.zeros(sum(groups), dtype=torch.float64, device="cpu")
        if not filled:
            return numbers
        each, _ = compute_layer_amaxes([*filled.values()], scaling)
        on_host = torch.cat([amax.double().to(each[0].device) for amax in each]).cpu()
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
        """Return what the elements of each layer have done so far, on whichever rank.

        Args:
            here: What the elements on this rank have done, by layer. Before the ranks have met it
                is returned.
            names: The layers.
            kinds: Number of bits of each element.

        Returns:
            Packed bits of shape (kinds, elements) by layer, equal on all ranks.

        Raises:
            LostRankError: Not all ranks have called it.
        """
        if not self.have_met:
            return here
        expected = self._layers.expected([name for name in names if name in self._layers])
        if not expected:
            return {}
        shapes = {name: (kinds, each.elements) for name, each in expected.items()}
        bits = [
            scatter_packed_bits(here.get(name), shape, self._positions(name))
            for name, shape in shapes.items()
        ]
        joined = self._joined(torch.cat(bits))
        pairs = zip(shapes.items(), torch.split(joined, [*map(len, bits)]), strict=True)
        return {name: (shape, each.clone()) for (name, shape), each in pairs if each.any()}

    def _joined(self, bits: Tensor) -> Tensor:
        """Return the bits, uint8, that are set on any rank; few are on each, which pack well."""
        packed = b64encode(zlib.compress(bytes(bits.tolist()), 1)).decode()
        for each in self.call("state_dict()", packed):
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
            f"formats={formats.names}: one of them scales blocks by the amax of the whole tensor "
            "in each step, which is not known where parameters are sharded; leave out 'nvfp4', "
            "or observe an unsharded run"
        )
