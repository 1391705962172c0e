"""Record which parameters a recipe stores on the grid of a format, the set of its numbers.

A recipe such as `altgrad.WeightStorage` rounds weights after each step and registers them here. A
monitor asks here which layers are stored: their weights lie on the grid already, so that an update
that stalled shows as no update at all.

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
from altgrad.quantization.number_format import NumberFormat


class StoredState(NamedTuple):
    """A description of how a state of an optimizer was stored at the last step.

    Attributes:
        element: The format of a single element.
        scale: The scales, factors between stored numbers and values, float64, with a shape that
            broadcasts to that of the layer. None without scales.
    """

    element: FloatFormat
    scale: Tensor | None


class Stored(NamedTuple):
    """A description of how a layer is stored, by which a sample can be stored in the same way.

    Attributes:
        element: The format of a single weight; None if only states are stored.
        rounding: How weights are rounded after a step.
        compensation: ``"kahan"`` if rounding errors are kept and added to the next update; None
            otherwise.
        scale: A function that returns the scales after the last step, float64, with a shape that
            broadcasts to that of the layer; or None without scales.
        lost: A function that returns the rounding errors that are kept, bfloat16, with the shape of
            the layer; or None without compensation.
        states: How the optimizer's stored states are stored, by name. Each step replaces the items;
            the mapping is empty before the first step.
        state_formats: The formats of the states by name, known before the first step; ``"*"`` for
            all others.
        format: The format of the weights, such as a block format, of which `element` is the format
            of a single weight; None if only states are stored.
    """

    element: FloatFormat | None
    rounding: Literal["nearest_even", "stochastic"]
    compensation: Literal["kahan"] | None
    scale: Callable[[], Tensor | None]
    lost: Callable[[], Tensor | None]
    states: Mapping[str, StoredState] = MappingProxyType({})
    state_formats: Mapping[str, NumberFormat] = MappingProxyType({})
    format: NumberFormat | None = None

    def join(self, other: Stored) -> Stored:
        """Return the combination of both: one may store a layer's weights, the other its states."""
        first, second = (self, other) if self.element is not None else (other, self)
        return first._replace(
            states={**second.states, **first.states},
            state_formats={**second.state_formats, **first.state_formats},
        )

    def find_state_format(self, name: str) -> FloatFormat | None:
        """Return the format of one number of a state that is stored after each step, or None."""
        found = self.state_formats.get(name, self.state_formats.get("*"))
        return None if found is None else found.element


# For each optimizer, and each storage that registered something: the stored parameters. Weak keys
# keep no optimizer alive.
_stored: WeakKeyDictionary[Optimizer, dict[object, Mapping[Tensor, Stored]]]
_stored = WeakKeyDictionary()


def register_stored(optimizer: Optimizer, storage: object, layers: Mapping[Tensor, Stored]) -> None:
    """Record in which formats an object such as a `WeightStorage` keeps parameters of an optimizer.

    The object rounds weights or optimizer states to the formats' numbers after each step. A second
    call for the same optimizer and storage replaces the first.

    Args:
        optimizer: The torch optimizer that steps the parameters.
        storage: The object that stores the parameters, as an argument for `forget_stored`.
        layers: How each parameter is stored.
    """
    _stored.setdefault(optimizer, {})[storage] = layers


def forget_stored(storage: object) -> None:
    """Forget an object, such as a `WeightStorage`, that no longer rounds parameters to a format.

    Args:
        storage: The object that was given to `register_stored`, with the parameters that it rounds
            after each step.
    """
    for by_storage in _stored.values():
        by_storage.pop(storage, None)


def get_stored(optimizers: Iterable[Any]) -> dict[Tensor, Stored]:
    """Return in which formats, and by which rounding, parameters of optimizers are kept.

    An object such as a `WeightStorage` keeps them: after each step it rounds weights or optimizer
    states to the numbers of a format.

    Args:
        optimizers: Torch optimizers, or wrappers of Lightning, Fabric or accelerate.

    Returns:
        A `Stored` for each parameter that is kept in a format; other parameters are left out.
    """
    found: dict[Tensor, Stored] = {}
    for optimizer in map(unwrap, optimizers):
        for layers in _stored.get(optimizer, {}).values():
            for parameter, stored in layers.items():
                known = found.get(parameter)
                found[parameter] = stored if known is None else known.join(stored)
    return found


def get_stored_formats(optimizers: Iterable[Any]) -> dict[Tensor, FloatFormat]:
    """Return the formats to whose numbers weights are rounded after each step of optimizers.

    An object such as a `WeightStorage` rounds them.

    Args:
        optimizers: Torch optimizers, or wrappers of Lightning, Fabric or accelerate.

    Returns:
        The format of each parameter whose weights are stored; other parameters are left out.
    """
    return {
        parameter: stored.element
        for parameter, stored in get_stored(optimizers).items()
        if stored.element is not None
    }
