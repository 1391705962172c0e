"""Which parameters of which optimizers are stored on the grid of a format.

Whoever stores weights registers them here, so that a monitor knows that updates which stall there
are no longer there to see.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import Optimizer

from altgrad.observation.optimizers import unwrap
from altgrad.quantization.float_format import FloatFormat

_stored: WeakKeyDictionary[Optimizer, dict[object, Mapping[Tensor, FloatFormat]]]
_stored = WeakKeyDictionary()


def register_stored(
    optimizer: Optimizer, storage: object, formats: Mapping[Tensor, FloatFormat]
) -> None:
    """Note in which format `storage` keeps each parameter that the optimizer steps."""
    _stored.setdefault(optimizer, {})[storage] = formats


def forget_stored(storage: object) -> None:
    """Forget all that `storage` has registered."""
    for by_storage in _stored.values():
        by_storage.pop(storage, None)


def stored_formats(optimizers: Iterable[Any]) -> dict[Tensor, FloatFormat]:
    """Return the parameters of some optimizers that are stored, and the format of the elements."""
    return {
        parameter: format
        for optimizer in map(unwrap, optimizers)
        for formats in _stored.get(optimizer, {}).values()
        for parameter, format in formats.items()
    }
