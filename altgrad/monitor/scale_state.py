"""`ScaleState`: the largest magnitudes that scales follow from, and when they are taken again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from altgrad.measurement.step_record import StepRecord
from altgrad.quantization.format_set import FormatSet
from altgrad.quantization.scale_groups import layer_amax_of_each

STEPS_PER_SCALE = 100
"""Observed steps for which an amax holds, unless a weight is seen to exceed it."""


Take = Callable[[Mapping[str, Tensor]], tuple[Sequence[Tensor], Sequence[bool]]]
"""From parameters by name to what `layer_amax_of_each` gives."""


class ScaleState:
    """The amax of each layer, of the whole parameter, as it was when last looked at.

    A scale that moved with the weights in every step would hide whether they moved on the grid.

    Args:
        formats: The formats with their scaling.
    """

    def __init__(self, formats: FormatSet) -> None:
        self._scaling = formats.scaling
        self._is_needed = formats.needs_amax
        self._fitting = formats.fitted
        self._taken_by: Take = self._take_here
        self._is_shared = False
        self._amax: dict[str, tuple[torch.Size, Tensor]] = {}
        self._steps_left = 0
        self._exceeded: set[str] = set()
        self._zero: set[str] = set()  # those that were 0 throughout, and set no scale

    @property
    def is_due(self) -> bool:
        """Whether some are to be taken before the next observed step."""
        return self._is_needed and (self._steps_left == 0 or bool(self._exceeded))

    @property
    def has_zero(self) -> bool:
        """Whether there are layers that `settle` is for."""
        return bool(self._zero)

    def share(self, take: Take) -> None:
        """From now on, take them together with the processes that share the parameters."""
        self._taken_by, self._is_shared = take, True

    def look_at(self, name: str, parameter: Tensor) -> None:
        """Take the amax of a layer that is new, or has another shape, or is elsewhere now.

        Raises:
            RuntimeError: It is to be taken together with others, who take theirs between steps.
        """
        shape, amax = self._amax.get(name, (None, None))
        if not self._is_needed:
            return
        if amax is None or shape != parameter.shape:
            if self._is_shared:
                raise RuntimeError(f"{name} has got another shape since the step began")
            self._take({name: parameter})
        elif amax.device != parameter.device:
            self._amax[name] = parameter.shape, amax.to(parameter.device)

    def look_for(self, parameters: Mapping[str, Tensor]) -> None:
        """Have those of which nothing is known taken with the next that are due, all at once."""
        if self._is_needed and self._steps_left:
            self._exceeded |= {
                name
                for name, parameter in parameters.items()
                if name not in self._amax or self._amax[name][0] != parameter.shape
            }

    def amax(self, name: str) -> Tensor:
        """That of a layer that was looked at, (1), or those of its channels."""
        return self._amax[name][1]

    def refresh(self, parameters: Mapping[str, Tensor]) -> None:
        """Take those that are due, from all layers as they are before an observed step."""
        wanted: Iterable[str] = parameters if self._steps_left == 0 else self._exceeded
        self._take({name: parameters[name] for name in wanted if name in parameters})
        if self._steps_left == 0:
            self._steps_left = STEPS_PER_SCALE
        self._exceeded.clear()

    def settle(self, parameters: Mapping[str, Tensor]) -> bool:
        """Take those that were 0 from what the step made of them; whether there were any.

        Weights that stay 0 are looked at ever less often: after 1, 2, 4, 8, … observed steps.
        """
        steps = STEPS_PER_SCALE - self._steps_left
        layers = {name: parameters[name] for name in self._zero if name in parameters}
        if not layers or steps & (steps - 1):
            return False
        self._take(layers, keep=True)
        return True

    def step_observed(self, record: StepRecord) -> None:
        """Count it, and note the layers in which a weight exceeded its scale."""
        if not self._is_needed:
            return
        self._steps_left -= 1
        keys = [f"saturated_frac/{name}" for name in self._fitting]
        if any(record.model.get(key, 0) > 0 for key in keys):
            layers = record.layers
            self._exceeded |= {
                name for name in layers if any(layers[name].get(key, 0) > 0 for key in keys)
            }

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same scales."""
        return {
            "scaling": self._scaling,
            "amax": {name: (tuple(shape), amax) for name, (shape, amax) in self._amax.items()},
            "steps_left": self._steps_left,
            "exceeded": sorted(self._exceeded),
            "zero": sorted(self._zero),
        }

    def description(self) -> dict[str, Any]:
        """The same in short, for processes that have to have it alike: digests for tensors."""
        amax = {name: [*shape, _digest_of(each)] for name, (shape, each) in self._amax.items()}
        return self.state_dict() | {"amax": amax}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The reverse; under another scaling all are taken anew."""
        self.__dict__ |= {"_amax": {}, "_steps_left": 0, "_exceeded": set(), "_zero": set()}
        if state["scaling"] != self._scaling:
            return
        self._amax = {
            name: (torch.Size(shape), amax) for name, (shape, amax) in state["amax"].items()
        }
        # 0.1.0 counted below 0 in runs without a scale: then all are due.
        self._steps_left = max(state["steps_left"], 0)
        self._exceeded, self._zero = set(state["exceeded"]), set(state["zero"])

    def _take_here(
        self, parameters: Mapping[str, Tensor]
    ) -> tuple[Sequence[Tensor], Sequence[bool]]:
        return layer_amax_of_each([*parameters.values()], self._scaling)

    def _take(self, parameters: Mapping[str, Tensor], *, keep: bool = False) -> None:
        """Take them, or `keep` those that are not 0."""
        each, has_zero = self._taken_by(parameters)
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
