"""Find the hyperparameters that were changed from outside since the last step, for twins to follow.

Schedulers and users change the parameter groups of the *run's* optimizer, that of the training,
between steps. A twin, which steps a sample with a copy of the optimizer, must follow. Some
optimizers change their own groups within a step, such as the `k` of schedule-free ones. A twin's
own step makes these changes too. Other changes within a step, such as those of a hook, are copied.

Read `writes` first; `generators` comes next.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from altgrad.twins.optimizer_copy import NO_HYPERPARAMETERS, copy_value
from altgrad.twins.writes import UNCOUNTED, count_writes

Changes: TypeAlias = Mapping[int, Mapping[str, Any]]
"""New values of hyperparameters: by index of the parameter group, then by key such as ``lr``."""

_PLAIN = {float, int, bool, str, type(None)}
"""Types whose values are immutable, so that they are compared by value."""


class HyperparameterFollower:
    """A follower that finds which hyperparameters of one optimizer changed since `remember`.

    Tensors are compared by identity and by the number of writes that torch counts, so that no
    comparison waits for a device. A write through ``.data`` is therefore missed.

    Args:
        optimizer: The optimizer, to which a weak reference is kept.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._marks: list[dict[str, object]] = []
        self.remember()

    def remember(self) -> None:
        """Remember the hyperparameters as they are, for the next `find_changes`."""
        self._marks = [
            {key: value if type(value) in _PLAIN else _mark(value) for key, value in group.items()}
            for group in map(_without_parameters, self._get_groups())
        ]

    def find_changes(self) -> Changes:
        """Return the hyperparameters that have changed since `remember`.

        Returns:
            Copies of the new values by key, for each changed group by its index. For a group that
            is new, these are all its hyperparameters.
        """
        changes = {}
        for number, group in enumerate(map(_without_parameters, self._get_groups())):
            marks = self._marks[number] if number < len(self._marks) else {}
            changed = {
                key: copy_value(value)
                for key, value in group.items()
                if key not in marks or not _is_same(marks[key], value)
            }
            if changed:
                changes[number] = changed
        return changes

    def _get_groups(self) -> list[dict[str, Any]]:
        optimizer = self._optimizer()
        assert optimizer is not None, "whoever steps an optimizer holds it"
        return optimizer.param_groups


def apply_changes(changes: Changes, twin: Optimizer, numbers: Sequence[int]) -> None:
    """Set changed hyperparameters of the training in the groups of a twin's optimizer.

    A *twin* is a sample of the training's weights that an optimizer of its own steps.

    A tensor is filled in place, because a compiled step, or one captured in a CUDA graph, goes on
    reading the same tensor.

    Args:
        changes: The changes by index of the group in the training's optimizer.
        twin: The twin's optimizer.
        numbers: For each group of `twin`, the index of its group in the training's optimizer.
    """
    if not changes:
        return
    for number, group in zip(numbers, twin.param_groups, strict=True):
        for key, value in changes.get(number, {}).items():
            set_option(group, key, value)


def find_unmade(changes: Changes, twin: Optimizer, numbers: Sequence[int]) -> Changes:
    """Return the hyperparameter changes that a twin's optimizer has not made in its own step.

    A *twin* is a sample of the training's weights that an optimizer of its own steps.

    Args:
        changes: What changed in the groups of the training's optimizer while it stepped.
        twin: The twin's optimizer, after the same step.
        numbers: For each group of `twin`, the index of its group in the training's optimizer.

    Returns:
        The changes whose values the twin does not have: those of hooks, such as a schedule.
    """
    unmade: dict[int, dict[str, Any]] = {}
    for number, group in zip(numbers, twin.param_groups, strict=True):
        for key, value in changes.get(number, {}).items():
            if key not in group or not is_equal(group[key], value):
                unmade.setdefault(number, {})[key] = value
    return unmade


def is_equal(one: Any, other: Any) -> bool:
    """Return True if two values of a hyperparameter are equal; False if that cannot be told.

    Args:
        one: A value of any type.
        other: Another value; a tensor on another device is copied to that of `one`.
    """
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other.to(one.device))
    try:
        return type(one) is type(other) and bool(one == other)
    except Exception:  # noqa: BLE001 - a comparison of the user's values may fail in any way
        return False


def set_option(group: dict[str, Any], key: str, value: Any) -> None:
    """Set a hyperparameter in a parameter group to a copy of a value; fill a tensor in place.

    Args:
        group: The group, a dict of ``optimizer.param_groups``.
        key: Name of the hyperparameter.
        value: Its value.
    """
    old = group.get(key)
    if isinstance(value, Tensor) and isinstance(old, Tensor) and old.shape == value.shape:
        old.detach().copy_(value)
    else:
        group[key] = copy_value(value)


def copy_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return copies of the hyperparameters of a parameter group, without parameters and names."""
    return {key: copy_value(value) for key, value in _without_parameters(group).items()}


class _Mark:
    """A note of which object a value is, and of the number of writes to it if it is a tensor.

    Two notes are equal if the object is the same and no write came in between.

    The note keeps the object alive, since a new object may get the address of one that is gone.

    Args:
        value: The object.
    """

    __slots__ = ("value", "writes")

    def __init__(self, value: object) -> None:
        self.value = value
        self.writes = count_writes(value) if isinstance(value, Tensor) else 0

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Mark)
            and self.value is other.value
            and self.writes == other.writes != UNCOUNTED
        )

    __hash__ = None  # type: ignore[assignment]


def _mark(value: object) -> object:
    """Return a key for a hyperparameter value, equal to a later key only if nothing has changed.

    Plain values are their own keys. Tuples, lists and dicts have the keys of their items; any other
    object has a `_Mark` of its identity.
    """
    if type(value) in _PLAIN:
        return value
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(_mark, value))
    if isinstance(value, dict):
        return dict, tuple((key, _mark(each)) for key, each in value.items())
    return _Mark(value)


def _is_same(mark: object, value: object) -> bool:
    """Return True if a value has not changed since `_mark` made the key `mark` of it.

    Plain values are compared without a new key.
    """
    if type(value) in _PLAIN:
        return mark is value or (type(mark) in _PLAIN and mark == value)
    return mark == _mark(value)


def _without_parameters(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in NO_HYPERPARAMETERS}
