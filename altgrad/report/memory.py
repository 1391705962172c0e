"""Compute what a run would take in memory if it were stored as each recipe says.

A *recipe* says how weights and optimizer states are stored. The bytes follow from the real shapes
of the run's layers, the states that its optimizer keeps, and the bits of the formats; the scales of
formats count. They are compared with weights and states in float32 of the run's own optimizer.
Gradients, activations and layers without an observed step are left out.

Read `records.schema` first. `judging` counts what a recipe saves, `memory_table` shows the bytes,
and `planning` chooses recipes by them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

from altgrad._messages import format_percent
from altgrad.measurement.catalogue import NOW
from altgrad.quantization.formats import Scaling
from altgrad.report.records.schema import (
    FormatSize,
    LayerInfo,
    OptimizerSize,
    RecipeInfo,
)

UNKNOWN = "unknown"
_DTYPE_BITS = {"float16": 16, "bfloat16": 16, "float32": 32, "float64": 64}
_KAHAN_BYTES = 2  # the rounding error of a weight, in bf16
_SCALE_BYTES = 1  # a power of two, as in e8m0fnu
_COMPENSATIONS = ("kahan_comp",)
"""Names of optimizer states that hold the rounding errors of weights, as optimi names its own."""
_MASTERS = ("master_param",)
"""Names of optimizer states that hold a float32 copy of the weights, as in TransformerEngine."""
_LARGEST_COUNTER = 8  # bytes; a state without elements is a table or scales beyond
_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


class Bytes(NamedTuple):
    """The bytes that a layer or a model takes; NaN where unknown.

    Attributes:
        weights: Bytes of the weights, with their scales.
        states: Bytes of the optimizer's states, with their scales, tables and counters.
        compensation: Bytes of the rounding errors of weights.
        master: Bytes of a copy of the weights in float32, which some optimizers keep as a state.
    """

    weights: float = 0.0
    states: float = 0.0
    compensation: float = 0.0
    master: float = 0.0

    def plus(self, other: Bytes) -> Bytes:
        """Return the sum of both, part by part."""
        return Bytes(*map(sum, zip(self, other, strict=True)))

    @property
    def total(self) -> float:
        """The sum of all parts; NaN if one is unknown."""
        return math.fsum(self)


@dataclass(frozen=True)
class Memory:
    """The memory of the layers that a run trains, if they are stored as a recipe says.

    Attributes:
        recipe: Name of the recipe; ``now`` for the run as it is.
        parameters: Number of weights in these layers.
        layers: Number of these layers.
        bytes: Bytes of these layers, stored as the recipe says.
        fp32: Bytes of these layers with weights and states in float32, without rounding errors and
            copies of the weights.
    """

    recipe: str
    parameters: int
    layers: int
    bytes: Bytes
    fp32: float

    @property
    def saved(self) -> float:
        """Bytes that the recipe saves against float32; below 0 if it takes more, NaN if unknown."""
        return self.fp32 - self.bytes.total

    @property
    def saved_share(self) -> float:
        """The share of float32's bytes that the recipe saves; NaN if unknown."""
        return self.saved / self.fp32 if self.fp32 else math.nan

    @property
    def per_parameter(self) -> Bytes:
        """The bytes of each part for each weight; NaN if unknown."""
        return Bytes(*(part / max(self.parameters, 1) for part in self.bytes))


def measure_memory(
    layers: Mapping[str, LayerInfo], recipes: Mapping[str, RecipeInfo]
) -> dict[str, Memory]:
    """Return the memory of a run by recipe, in the order of the recipes.

    The run as it is, ``now``, comes first if it takes other memory than float32.

    Args:
        layers: The observed layers, by name.
        recipes: The recipes that the run tried, by name.

    Returns:
        The memory of the layers of `list_counted`, by name of the recipe.
    """
    return _measure([*list_counted(layers).values()], recipes)


def _measure(layers: Sequence[LayerInfo], recipes: Mapping[str, RecipeInfo]) -> dict[str, Memory]:
    parameters = sum(math.prod(each.shape) for each in layers)
    fp32 = _add(map(measure_fp32, layers)).total
    now = _add(map(measure_now, layers))
    found = {
        name: _add(measure_layer(each, recipe) for each in layers)
        for name, recipe in recipes.items()
    }
    if now.total != fp32 and not math.isnan(now.total):
        found = {NOW: now} | found
    return {name: Memory(name, parameters, len(layers), each, fp32) for name, each in found.items()}


def list_counted(layers: Mapping[str, LayerInfo]) -> dict[str, LayerInfo]:
    """Return the layers whose memory is counted, by name.

    These are the layers with known optimizer states; a layer that was never stepped has none. If
    no states are known, as in older files, all layers count.

    Args:
        layers: The observed layers, by name.

    Returns:
        Those of the layers that count.
    """
    known = {name: each for name, each in layers.items() if each.states is not None}
    return known or dict(layers)


def measure_layer(layer: LayerInfo, recipe: RecipeInfo) -> Bytes:
    """Return the bytes that a layer takes if it is stored as a recipe says; NaN where unknown.

    Args:
        layer: The layer, with the states that the run's optimizer keeps of it.
        recipe: The recipe.

    Returns:
        The bytes of each part.
    """
    sizes = recipe.sizes
    if sizes is None:
        return Bytes(math.nan, math.nan, math.nan, math.nan)
    count, bits = math.prod(layer.shape), _DTYPE_BITS.get(recipe.dtype or "", _find_bits(layer))
    stored = Bytes(
        _count_bytes(layer.shape, sizes.weights, bits),
        compensation=count * _KAHAN_BYTES if recipe.compensation is not None else 0.0,
    )
    if sizes.optimizer is not None:
        return stored.plus(_measure_own(count, sizes.optimizer, bits))
    if layer.states is None:
        return stored._replace(states=math.nan)
    formats = sizes.states
    states = [
        _measure_state(layer, name, formats.get(name, formats.get("*")), bits)
        for name in layer.states
    ]
    return reduce(Bytes.plus, states, stored)


def measure_fp32(layer: LayerInfo) -> Bytes:
    """Return the bytes of a layer in float32, or in float64 if it is stored so; NaN if unknown."""
    bits = _find_bits(layer)
    states = sum(
        each.elements * bits / 8 or each.bytes * (each.bytes <= _LARGEST_COUNTER)
        for name, each in (layer.states or {}).items()
        if name not in (*_MASTERS, *_COMPENSATIONS)
    )
    weights = math.prod(layer.shape) * bits / 8
    return Bytes(weights, states if layer.states is not None else math.nan)


def measure_now(layer: LayerInfo) -> Bytes:
    """Return the bytes of a layer's tensors in the run itself; NaN where unknown."""
    weights = math.prod(layer.shape) * _DTYPE_BITS.get(layer.dtype, math.nan) / 8
    if layer.states is None:
        return Bytes(weights, math.nan)
    parts = [_sort(name, each.bytes) for name, each in layer.states.items()]
    return reduce(Bytes.plus, parts, Bytes(weights))


def _measure_state(layer: LayerInfo, name: str, format: FormatSize | None, bits: int) -> Bytes:
    """Return the bytes of a state of the run's optimizer, stored in a format or else in `bits`.

    States without elements, and those that the optimizer itself packs, stay as they are. Rounding
    errors and copies of the weights exist only beside tensors of fewer bits than float32.
    """
    assert layer.states is not None
    state = layer.states[name]
    if name in (*_MASTERS, *_COMPENSATIONS):
        return _sort(name, state.bytes if bits < _DTYPE_BITS["float32"] else 0)
    has_shape = state.elements == math.prod(layer.shape)
    if has_shape and format is not None:
        return Bytes(states=_count_bytes(layer.shape, format, bits))
    is_packed = state.bytes < 2 * state.elements  # torch computes in no fewer than 16 bits
    as_it_is = is_packed or not state.elements
    return Bytes(states=state.bytes if as_it_is else state.elements * bits / 8)


def _measure_own(count: int, optimizer: OptimizerSize, bits: int) -> Bytes:
    """Return the bytes that a recipe's own optimizer keeps of a layer of `count` weights."""
    errors, packed = count * optimizer.compensation_bytes, optimizer.packed
    if packed is None:
        return Bytes(states=count * optimizer.state_bytes - errors, compensation=errors)
    if count < packed.least or (packed.only_whole and count % packed.block):
        return Bytes(states=packed.states * count * bits / 8)
    tables = packed.states * packed.table_bytes
    return Bytes(states=count * optimizer.state_bytes + tables - errors, compensation=errors)


def _sort(name: str, size: float) -> Bytes:
    """Return a `Bytes` with the size of a state in one part, chosen by the state's name."""
    if name in _MASTERS:
        return Bytes(master=size)
    return Bytes(compensation=size) if name in _COMPENSATIONS else Bytes(states=size)


def _find_bits(layer: LayerInfo) -> int:
    """Return the bits of a number in a recipe without a dtype: 32, or 64 in a run in float64."""
    return max(_DTYPE_BITS.get(layer.dtype, 0), _DTYPE_BITS["float32"])


def _count_bytes(shape: Sequence[int], format: FormatSize | None, bits: int) -> float:
    """Return the bytes of a tensor in a format, with its scales; without a format in `bits`."""
    count = math.prod(shape)
    if format is None:
        return count * bits / 8
    return count * format.bits / 8 + _SCALE_BYTES * count_scales(shape, format.scaling)


def count_scales(shape: Sequence[int], scaling: Scaling | None) -> int:
    """Return the number of scales of a tensor.

    Args:
        shape: The shape of the tensor.
        scaling: Which elements share a scale: ``"tensor"``, ``"channel"`` (along dimension 0) or
            ``("block", size)`` along the last dimension; None for no scale.
    """
    if scaling is None or not math.prod(shape):
        return 0
    if scaling == "tensor" or not shape:
        return 1
    if scaling == "channel":
        return shape[0]
    return math.prod(shape[:-1]) * math.ceil(shape[-1] / scaling[1])


def _add(parts: Iterable[Bytes]) -> Bytes:
    return reduce(Bytes.plus, parts, Bytes())


def format_bytes(size: float) -> str:
    """Return a number of bytes with its unit, such as ``7.7 MB``; NaN is ``unknown``.

    1 MB is 10^6 bytes.
    """
    if math.isnan(size):
        return UNKNOWN
    for unit, factor in _UNITS:
        if abs(size) >= factor:
            digits = 2 if abs(size) < 10 * factor else 1 if abs(size) < 100 * factor else 0
            return f"{size / factor:,.{digits}f} {unit}"
    return f"{size:,.0f} B"


def format_saved(share: float) -> str:
    """Return the share of float32's memory that a recipe saves, for the column of a table.

    It is ``33 %``, ``unknown``, or below 0 if the recipe takes more than float32.

    Args:
        share: `Memory.saved_share`, NaN if unknown.
    """
    if math.isnan(share):
        return UNKNOWN
    return format_percent(share) if share >= 0 else f"−{format_percent(-share)}"


def describe_saved(memory: Memory) -> str:
    """Return what a recipe saves in a phrase, such as ``saves 2.58 of 7.73 MB (33 %)``."""
    if math.isnan(memory.saved_share):
        return "memory unknown"
    whole = format_bytes(memory.fp32)
    if memory.saved < 0:
        return f"takes {format_bytes(-memory.saved)} more than the {whole} of float32"
    return f"saves {format_bytes(memory.saved)} of {whole} ({format_percent(memory.saved_share)})"
