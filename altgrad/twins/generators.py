"""`PrivateGenerators`: let a twin's optimizer draw random numbers without changing the training's.

Optimizers that round at random draw from the global generators of torch, Python and NumPy, and so
does the copy of such an optimizer that steps a twin. Inside `PrivateGenerators.using`, the global
generators are in private states, which continue from call to call. Outside, the training draws as
if there were no twin.

Read `hyperparameters` first; `isolation` comes next.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer


def may_draw(kind: type[Optimizer]) -> bool:
    """Return True if an optimizer may draw random numbers: true of all but those of `torch.optim`.

    Args:
        kind: The class of the optimizer.
    """
    return not f"{kind.__module__}.".startswith("torch.optim.")


class PrivateGenerators:
    """A set of private states for the global random generators of torch, Python and NumPy.

    Generators of devices have states, too. While the private states are in use, another thread
    would draw from them, too.

    Args:
        seed: The seed of all private states.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed % 2**32  # the largest that NumPy takes
        self._states: dict[str, Any] = {}

    @contextmanager
    def using(self, devices: Sequence[torch.device]) -> Iterator[None]:
        """Let global generators draw from the private states inside a ``with`` block.

        On exit, also by an exception, the generators get the states back that they had before.
        What was drawn inside has advanced only the private states.

        Args:
            devices: The devices whose generators may be drawn from, beside the CPU.
        """
        keys = _name_generators(devices)
        for key in keys.keys() - self._states.keys():
            self._states[key] = _make(key, keys[key], self._seed)
        outside = {key: _read(key, device) for key, device in keys.items()}
        try:
            for key, device in keys.items():
                _write(key, device, self._states[key])
            yield
        finally:
            for key, device in keys.items():
                self._states[key] = _read(key, device)
                _write(key, device, outside[key])

    def state_dict(self) -> dict[str, Any]:
        """Return the private states, with which a resumed run draws the same numbers.

        Returns:
            A dict of plain data and uint8 tensors; empty if `using` was never entered.
        """
        return {key: _pack(state) for key, state in self._states.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the private states from a `state_dict`.

        Args:
            state: A result of `state_dict`.
        """
        self._states = {key: _unpack(packed) for key, packed in state.items()}


_PYTHON, _NUMPY = "python", "numpy"


def _name_generators(devices: Sequence[torch.device]) -> dict[str, torch.device | None]:
    """Return the generators by a name of each: the device, or None for Python's and NumPy's.

    Devices are numbered from 0, since a resumed run may have other indices.
    """
    names: dict[str, torch.device | None] = {
        _PYTHON: None,
        _NUMPY: None,
        "cpu": torch.device("cpu"),
    }
    others = [device for device in devices if device.type not in ("cpu", "meta")]
    for number, device in enumerate(others):
        names[f"{device.type} {number}"] = device
    return names


def _make(name: str, device: torch.device | None, seed: int) -> Any:
    """Return the state of a new generator with a seed: Python's, NumPy's, or that of a device."""
    if name == _PYTHON:
        return random.Random(seed).getstate()  # noqa: S311 - no secret
    if name == _NUMPY:
        # The program may have replaced the kind of the global generator.
        kind = type(np.random.get_bit_generator())  # type: ignore[attr-defined]  # has no stub
        return np.random.RandomState(kind(seed)).get_state(legacy=False)
    assert device is not None
    return torch.Generator(device).manual_seed(seed).get_state()


def _read(name: str, device: torch.device | None) -> Any:
    if name == _PYTHON:
        return random.getstate()
    if name == _NUMPY:
        return np.random.get_state(legacy=False)  # noqa: NPY002 - the generator that others use
    assert device is not None
    if device.type == "cpu":
        return torch.get_rng_state()
    return torch.get_device_module(device).get_rng_state(device)


def _write(name: str, device: torch.device | None, state: Any) -> None:
    if name == _PYTHON:
        random.setstate(state)
    elif name == _NUMPY:
        np.random.set_state(state)  # noqa: NPY002 - the generator that others use
    elif device is not None and device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


def _pack(state: Any) -> Any:
    """Return a generator's state with each NumPy array as a list of dtype name and uint8 tensor.

    ``torch.load(weights_only=True)`` accepts that, but no arrays.
    """
    if isinstance(state, dict):
        return {key: _pack(each) for key, each in state.items()}
    if isinstance(state, np.ndarray):
        return [state.dtype.name, torch.from_numpy(state.view(np.uint8).copy())]
    return state


def _unpack(packed: Any) -> Any:
    """Return a generator's state with NumPy arrays again, from the result of `_pack`."""
    if isinstance(packed, dict):
        return {key: _unpack(each) for key, each in packed.items()}
    if isinstance(packed, list):
        dtype, numbers = packed
        return numbers.numpy().view(dtype).copy()
    return packed
