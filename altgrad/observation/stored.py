"""Record which parameters a recipe stores on the grid of a format.

A recipe such as `altgrad.WeightStorage` rounds weights after each step and registers them here. A
monitor asks here which layers are stored: their weights lie on the grid already, so that a stalled
update can no longer be seen.

This file stands alone. `altgrad.recipes.storage` fills it, and `altgrad.monitor` reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import Optimizer

from altgrad.observation.optimizers import unwrap
from altgrad.quantization.float_format import FloatFormat


class StoredState(NamedTuple):
    """A description of how the last step stored a state of an optimizer.

    Attributes:
        element: The format of a single element.
        scale: The scale of each element, float64, of a shape that broadcasts to that of the layer.
            None without scales.
    """

    element: FloatFormat
    scale: Tensor | None


class Stored(NamedTuple):
    """A description of how a layer is stored, with which a sample of it can be stored alike.

    Attributes:
        element: The format of a single weight; None if only states are stored.
        rounding: The way to round after a step.
        compensation: ``"kahan"`` if rounding errors are kept; None otherwise.
        scale: A function that returns the scale of each weight after the last step: float64, of a
            shape that broadcasts to that of the layer. None without scales.
        lost: A function that returns the rounding errors, bfloat16, the shape of the layer. None
            without compensation.
        states: How each stored state was stored by the last step, by its name. Steps replace the
            items; the mapping is empty before the first one.
    """

    element: FloatFormat | None
    rounding: Literal["nearest_even", "stochastic"]
    compensation: Literal["kahan"] | None
    scale: Callable[[], Tensor | None]
    lost: Callable[[], Tensor | None]
    states: Mapping[str, StoredState] = MappingProxyType({})


# By optimizer, then by the storage that registered them. Weak keys: no optimizer is kept alive.
_stored: WeakKeyDictionary[Optimizer, dict[object, Mapping[Tensor, Stored]]]
_stored = WeakKeyDictionary()


def register_stored(optimizer: Optimizer, storage: object, layers: Mapping[Tensor, Stored]) -> None:
    """Record how a storage keeps parameters of an optimizer.

    A second call for the same optimizer and storage replaces the first.

    Args:
        optimizer: The torch optimizer that steps the parameters.
        storage: The object that stores them; later the argument of `forget_stored`.
        layers: How each stored parameter is stored.
    """
    _stored.setdefault(optimizer, {})[storage] = layers


def forget_stored(storage: object) -> None:
    """Forget all parameters that a storage has registered."""
    for by_storage in _stored.values():
        by_storage.pop(storage, None)


def get_stored(optimizers: Iterable[Any]) -> dict[Tensor, Stored]:
    """Return the stored parameters of optimizers, and how each is stored.

    Args:
        optimizers: Torch optimizers, or wrappers of Lightning, Fabric or accelerate.

    Returns:
        A `Stored` for each stored parameter; parameters that are not stored are left out.
    """
    return {
        parameter: stored
        for optimizer in map(unwrap, optimizers)
        for layers in _stored.get(optimizer, {}).values()
        for parameter, stored in layers.items()
    }


def get_stored_formats(optimizers: Iterable[Any]) -> dict[Tensor, FloatFormat]:
    """Return the stored parameters of optimizers, with their formats.

    Args:
        optimizers: Torch optimizers, or wrappers of Lightning, Fabric or accelerate.

    Returns:
        The format of each parameter whose weights are stored; others are left out.
    """
    return {
        parameter: stored.element
        for parameter, stored in get_stored(optimizers).items()
        if stored.element is not None
    }
