"""Measure what an optimizer keeps of a layer: numbers and bytes of each state, by its name.

The run file has these sizes, so that a report can say what the states would take if they were
stored otherwise.

Read `header` first, which describes layers; `run_header` comes next.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from altgrad.observation.dtensor import is_sharded, to_local_tensor
from altgrad.recipes.stored_states import COUNTERS

_TABLES = ("qmap", "absmax")
"""First letters of the names under which bitsandbytes keeps values of codes, and scales."""


def find_owners(optimizers: Iterable[Optimizer]) -> dict[Tensor, Optimizer]:
    """Return the optimizer that steps each parameter, by parameter."""
    return {
        parameter: optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def measure_states(
    optimizer: Optimizer | None, parameter: Tensor, *, has_stepped: bool
) -> dict[str, dict[str, int]] | None:
    """Measure the states that an optimizer keeps of a layer.

    Args:
        optimizer: The optimizer that steps the layer, without the wrapper of a trainer; None if
            unknown.
        parameter: The layer's parameter.
        has_stepped: True if the optimizer has stepped the layer. If it then has no state of any
            layer, it keeps none.

    Returns:
        By name of the state, under ``elements`` how many numbers it has that could be stored in
        another format, and under ``bytes`` its size on all ranks together. Counters, tables and
        scales have 0 elements. None if the states are unknown, as before the first step.
    """
    if optimizer is None:
        return None
    states = optimizer.state.get(parameter)
    if not states:
        return {} if has_stepped and not optimizer.state else None
    return {
        name: {"elements": sum(_count_elements(name, each, parameter) for each in tensors)}
        | {"bytes": sum(map(count_bytes, tensors))}
        for name, value in states.items()
        if (tensors := _list_tensors(value))
    }


def _list_tensors(value: object) -> list[Tensor]:
    """Return the tensors of a state: itself, or those in a list of tensors, as LBFGS has one."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [each for each in values if isinstance(each, Tensor)]


def _count_elements(name: str, state: Tensor, parameter: Tensor) -> int:
    count, size = math.prod(state.shape), math.prod(parameter.shape)
    is_counter = name in COUNTERS or (count == 1 and size != 1)
    is_table = name.startswith(_TABLES) or not (state.is_floating_point() or count == size)
    return 0 if is_counter or is_table else count


def count_bytes(tensor: Any) -> int:
    """Return the number of bytes of a tensor: a DTensor's shards on all ranks, codes and scales.

    A tensor of a class of its own, such as a state in 8 bits of torchao, consists of others.
    """
    if is_sharded(tensor):
        local = to_local_tensor(tensor.detach())
        size = math.prod(local.shape)
        if not size:  # nothing of it lies on this rank
            return _count_plain(tensor)
        return int(count_bytes(local) * math.prod(tensor.shape) // size)
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(count_bytes(getattr(tensor, name)) for name in names)
    return _count_plain(tensor)


def _count_plain(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()
