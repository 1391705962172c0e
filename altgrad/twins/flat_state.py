"""Make the optimizer state of a twin's parameter, which holds the samples of several layers.

A twin's optimizer steps *flat* parameters, in which the sampled elements of several layers lie one
after another (`layout`). `take_state` gathers the state of a flat parameter from the states that
the training's optimizer has of the layers. `split_state` takes some elements out of the state of
another flat parameter, when its layers are no longer stepped alike. Both need each tensor of a
state to hold one number per element, or a single number.

Read `factory` first; `packed_state` comes next.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from altgrad._messages import format_count
from altgrad.quantization.devices import gather, move_to_exact_device
from altgrad.recipes.stored_states import COUNTERS
from altgrad.twins.self_check import MOST_TAILS

_NUMBERS = (int, float, bool, type(None))


class NotElementwiseError(ValueError):
    """An error for an optimizer state that cannot be sampled: it has not one number per element."""


def take_state(
    states: Sequence[Mapping[str, Any]],
    shapes: Sequence[torch.Size],
    indices: Sequence[Tensor],
    length: int,
    *,
    dtype: torch.dtype,
    real_dtype: torch.dtype,
    shape: torch.Size | None = None,
) -> dict[str, Any]:
    """Return the optimizer state of a flat parameter that holds sampled elements of some layers.

    Tensors of the shape of their layer are gathered. States that are a single number, such as the
    number of steps, are copied from the first layer. They become float32 if they have the 16 bits
    of the training's weights and the flat parameter has another dtype.

    Args:
        states: The state of each layer, by name.
        shapes: The shape of each layer.
        indices: The sampled elements of each layer, flat indices, int64 (elements).
        length: Number of elements of the flat parameter, including padding, where states are 0.
        dtype: The dtype of the flat parameter. States whose dtype is `real_dtype` are converted to
            it; others keep theirs.
        real_dtype: The dtype of the layers.
        shape: Shape of the parameter if it has a single layer in its own shape; None for a flat
            one.

    Returns:
        The state by name; no tensor shares memory with those in `states`.

    Raises:
        NotElementwiseError: A state has another shape than its layer, is a tensor of a class of its
            own, or is missing in some of the layers.
    """
    taken: dict[str, Any] = {}
    for name in dict.fromkeys(name for state in states for name in state):
        values = [state[name] for state in states if name in state]
        if len(values) < len(states) or len(set(map(type, values))) > 1:
            raise NotElementwiseError(
                f"state[{name!r}] is kept for {len(values)} of "
                f"{format_count(len(states), 'layer')}, or in several types: expected the same "
                "states for layers that are stepped alike"
            )
        if _is_elementwise(name, values, shapes):
            flat = torch.cat([_take(*each) for each in zip(values, indices, strict=True)])
            if flat.dtype == real_dtype:
                flat = flat.to(dtype)
            taken[name] = _shape(flat, length, shape)
        else:
            taken[name] = _copy_shared(name, values[0], shapes[0])
            if dtype != real_dtype and _is_rounded(taken[name], real_dtype):
                taken[name] = taken[name].float()
    return taken


def split_state(
    state: Mapping[str, Any], positions: Tensor, length: int, shape: torch.Size | None = None
) -> dict[str, Any]:
    """Return the optimizer state of a parameter that takes over elements of a flat parameter.

    Args:
        state: The state of the other parameter, by name.
        positions: The elements, as indices into the other parameter, int64 (elements).
        length: Number of elements of the new parameter, including padding, where states are 0.
        shape: Shape of the new parameter; None for a flat one.

    Returns:
        The state by name; no tensor shares memory with those in `state`.

    Raises:
        NotElementwiseError: A state does not hold one number per element, and the new parameter has
            not all elements of the other one.
    """
    sizes = {each.numel() for each in _find_tensors([*state.values()])} - {1}
    if not _can_index(state, sizes, positions):
        order = torch.arange(len(positions), device=positions.device)
        if length == max(sizes) and torch.equal(positions, order):
            return {name: _copy(value) for name, value in state.items()}  # nothing goes apart
        raise NotElementwiseError(
            f"states of {', '.join(state)} do not hold one number per element of the parameter: "
            "expected that they do, so that layers which are no longer stepped alike can go apart"
        )
    parts: dict[str, Any] = {}
    for name, value in state.items():
        if _is_plain_tensor(value) and value.numel() > 1:
            parts[name] = _shape(_take(value, positions), length, shape)
        else:
            parts[name] = _copy_shared(name, value, torch.Size([length]))
    return parts


def _is_rounded(value: Any, real_dtype: torch.dtype) -> bool:
    """Return True for a tensor in the dtype of the training's weights, if that has 16 bits.

    `Optimizer.load_state_dict` casts numbers such as `eta` of ASGD to the dtype of the weights.
    """
    return isinstance(value, Tensor) and value.dtype == real_dtype and real_dtype.itemsize == 2


def is_same_state(own: Any, positions: Tensor, other: Any, indices: Tensor) -> bool:
    """Return True if a twin's optimizer state equals the training's, but for a few roundings.

    A *twin* is a sample of the training's layers that is stepped on its own.

    Torch may round the last elements of a tensor in another way: these are few, and differ by a
    spacing of bfloat16 at most.

    Args:
        own: A state of the twin's flat parameter.
        positions: Where the layer's sample lies in the flat parameter, int64 (elements).
        other: The state of the same name that the training has of the layer.
        indices: The sample, flat indices into the layer, int64 (elements).
    """
    if not (_is_plain_tensor(own) and _is_plain_tensor(other)):
        return type(own) is type(other) and type(own) in _NUMBERS and own == other
    if own.numel() > 1:
        own = _take(own, positions)
    if other.numel() > 1:
        other = _take(other, indices)
    if own.numel() != other.numel():
        return False
    own, other = own.double().view(-1), other.double().view(-1).to(own.device)
    differs = (own != other) & ~(own.isnan() & other.isnan())
    is_near = torch.allclose(own, other, rtol=2.0**-7, atol=0, equal_nan=True)
    return is_near and int(differs.sum()) <= MOST_TAILS * own.numel()


def _is_elementwise(name: str, values: Sequence[Any], shapes: Sequence[torch.Size]) -> bool:
    """Return True if the states of one name hold one number per element of each layer."""
    if name in COUNTERS and all(shape.numel() == 1 for shape in shapes):
        return False
    each = zip(values, shapes, strict=True)
    return all(_is_plain_tensor(value) and value.shape == shape for value, shape in each)


def _is_plain_tensor(value: object) -> bool:
    """Return True for a tensor whose elements can be indexed, unlike quantised or sparse ones."""
    return type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided  # type: ignore[attr-defined]


def _can_index(state: Mapping[str, Any], sizes: set[int], positions: Tensor) -> bool:
    """Return True if the positions can be taken out of each tensor of more than one element.

    Args:
        state: The state of a flat parameter, by name.
        sizes: The numbers of elements of its tensors, but for 1.
        positions: Flat indices, int64 (elements).
    """
    if not sizes or not len(positions):
        return True
    large = [value for value in state.values() if any(e.numel() > 1 for e in _find_tensors(value))]
    # An index out of range would end the process on some devices.
    return (
        len(sizes) == 1 and all(map(_is_plain_tensor, large)) and int(positions.max()) < max(sizes)
    )


def _take(value: Tensor, indices: Tensor) -> Tensor:
    taken = gather(value.detach(), indices.to(value.device))
    return move_to_exact_device([taken])[0]


def _shape(flat: Tensor, length: int, shape: torch.Size | None) -> Tensor:
    """Return a flat tensor padded with 0 to a length, in a shape if there is one."""
    padded = torch.nn.functional.pad(flat, (0, length - len(flat)))
    return padded if shape is None else padded.view(shape)


def _copy_shared(name: str, value: Any, shape: torch.Size) -> Any:
    """Return a copy of an optimizer state that is the same for all elements of a parameter.

    Args:
        name: Name of the state, for the error.
        value: The state.
        shape: Shape of the parameter, for the error.

    Raises:
        NotElementwiseError: The state is a tensor with more than one number, or contains one.
    """
    for each in _find_tensors(value):
        if each.numel() > 1 or not _is_plain_tensor(each):
            kind = "" if _is_plain_tensor(each) else f" is a {type(each).__name__}, and"
            raise NotElementwiseError(
                f"state[{name!r}]{kind} has shape {tuple(each.shape)} for a parameter of shape "
                f"{tuple(shape)}: expected one number per element, or one number"
            )
    return _copy(value)


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return move_to_exact_device([value.detach()])[0].clone()
    return copy.deepcopy(value)


def _find_tensors(value: object) -> Iterator[Tensor]:
    """Yield the tensors of a state, also those in lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _find_tensors(each)
    elif isinstance(value, dict):
        yield from _find_tensors([*value.values()])
