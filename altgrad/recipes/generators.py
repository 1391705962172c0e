"""Random numbers for twins whose optimizers draw from the global generators.

Inside `PrivateGenerators.using`, the global generators are in a state of the twin's own, which
continues from call to call. Outside, the streams of the training are as if there were no twin.
`twin` comes next and steps its optimizer inside.
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
    """Return True if an optimizer may draw random numbers: all may but those of torch itself.

    Args:
        kind: The class of the optimizer.
    """
    return not f"{kind.__module__}.".startswith("torch.optim.")


class PrivateGenerators:
    """Private states of the global generators of torch, Python and NumPy.

    Draws that another thread makes at the same time come from the private states, too.

    Args:
        seed: The seed of all of them.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed % 2**32  # the largest that NumPy takes
        self._states: dict[str, Any] = {}

    @contextmanager
    def using(self, devices: Sequence[torch.device]) -> Iterator[None]:
        """Put the global generators into the private states for a while.

        The states of before return after an exception, too.

        Args:
            devices: The devices whose generators may be used. The CPU's always is.
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
        """Return the states that a resumed run needs to draw on exactly.

        Returns:
            A dict of plain data and uint8 tensors. It is empty if nothing was drawn yet.
        """
        return {key: _pack(state) for key, state in self._states.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`.

        Args:
            state: A result of `state_dict`.
        """
        self._states = {key: _unpack(packed) for key, packed in state.items()}


_PYTHON, _NUMPY = "python", "numpy"


def _name_generators(devices: Sequence[torch.device]) -> dict[str, torch.device | None]:
    """Return all generators by name, with their devices; names hold in a resumed run, too."""
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
    """Return the state of a new generator; a device's depends on the seed alone."""
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
    """Return a state without arrays: their bytes are tensors, beside the name of the dtype."""
    if isinstance(state, dict):
        return {key: _pack(each) for key, each in state.items()}
    if isinstance(state, np.ndarray):
        return [state.dtype.name, torch.from_numpy(state.view(np.uint8).copy())]
    return state


def _unpack(packed: Any) -> Any:
    """Return a state with its arrays."""
    if isinstance(packed, dict):
        return {key: _unpack(each) for key, each in packed.items()}
    if isinstance(packed, list):
        dtype, numbers = packed
        return numbers.numpy().view(dtype).copy()
    return packed
