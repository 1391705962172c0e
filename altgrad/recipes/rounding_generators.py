"""`RoundingGenerators`: the random numbers of stochastic rounding, continued after a resume.

Read `rounding` first; `stored_states` comes next. `storage` owns the generators.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class RoundingGenerators:
    """The random number generators of stochastic rounding, one for each device.

    Each device begins with the same seed, so that ranks with replicas of a layer round alike.

    Args:
        seed: The seed of each generator.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generators: dict[str, torch.Generator] = {}
        self._loaded: dict[str, Tensor] = {}  # states that no generator has taken yet

    def get(self, device: torch.device) -> torch.Generator:
        """Return the generator of a device, creating it on first use.

        After `load_state_dict`, a new generator takes the loaded state of its device, or else the
        first one of the same type of device. A checkpoint that rank 0 writes has the state of
        ``cuda:0`` alone, and rank 1 must draw the same numbers on ``cuda:1``.
        """
        name = str(device)
        if name not in self._generators:
            generator = torch.Generator(device).manual_seed(self._seed)
            if (loaded := self._find_loaded(device)) is not None:
                generator.set_state(self._loaded.pop(loaded).cpu())
            self._generators[name] = generator
        return self._generators[name]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state of each generator, uint8 on the CPU, by name of the device."""
        return self._loaded | {name: each.get_state() for name, each in self._generators.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state_dict`; each device takes its state when it next needs a generator."""
        self._generators, self._loaded = {}, dict(state)

    def _find_loaded(self, device: torch.device) -> str | None:
        """Return the key in a loaded state from which a device continues; None if there is none."""
        alike = [name for name in self._loaded if torch.device(name).type == device.type]
        return str(device) if str(device) in alike else next(iter(alike), None)
