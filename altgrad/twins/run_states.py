"""`RunStates`: find the layers whose optimizer states something other than a step has changed.

A checkpoint that is loaded in mid-run, a warm restart, or a reset of the first moment changes the
states of the *run's* optimizer, that of the training, between two steps. Twins, which step a sample
with states of their own, then take these states over. Only identities of tensors and the numbers of
writes that torch counts are compared, so that an ordinary step costs no operation.

Read `run_weights` first; `outside_changes` comes next.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from altgrad.observation.dtensor import is_sharded, to_local_tensor
from altgrad.quantization.arguments import INPUT_DTYPES
from altgrad.quantization.devices import gather
from altgrad.twins.layer_plan import Stepped
from altgrad.twins.layout import Layout
from altgrad.twins.sample import Sampled
from altgrad.twins.writes import count_writes, count_writes_to_each


class RunStates:
    """A record of the writes to optimizer states that torch has counted so far, by layer."""

    def __init__(self) -> None:
        self._last = _Writes((), [], [], [])

    def remember(self, optimizer: Optimizer, stepped: Sequence[Stepped]) -> None:
        """Remember how often each optimizer state was written to; called right after a step.

        Only later writes count as changes by something other than a step.

        Args:
            optimizer: The training's optimizer.
            stepped: The layers that the optimizer steps.
        """
        self._last = _read_writes(optimizer, stepped)

    def find_changed(self, optimizer: Optimizer, stepped: Sequence[Stepped]) -> set[str]:
        """Return the layers whose optimizer states were written to or replaced since `remember`.

        Args:
            optimizer: The training's optimizer.
            stepped: The layers that the optimizer is about to step.

        Returns:
            Names of the layers; a layer that `remember` did not get is not among them.
        """
        now = _read_writes(optimizer, stepped)
        if now.equals(self._last):
            return set()
        marks, before = now.mark_layers(), self._last.mark_layers()
        return {name for name, mark in marks.items() if name in before and before[name] != mark}


class _Writes(NamedTuple):
    """The optimizer states of some layers at one time, in flat lists, which compare quickly.

    Attributes:
        stepped: The layers.
        states: The state of each layer by name; held, so that no other gets its address.
        values: All items of the states, layer by layer; held likewise.
        counts: The number of writes to each tensor among the items.
    """

    stepped: Sequence[Stepped]
    states: list[Mapping[str, Any]]
    values: list[Any]
    counts: list[int]

    def equals(self, other: _Writes) -> bool:
        """Return True if nothing was replaced, and no tensor written to, between two readings."""
        return (
            self.stepped is other.stepped
            and self.counts == other.counts
            and _are_identical(self.states, other.states)
            and _are_identical(self.values, other.values)
        )

    def mark_layers(self) -> dict[str, object]:
        """Return for each layer a key that is another one after its optimizer state has changed."""
        values, counts = iter(self.values), iter(self.counts)
        marks: dict[str, object] = {}
        for each, state in zip(self.stepped, self.states, strict=True):
            items = [next(values) for _ in state]
            marks[each.name] = (
                id(state) if state else None,
                [v if isinstance(v, (int, float)) else id(v) for v in items],
                [next(counts) for v in items if isinstance(v, Tensor)],
            )
        return marks


def gather_states(
    optimizer: Optimizer, layers: Mapping[str, Sampled], layout: Layout, weights: Tensor
) -> dict[str, Tensor]:
    """Gather the sampled elements of the optimizer states that have the shape of their layer.

    Args:
        optimizer: The training's optimizer.
        layers: The layers by name, with their sampled elements.
        layout: The places of the layers in a flat tensor.
        weights: The sampled weights, (elements).

    Returns:
        Each state by name, float32 or float64 (elements); 0 in layers without the state. States of
        other dtypes, and tensors of a class of their own, as of 8-bit optimizers, are left out.
    """
    states: dict[str, Tensor] = {}
    for name, place in layout.places.items():
        layer = layers[name]
        for key, value in layer.read_state(optimizer).items():
            if type(value) is not Tensor or value.dtype not in INPUT_DTYPES:
                continue
            if value.shape == layer.weights.shape:
                dtype = torch.promote_types(value.dtype, torch.float32)
                flat = states.setdefault(key, torch.zeros_like(weights, dtype=dtype))
                taken = gather(value, layer.places.to(value.device))
                flat[place] = taken.to(flat.device).to(flat.dtype)
    return states


def find_whole_states(
    optimizer: Optimizer, layers: Mapping[str, Sampled], wanted: Collection[str]
) -> dict[str, dict[str, Tensor]]:
    """Return the floating-point optimizer states that have the shape of their layer, whole.

    Args:
        optimizer: The training's optimizer.
        layers: The layers by name.
        wanted: Names of states; ``"*"`` stands for all.

    Returns:
        By name of the state, the state of each layer by name.
    """
    states: dict[str, dict[str, Tensor]] = {}
    for name, layer in layers.items():
        for key, state in layer.read_state(optimizer).items():
            is_whole = isinstance(state, Tensor) and state.shape == layer.weights.shape
            if is_whole and state.is_floating_point() and not {key, "*"}.isdisjoint(wanted):
                states.setdefault(key, {})[name] = state
    return states


_NO_STATE: Mapping[str, Any] = {}


def _read_writes(optimizer: Optimizer, stepped: Sequence[Stepped]) -> _Writes:
    state = optimizer.state
    states = [state.get(each.parameter, _NO_STATE) for each in stepped]
    values = [value for each in states for value in each.values()]
    tensors = [value for value in values if isinstance(value, Tensor)]
    counts = count_writes_to_each(tensors)
    for number, value in enumerate(tensors):
        if is_sharded(value):  # torch counts writes to the local shard apart
            counts[number] += count_writes(to_local_tensor(value))
    return _Writes(stepped, states, values, counts)


def _are_identical(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(map(is_, one, other))
