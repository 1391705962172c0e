"""`ScaleState`: the largest magnitudes that scales follow from, and when they are taken again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from altgrad._messages import few
from altgrad.distributed.peers import Peers
from altgrad.measurement.step_record import StepRecord
from altgrad.quantization.format_set import FormatSet

STEPS_PER_SCALE = 100
"""Observed steps for which an amax holds, unless a weight is seen to exceed it."""


class ScaleState:
    """The amax of each whole parameter, kept from step to step.

    A scale that followed the weights in every step would hide whether they moved on the grid.

    Args:
        formats: The formats with their scaling.
    """

    def __init__(self, formats: FormatSet) -> None:
        self._formats = formats
        self._amax: dict[str, tuple[torch.Size, Tensor]] = {}
        self._steps_left = 0
        self._exceeded: set[str] = set()
        self._zero: set[str] = set()  # those that were 0 throughout, and set no scale

    def prepare(
        self, stepped: Callable[[], Mapping[str, Tensor]], peers: Peers, *, are_new: bool = False
    ) -> bool:
        """Take the amax that are due before an observed step; return whether any was.

        Due are all of them after 100 observed steps, and otherwise those of layers in which a
        weight exceeded its scale. All ranks that share the parameters call it at once.

        Args:
            stepped: Returns all layers that are measured, as they are before the step.
            peers: The ranks that share them.
            are_new: Whether to look for layers that are new or have another shape, too.
        """
        is_due = not self._steps_left or self._exceeded or are_new
        if not self._formats.needs_amax or not is_due:
            return False
        due = parameters = stepped()
        if self._steps_left:
            wanted = self._exceeded.union(self._unknown(parameters))
            due = {name: each for name, each in parameters.items() if name in wanted}
        self._take(due, peers)
        self._steps_left = self._steps_left or STEPS_PER_SCALE
        self._exceeded.clear()
        return True

    def look_at(self, parameters: Mapping[str, Tensor], peers: Peers) -> None:
        """Bring the amax of layers that are about to be measured to their devices.

        Args:
            parameters: The layers by name.
            peers: The ranks that share them.

        Raises:
            RuntimeError: One has changed its shape since `prepare`; its amax would have to be taken
                together with other ranks, who do not know.
        """
        if not self._formats.needs_amax:
            return
        if unknown := self._unknown(parameters):
            if peers.size > 1:
                raise RuntimeError(f"{few(unknown)} changed their shape since the step began")
            self._take({name: parameters[name] for name in unknown}, peers)
        for name, parameter in parameters.items():
            amax = self._amax[name][1]
            if amax.device != parameter.device:
                self._amax[name] = parameter.shape, amax.to(parameter.device)

    def amax(self, name: str) -> Tensor:
        """Return the amax of a layer: float32 or float64 (1), or (channels)."""
        return self._amax[name][1]

    def settle(self, stepped: Callable[[], Mapping[str, Tensor]], peers: Peers) -> bool:
        """Recompute the amax of all-zero layers from their weights after a step.

        Weights that stay 0 are looked at ever less often: after 1, 2, 4, 8, … observed steps.

        Args:
            stepped: Returns all layers that are measured, as they are after the step.
            peers: The ranks that share them.

        Returns:
            Whether any was due.
        """
        steps = STEPS_PER_SCALE - self._steps_left
        if not self._zero or steps & (steps - 1):
            return False
        # In the order of the parameters, which is that of all ranks; sets have one of their own.
        layers = {name: each for name, each in stepped().items() if name in self._zero}
        self._take(layers, peers, keep=True)
        return bool(layers)

    def step_observed(self, record: StepRecord) -> None:
        """Count it, and note the layers in which a weight exceeded its scale."""
        if not self._formats.needs_amax:
            return
        self._steps_left -= 1
        keys = [f"saturated_frac/{name}" for name in self._formats.fitted]
        if any(record.model.get(key, 0) > 0 for key in keys):
            layers = record.layers
            self._exceeded |= {
                name for name in layers if any(layers[name].get(key, 0) > 0 for key in keys)
            }

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on with the same scales."""
        return {
            "scaling": self._formats.scaling,
            "amax": {name: (tuple(shape), amax) for name, (shape, amax) in self._amax.items()},
            "steps_left": self._steps_left,
            "exceeded": sorted(self._exceeded),
            "zero": sorted(self._zero),
        }

    def description(self) -> dict[str, Any]:
        """Return `state_dict` with digests for tensors, which ranks can compare."""
        amax = {name: [*shape, _digest_of(each)] for name, (shape, each) in self._amax.items()}
        return self.state_dict() | {"amax": amax}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`; under another scaling all amax are taken anew."""
        self.__dict__ |= {"_amax": {}, "_steps_left": 0, "_exceeded": set(), "_zero": set()}
        if state["scaling"] != self._formats.scaling:
            return
        self._amax = {
            name: (torch.Size(shape), amax) for name, (shape, amax) in state["amax"].items()
        }
        # 0.1.0 counted below 0 in runs without a scale: then all are due.
        self._steps_left = max(state["steps_left"], 0)
        self._exceeded, self._zero = set(state["exceeded"]), set(state["zero"])

    def _unknown(self, parameters: Mapping[str, Tensor]) -> list[str]:
        """Return the layers of which no amax is known, or that of another shape, in their order."""
        nothing = None, None
        return [n for n, p in parameters.items() if self._amax.get(n, nothing)[0] != p.shape]

    def _take(self, parameters: Mapping[str, Tensor], peers: Peers, *, keep: bool = False) -> None:
        """Take the amax of these layers; with `keep` only those that are 0."""
        if not parameters:
            return
        each, has_zero = peers.amax(parameters, self._formats.scaling)
        for (name, parameter), new in zip(parameters.items(), each, strict=True):
            shape, known = self._amax.get(name, (None, new))
            is_kept = keep and shape == parameter.shape
            amax = torch.where(known == 0, new, known) if is_kept else new
            self._amax[name] = parameter.shape, amax
        pairs = zip(parameters.items(), has_zero, strict=True)
        zero = {name for (name, each), is_zero in pairs if is_zero and each.numel()}
        self._zero = self._zero - parameters.keys() | zero


def _digest_of(numbers: Tensor) -> str:
    return sha256(repr(numbers.tolist()).encode()).hexdigest()[:16]
