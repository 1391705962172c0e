"""Split, save and list optimizer states that may be packed: blocks of a few bits with one scale.

The optimizer of a twin, which steps samples of layers in one flat parameter, may *pack* its states,
as `altgrad.recipes.packed_states` says. A block of the flat parameter is then a whole block of a
layer. In a checkpoint, a packed state is taken apart into plain tensors, which can be read without
the optimizer's library. States that are not packed are treated as `flat_state` does.

Read `flat_state` first; `optimizer_twin` comes next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from altgrad.recipes.packed_states import PackedStates, StateParts
from altgrad.twins.flat_state import split_state
from altgrad.twins.optimizer_copy import copy_value


def split_packed_state(
    packed: PackedStates | None,
    state: Mapping[str, Any],
    positions: Tensor,
    length: int,
    shape: torch.Size | None = None,
) -> dict[str, Any]:
    """Return the optimizer state of a parameter that takes over elements of a flat parameter.

    Args:
        packed: How the optimizer packs states; None if it does not.
        state: The state of the other parameter, by name.
        positions: The elements, as indices into the other parameter, int64 (elements); whole blocks
            if the state is packed.
        length: Number of elements of the new parameter, including padding, where states are 0.
        shape: Shape of the new parameter; None for a flat one.

    Returns:
        The state by name; no tensor shares memory with those in `state`.

    Raises:
        NotElementwiseError: A state that is not packed does not hold one number per element, and
            the new parameter has not all elements of the other one.
    """
    parts = None if packed is None else packed.take_apart(state)
    if packed is None or parts is None or not parts.blocks:
        return split_state(state, positions, length, shape)
    firsts = positions[:: packed.block] // packed.block
    count = length // packed.block
    return packed.put_together(
        StateParts(
            {name: _take(each, positions, length) for name, each in parts.elements.items()},
            {name: _take(each, firsts, count) for name, each in parts.blocks.items()},
            {name: copy_value(each) for name, each in parts.shared.items()},
        )
    )


def _take(values: Tensor, positions: Tensor, length: int) -> Tensor:
    """Return some elements of a flat tensor, padded with 0 to a length."""
    taken = values.new_zeros(length)
    taken[: len(positions)] = values[positions]
    return taken


def save_state(packed: PackedStates | None, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the optimizer state of a parameter, for a checkpoint.

    Args:
        packed: How the optimizer packs states; None if it does not.
        state: The state, by name.

    Returns:
        The copy by name. For an optimizer that packs states: by kind, the attributes of
        `StateParts`, and then by name; empty if the state is.
    """
    if packed is None or not state:
        return _copy(state)
    return {kind: _copy(each) for kind, each in packed.take_apart(state)._asdict().items()}


def load_state(packed: PackedStates | None, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the optimizer state that `save_state` saved.

    Args:
        packed: How the optimizer packs states; None if it does not.
        saved: A result of `save_state`.

    Returns:
        The state by name; no tensor shares memory with those in `saved`.
    """
    if packed is None or not saved:
        return _copy(saved)
    return packed.put_together(StateParts(**{kind: _copy(each) for kind, each in saved.items()}))


def list_state_tensors(packed: PackedStates | None, state: Mapping[str, Any]) -> list[Tensor]:
    """Return the plain tensors in an optimizer state; writes to them change the state.

    Args:
        packed: How the optimizer packs states; None if it does not.
        state: The state of a parameter, by name.

    Returns:
        The tensors, of any shape and dtype that torch can index.
    """
    parts = [state] if packed is None or not state else [*packed.take_apart(state)]
    return [each for part in parts for each in part.values() if isinstance(each, Tensor)]


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: copy_value(each) for name, each in values.items()}
