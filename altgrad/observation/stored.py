"""Record which parameters a recipe stores on the grid of a format.

A recipe such as `altgrad.WeightStorage` rounds weights after each step and registers them here. A
monitor asks here which layers are stored: their weights lie on the grid already, so that a stalled
update can no longer be seen.

This file stands alone. `altgrad.recipes.storage` fills it, and `altgrad.monitor` reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import Optimizer

from altgrad.observation.optimizers import unwrap
from altgrad.quantization.float_format import FloatFormat

# By optimizer, then by the storage that registered them. Weak keys: no optimizer is kept alive.
_stored: WeakKeyDictionary[Optimizer, dict[object, Mapping[Tensor, FloatFormat]]]
_stored = WeakKeyDictionary()


def register_stored(
    optimizer: Optimizer, storage: object, formats: Mapping[Tensor, FloatFormat]
) -> None:
    """Record the formats in which a storage keeps parameters of an optimizer.

    A second call for the same optimizer and storage replaces the first.

    Args:
        optimizer: The torch optimizer that steps the parameters.
        storage: The object that stores them; later the argument of `forget_stored`.
        formats: The format of each stored parameter.
    """
    _stored.setdefault(optimizer, {})[storage] = formats


def forget_stored(storage: object) -> None:
    """Forget all parameters that a storage has registered."""
    for by_storage in _stored.values():
        by_storage.pop(storage, None)


def get_stored_formats(optimizers: Iterable[Any]) -> dict[Tensor, FloatFormat]:
    """Return the stored parameters of optimizers, with their formats.

    Args:
        optimizers: Torch optimizers, or wrappers of Lightning, Fabric or accelerate.

    Returns:
        The format of each stored parameter; parameters that are not stored are left out.
    """
    return {
        parameter: format
        for optimizer in map(unwrap, optimizers)
        for formats in _stored.get(optimizer, {}).values()
        for parameter, format in formats.items()
    }
