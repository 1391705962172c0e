"""`Updates` and `WAYS`: which updates stall where a `WeightStorage` stores the weights.

Nothing here is part of `predict_and_confirm`; `benchmarks.calibration` counts stalls with it.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor, nn

from altgrad import WeightStorage

WAYS: dict[str, dict[str, Any]] = {
    "nearest": {},
    "stochastic": {"rounding": "stochastic"},
    "kahan": {"compensation": "kahan"},
}


class Updates:
    """A count of the updates that a `WeightStorage` makes stall, by hooks before and after it.

    Args:
        module: The module that is trained.
    """

    def __init__(self, module: nn.Module) -> None:
        self.parameters = dict(module.named_parameters())
        self.stalls: list[dict[str, tuple[int, int]]] = []
        """For each step and layer, the number of stalled updates and of updates other than 0."""
        self._had_update = {name: torch.zeros_like(p).bool() for name, p in self._named()}
        self._moved = {name: torch.zeros_like(p).bool() for name, p in self._named()}

    def attach(self, optimizer: torch.optim.Optimizer, storage: WeightStorage) -> None:
        """Attach a storage to an optimizer, with hooks that count what it does to updates.

        Args:
            optimizer: The optimizer.
            storage: The storage, which rounds the weights after each step.
        """
        # Hooks are called in the order in which they are registered.
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._before_storing)
        storage.attach(optimizer)
        optimizer.register_step_post_hook(self._after_storing)

    def stall(self, layer: str | None = None) -> float:
        """Return the mean over steps of the share of updates that stalled.

        Args:
            layer: Name of the layer; None for the whole model.
        """
        return statistics.fmean(
            sum(stalled for stalled, _ in counts) / max(sum(updates for _, updates in counts), 1)
            for counts in (
                [*step.values()] if layer is None else [step[layer]] for step in self.stalls
            )
        )

    def never_moved(self, layer: str | None = None) -> float:
        """Return the share of weights that no step moved, among those with updates other than 0.

        Args:
            layer: Name of the layer; None for the whole model.
        """
        layers = [*self.parameters] if layer is None else [layer]
        had = sum(self._had_update[name].sum().item() for name in layers)
        still = sum((self._had_update[n] & ~self._moved[n]).sum().item() for n in layers)
        return still / max(had, 1)

    def _named(self) -> list[tuple[str, Tensor]]:
        return [(name, p.detach()) for name, p in self.parameters.items()]

    def _before_step(self, *_: object) -> None:
        self._stored = {name: p.clone() for name, p in self._named()}

    def _before_storing(self, *_: object) -> None:
        self._is_update = {name: p != self._stored[name] for name, p in self._named()}

    def _after_storing(self, *_: object) -> None:
        counts = {}
        for name, p in self._named():
            moved = p != self._stored[name]
            is_update = self._is_update[name]
            counts[name] = (int((is_update & ~moved).sum()), int(is_update.sum()))
            self._had_update[name] |= is_update
            self._moved[name] |= moved
        self.stalls.append(counts)
