"""`LayerPlan`: decide which layers have twins, and which of them share a bucket.

*Twins* step a sample of each layer of the *run*, the training that is watched. A *lane* is a set of
layers whose twins are stepped together, since their samples can lie in one tensor (`LaneKind`). In
a lane, layers that step alike share a *bucket*: a flat tensor that the optimizer of a twin steps at
once. A bucket is split when its layers begin to differ, as layers that are frozen, and experts that
get no tokens.

Read `drawing` first; `lane_sorter` comes next.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from altgrad._messages import few
from altgrad.observation.dtensor import to_local_tensor
from altgrad.quantization.devices import gather
from altgrad.recipes.packed_states import PackedStates
from altgrad.twins.drawing import Drawing
from altgrad.twins.layout import CHUNK, Bucket, Layout
from altgrad.twins.sample import Sampled, measure_block_ends
from altgrad.twins.shard_sample import cut_sample
from altgrad.twins.twin_source import TwinSource

MOST_BUCKETS = 32
"""Largest number of buckets of a lane, and of small layers that are each stepped alone on a CPU.

A *bucket* is a flat tensor with small samples of layers that are stepped alike; a *lane* is a set
of buckets. Layers beyond these numbers are not sampled, since a bucket costs about 12 operations in
each step of each recipe. Many buckets come from experts, which get tokens at different steps.
Layers of fewer than 64 elements are stepped alone in 16 bits on a CPU, as their shape decides how
torch rounds them; a fused optimizer steps all at once.
"""


class LaneKind(NamedTuple):
    """The properties that all layers of a lane share.

    A *lane* is a set of layers whose samples are stepped together in one tensor.

    An optimizer may pack the states of large layers alone, in blocks of a few bits. These layers
    are in one lane, and the others in another one.

    Attributes:
        dtype: The dtype of the weights.
        gradient_dtype: The dtype of the gradients.
        device: The device on which samples are stepped: that of the weights and gradients, or the
            CPU if that lacks float64.
        block: Number of neighbouring elements that are drawn together, because a block of a format
            or of packed states shares a scale; 1 for single elements.
        is_stored: True if a `WeightStorage` rounds weights or optimizer states after each step.
        packed: How the optimizers of the lane's recipes keep states in blocks; None if they do not.
    """

    dtype: torch.dtype
    gradient_dtype: torch.dtype
    device: torch.device
    block: int
    is_stored: bool = False
    packed: PackedStates | None = None

    @property
    def is_low(self) -> bool:
        """True if the training itself stores weights or states in less than float32.

        That is so if weights are in 16 bits, or a `WeightStorage` rounds weights or states.
        """
        return self.is_stored or self.dtype.itemsize < torch.float32.itemsize

    @property
    def drawing(self) -> Drawing:
        """The number of neighbouring elements that are drawn together into the samples of layers.

        The recipes store weights and optimizer states in formats. Where a block of elements shares
        a scale, samples have whole blocks.
        """
        return Drawing(self.block) if self.packed is None else Drawing(packed=self.packed)

    def find_block_shape(self, shape: torch.Size) -> torch.Size:
        """Return the shape in which the blocks of a layer lie along the last dimension.

        A block is a number of neighbouring elements that share a scale. A format has blocks along
        the last dimension of the layer. Optimizers that pack their states have blocks of the
        flattened layer: for these, the shape has one dimension, without a last, shorter block.

        Args:
            shape: The shape of the layer.
        """
        if self.packed is None or self.block == 1:
            return shape
        numel = shape.numel()
        return torch.Size([numel - numel % self.block])

    def find_limits(self) -> tuple[int, int | None]:
        """Return the fewest and the most elements of a flat parameter in the lane.

        An optimizer that packs the states of large parameters packs those of a sample only if the
        sample is as large, and must not pack a sample of small layers.

        Returns:
            The fewest elements, a multiple of 64 and of the block size, and the most, a multiple of
            64; None without an upper limit.
        """
        if self.packed is None:
            return 0, None
        if self.block == 1:
            return 0, (self.packed.least - 1) // CHUNK * CHUNK
        unit = max(self.block, CHUNK)
        return -(-self.packed.least // unit) * unit, None

    def describe(self) -> list[object]:
        """Return the properties of the lane as names and numbers, by which a checkpoint finds it.

        A *lane* is a set of layers whose samples are stepped together. The list has the dtypes,
        type of device, block size, whether a `WeightStorage` rounds, and the sizes of packed
        states. The index of the device is left out, since a resume may change it.
        """
        kind: list[object] = [str(self.dtype), str(self.gradient_dtype), self.device.type]
        packed = self.packed
        return [
            *kind,
            self.block,
            *(["stored"] if self.is_stored else []),
            *([[packed.block, packed.least, packed.only_whole]] if packed is not None else []),
        ]


class Stepped(NamedTuple):
    """A layer that the training's optimizer steps.

    Attributes:
        name: Name of the layer.
        parameter: The parameter.
        group: Index of its parameter group in the training's optimizer.
    """

    name: str
    parameter: Tensor
    group: int


class SampledNow(NamedTuple):
    """The elements of a layer that this rank steps, as a state from another run has to have them.

    Attributes:
        indices: Ascending indices into the flattened layer, int64 (elements) on the CPU.
        group: Index of the parameter group in the training's optimizer.
        shape: Shape of the layer, or of its local shard, if it must be stepped in its own shape;
            otherwise None.
    """

    indices: Tensor
    group: int
    shape: torch.Size | None


def draw_layer(source: TwinSource, kind: LaneKind, layer: Stepped) -> Tensor:
    """Draw the elements of a layer that twins step: a small sample of the layer.

    Args:
        source: The layers of the training.
        kind: The properties of the layer, with the number of elements that are drawn together.
        layer: The layer.

    Returns:
        Flat indices, int64 (elements) on any device.
    """
    drawn = source.draw(layer.name, kind.find_block_shape(layer.parameter.shape), kind.block)
    _, most = kind.find_limits()
    if most is None or len(drawn) <= most:
        return drawn
    return drawn[torch.arange(most, device="cpu") * len(drawn) // most]


class LayerPlan:
    """The layers of a lane with their samples, and the buckets in which they lie.

    *Twins* step a small sample of each layer. A *lane* is a set of layers whose samples fit into
    one tensor. A *bucket* has those of its layers that step alike, as one parameter.

    Args:
        kind: The properties that the layers share.
        source: The layers of the training, from which samples are drawn.

    Attributes:
        layers: The layers by name, in the order of the samples in the tensor.
        layout: The buckets, and the places of the layers in a flat tensor.
        renewed: Names of the layers whose optimizer states twins take from the training since the
            last `arrange`, instead of going on with their own.
        begun: Names of the renewed layers that are new or have another sample than before. Their
            weights are taken from the training, too.
    """

    def __init__(self, kind: LaneKind, source: TwinSource) -> None:
        self.layers: dict[str, Sampled] = {}
        self.layout = Layout()
        self._kind = kind
        self._source = source
        self._is_arranged = False  # by `arrange`: a layout from a checkpoint is not
        self._left_out: set[str] = set()  # names of layers beyond the limits
        self.renewed: frozenset[str] = frozenset()
        self.begun: frozenset[str] = frozenset()
        self._warned: set[str] = set()
        self._loaded: dict[str, _Saved] = {}  # of a checkpoint, until the first step

    def arrange(
        self,
        optimizer: Optimizer,
        stepped: Sequence[Stepped],
        present: Collection[str],
        changed: Collection[str] = (),
    ) -> bool:
        """Assign layers to buckets anew if some are new, gone, or begin to differ in their steps.

        A *bucket* is a flat tensor with the samples of layers that step alike.

        Layers whose states were changed leave their bucket, and get another one as new layers do.

        Args:
            optimizer: The training's optimizer.
            stepped: The layers that the optimizer steps, with a gradient or without.
            present: Names of the layers with a gradient in this step.
            changed: Names of the layers whose optimizer states something other than a step has
                changed.

        Returns:
            True if parameters, buckets or states are other ones, so that twins, which step the
            samples, have to follow.
        """
        known = self._find_known(stepped)
        kept = self._split_buckets([each for each in known if each.name not in changed], present)
        settled = {name for bucket in kept for name in bucket.counts} | self._left_out
        wanted = {*present, *changed}
        new = [each for each in stepped if each.name in wanted and each.name not in settled]
        begun = self._begin(optimizer, {each.name for each in known}, new)
        made = self._make_buckets(optimizer, new, present)
        buckets = self._limit(optimizer, kept + made)
        layout = Layout(tuple(buckets))
        self.renewed = frozenset(name for bucket in made for name in bucket.counts)
        self.begun = begun & self.renewed
        parameters = {each.name: each.parameter for each in stepped}
        is_replaced = any(
            self.layers[name].parameter is not parameters[name] for name in layout.places
        )
        is_new = layout != self.layout or not self._is_arranged or bool(self.renewed)
        # Layers of which nothing was drawn go: they have no place.
        self.layers = {
            name: self.layers[name]._replace(parameter=parameters[name]) for name in layout.places
        }
        if not (is_new or is_replaced):
            return False
        self.layout, self._is_arranged = layout, True
        return True

    @property
    def left_out(self) -> frozenset[str]:
        """Names of the layers that are not sampled, since stepping all would take too long."""
        return frozenset(self._left_out)

    def find_present(self, present: Collection[str]) -> list[bool]:
        """Return for each bucket True if its layers are among those with a gradient.

        A *bucket* has the samples of layers that step alike: all have a gradient, or none has.
        """
        return [next(iter(bucket.counts)) in present for bucket in self.layout.buckets]

    def _split_buckets(self, stepped: Sequence[Stepped], present: Collection[str]) -> list[Bucket]:
        """Return the buckets so far without layers that are gone, split where others now differ.

        Layers of a *bucket* share a parameter group, and all or none have a gradient.

        Args:
            stepped: The layers that stay.
            present: Names of the layers with a gradient in this step.
        """
        groups = {each.name: each.group for each in stepped}
        buckets = []
        for bucket in self.layout.buckets:
            parts: dict[tuple[int, bool], list[str]] = {}
            for name in bucket.counts:
                if name in groups:
                    parts.setdefault((groups[name], name in present), []).append(name)
            for (group, _), names in parts.items():
                buckets.append(bucket.split(names, group))
        return buckets

    def _find_known(self, stepped: Sequence[Stepped]) -> list[Stepped]:
        """Return the given layers that were sampled before and still have the same shape."""
        return [
            each
            for each in stepped
            if each.name in self.layers and self.layers[each.name].shape == each.parameter.shape
        ]

    def _draw(self, optimizer: Optimizer, layer: Stepped) -> Sampled:
        """Draw the sample of a layer, and keep those of its elements that this rank steps.

        A *sample* has the few elements of a layer that are stepped on their own as recipes say.

        Returns:
            The layer with these elements.
        """
        name, parameter = layer.name, layer.parameter
        shape, device = parameter.shape, self._kind.device
        drawn = draw_layer(self._source, self._kind, layer)
        if not self._source.is_shared:
            return Sampled(parameter, shape, drawn.to(device))
        shard = cut_sample(
            drawn,
            lambda indices: self._source.find_part(name, indices),
            to_local_tensor(parameter).numel(),
            measure_block_ends(drawn, shape, self._kind.block),
            rounds_by_place=self._rounds_by_shape(optimizer, layer),
        ).to(device)
        return Sampled(parameter, shape, shard.indices, shard)

    def _begin(
        self, optimizer: Optimizer, known: Collection[str], layers: Sequence[Stepped]
    ) -> frozenset[str]:
        """Draw the samples of the layers whose names are not in `known`, and return these names."""
        begun = [each for each in layers if each.name not in known]
        # A new dict, as others hold the one before.
        self.layers = self.layers | {each.name: self._draw(optimizer, each) for each in begun}
        return frozenset(each.name for each in begun)

    def _make_buckets(
        self, optimizer: Optimizer, layers: Sequence[Stepped], present: Collection[str]
    ) -> list[Bucket]:
        """Return buckets for some layers: those that step alike share one.

        A *bucket* is a flat tensor with the samples of layers that step alike.

        Args:
            optimizer: The training's optimizer.
            layers: The layers that are new, or whose optimizer states were changed.
            present: Names of the layers with a gradient in this step.
        """
        buckets: dict[object, dict[str, int]] = {}
        shapes: dict[object, torch.Size | None] = {}
        for each in layers:
            layer = self.layers[each.name]
            count = len(layer.indices)
            if not count:
                continue
            shape = self._find_shape(optimizer, each, layer)
            kind = _describe_state(optimizer, layer) if shape is None else each.name
            key = (kind, each.group, each.name in present)
            buckets.setdefault(key, {})[each.name] = count
            shapes[key] = shape
        least, most = self._kind.find_limits()
        return [
            Bucket(key[1], part, shapes[key], least)  # type: ignore[index]
            for key, counts in buckets.items()
            for part in _part(counts, most)
        ]

    def _find_shape(
        self, optimizer: Optimizer, stepped: Stepped, layer: Sampled
    ) -> torch.Size | None:
        """Return the shape of a layer that must be stepped in its own shape; None for others.

        These are layers, or local shards, of fewer than 64 elements whose shape may decide how
        torch rounds them. All others are stepped in flat tensors.

        Args:
            optimizer: The training's optimizer.
            stepped: The layer.
            layer: The layer with its sample.
        """
        shape = layer.weights.shape
        is_small = shape.numel() < CHUNK and self._rounds_by_shape(optimizer, stepped)
        return shape if is_small else None

    def describe_samples(
        self, optimizer: Optimizer, stepped: Sequence[Stepped]
    ) -> dict[str, SampledNow]:
        """Return the elements of each layer that this rank is going to step.

        Args:
            optimizer: The training's optimizer.
            stepped: The layers that it is about to step.

        Returns:
            The elements by name of the layer; layers without any are left out.
        """
        drawn = [(each, self._draw(optimizer, each)) for each in stepped]
        return {
            each.name: SampledNow(
                layer.indices.cpu(), each.group, self._find_shape(optimizer, each, layer)
            )
            for each, layer in drawn
            if len(layer.indices)
        }

    def _rounds_by_shape(self, optimizer: Optimizer, layer: Stepped) -> bool:
        """Return True if the shape of a small layer may decide how torch rounds it.

        It may for weights in 16 bits, and with a fused optimizer.
        """
        is_fused = bool(optimizer.param_groups[layer.group].get("fused"))
        return self._kind.dtype.itemsize < 4 or is_fused

    def _limit(self, optimizer: Optimizer, buckets: list[Bucket]) -> list[Bucket]:
        """Return the buckets without those beyond `MOST_BUCKETS`; warn once of the layers left out.

        A *bucket* is a flat tensor with the samples of layers that step alike.
        """
        flat = [bucket for bucket in buckets if bucket.shape is None]
        alone = [
            bucket
            for bucket in buckets
            if bucket.shape is not None and self._steps_alone(optimizer, bucket)
        ]
        # Parameter groups are the user's choice, so that one bucket for each does not count.
        self._leave_out_smallest(
            flat,
            MOST_BUCKETS + len({bucket.group for bucket in buckets}) - 1,
            "that are stepped at other times than the rest, as experts are",
            "groups of layers apart",
        )
        self._leave_out_smallest(
            alone,
            MOST_BUCKETS,
            f"of fewer than {CHUNK} elements",
            "such layers, each on its own, in 16 bits on a CPU",
        )
        return [bucket for bucket in buckets if self._left_out.isdisjoint(bucket.counts)]

    def _steps_alone(self, optimizer: Optimizer, bucket: Bucket) -> bool:
        """Return True if a parameter is stepped by operations of its own: on a CPU, unless fused.

        A *bucket*, the samples of layers that step alike, is one parameter.
        """
        is_fused = optimizer.param_groups[bucket.group].get("fused")
        return self._kind.device.type == "cpu" and not is_fused

    def _leave_out_smallest(self, buckets: list[Bucket], most: int, kind: str, what: str) -> None:
        """Leave out layers in all but the buckets with the most elements, and warn once of them.

        A *bucket* is a flat tensor with the samples of layers that step alike.

        Args:
            buckets: Buckets of one kind.
            most: Largest number of buckets to keep.
            kind: Description of the layers that are left out, for the notice.
            what: Description of the buckets that are kept, after their number in the notice.
        """
        ranked = sorted(buckets, key=lambda bucket: -bucket.length)  # stable: equal runs are equal
        gone = [name for bucket in ranked[most:] for name in bucket.counts]
        if gone and kind not in self._warned:
            self._source.warn(
                f"has no twins of {few(gone)} and of others {kind}: twins step {most} {what}"
            )
            self._warned.add(kind)
        self._left_out.update(gone)
        for name in gone:
            self.layers.pop(name, None)

    def state_dict(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the buckets and samples, with weights and states to recognise the training by.

        A *bucket* has the samples of layers that step alike.

        Args:
            optimizer: The training's optimizer.

        Returns:
            A dict of plain data and tensors.
        """
        samples = {name: tuple(_Saved.read(optimizer, each)) for name, each in self.layers.items()}
        return {
            "buckets": [(b.group, dict(b.counts), b.shape, b.least) for b in self.layout.buckets],
            "samples": samples,
            "left_out": sorted(self._left_out),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore samples of layers, and the buckets in which they lie, before the first step.

        A *sample* has the few elements of a layer that are stepped on their own. A *bucket* is a
        flat tensor with the samples of layers that step alike.

        Args:
            state: A result of `state_dict`.
        """
        self.layout = Layout(tuple(Bucket(*bucket) for bucket in state["buckets"]))
        self._left_out = set(state["left_out"])
        self._loaded = {name: _Saved(*each) for name, each in state["samples"].items()}

    def restore(
        self, optimizer: Optimizer, stepped: Sequence[Stepped]
    ) -> tuple[set[str], set[str]]:
        """Add the layers of a loaded checkpoint, at the first step in which the optimizer has them.

        Their samples, the elements that are stepped on their own, are those of the checkpoint. A
        layer begins anew if its sample is another one, or if both its weights and its states
        differ from the checkpoint.

        Args:
            optimizer: The training's optimizer.
            stepped: The layers that the optimizer is about to step.

        Returns:
            Names of the added layers whose weights differ from the loaded state, and names of those
            whose optimizer states do.
        """
        written, changed, gone = set(), set(), []
        for each in stepped:
            saved = self._loaded.pop(each.name, None)
            if saved is None:
                continue
            layer = self._draw(optimizer, each)
            if not torch.equal(layer.indices.cpu(), saved.indices):
                gone.append(each.name)
                continue
            now = _Saved.read(optimizer, layer)
            has_weights, has_state = _equal(now.weights, saved.weights), now.equals_state(saved)
            # If weights and states differ, the run went on since; a write would change only one.
            if not (has_weights or has_state):
                gone.append(each.name)
                continue
            self.layers[each.name] = layer
            if not has_weights:
                written.add(each.name)
            if not has_state:
                changed.add(each.name)
        if gone:
            self._source.warn(
                f"has the twins of {few(gone)} begin anew: the sample is another one, or the run "
                "went on since the restored state"
            )
        return written, changed


class _Saved(NamedTuple):
    """A layer of the training at the time of a checkpoint; all tensors are on the CPU.

    Attributes:
        indices: The sample, flat indices, int64 (elements).
        weights: The sampled weights, (elements).
        state: Optimizer states by name: sampled, (elements), or a single number, (1).
    """

    indices: Tensor
    weights: Tensor
    state: Mapping[str, Tensor]

    @classmethod
    def read(cls, optimizer: Optimizer, layer: Sampled) -> _Saved:
        """Return the sampled weights and optimizer states of a layer as they are now, on the CPU.

        Args:
            optimizer: The training's optimizer.
            layer: The layer, with the sample.
        """
        weights, places, state = layer.weights, layer.places, layer.read_state(optimizer)
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        own = {n: v for n, v in tensors.items() if v.shape == weights.shape}
        single = {n: v for n, v in tensors.items() if n not in own and v.numel() == 1}
        return cls(
            layer.indices.cpu(),
            _take(weights, places),
            {n: _take(v, places) for n, v in own.items()}
            | {n: v.detach().view(1).cpu().clone() for n, v in single.items()},
        )

    def equals_state(self, other: _Saved) -> bool:
        """Return True if another record of the layer has equal optimizer states."""
        names = self.state.keys()
        return names == other.state.keys() and all(
            _equal(self.state[name], other.state[name]) for name in names
        )


def _take(values: Tensor, indices: Tensor) -> Tensor:
    return gather(values.detach(), indices.to(values.device)).cpu()


def _equal(one: Tensor, other: Tensor) -> bool:
    """Return True if two tensors are equal; NaN equals NaN."""
    return one.shape == other.shape and torch.allclose(
        one.double(), other.double(), rtol=0, atol=0, equal_nan=True
    )


def _part(counts: Mapping[str, int], most: int | None) -> Iterator[dict[str, int]]:
    """Yield layers with their numbers of sampled elements, in parts of at most `most` elements."""
    part: dict[str, int] = {}
    for name, count in counts.items():
        if part and most is not None and sum(part.values()) + count > most:
            yield part
            part = {}
        part[name] = count
    yield part


def _describe_state(optimizer: Optimizer, layer: Sampled) -> object:
    """Return a key that is equal for layers whose optimizer states have equal names and numbers.

    Numbers are counts of steps, for example. Layers with equal keys may be stepped as one
    parameter.
    """
    state = layer.read_state(optimizer)
    # Reading a counter waits for the device, which happens only when a layer is new.
    return tuple((name, _read_number(value, layer)) for name, value in state.items())


def _read_number(value: object, layer: Sampled) -> object:
    """Return a state that is one number for all elements of a layer, such as a count of steps.

    None for other states.
    """
    if isinstance(value, Tensor):
        is_number = value.numel() == 1 and value.shape != layer.weights.shape
        return float(value) if is_number else None
    return value if isinstance(value, (int, float)) else None
