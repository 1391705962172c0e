"""`ScaleState`: keep the amax of each layer, and decide when it is computed again.

The scale of a format is computed from an amax. If the scale followed the weights at every step, it
would hide whether the weights moved on the grid. An amax is therefore kept for 100 observed steps.
It is computed again earlier if a weight rounds beyond the largest scaled value, or if it was 0,
which sets no scale.

A scale of nvfp4 also depends on the amax of the whole tensor, which is kept in the same way. If a
measured weight exceeds this amax, the amax is raised for that step alone.

`engine` comes next and measures under the scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from altgrad._messages import few
from altgrad.distributed.peers import Peers
from altgrad.measurement.step_record import StepRecord
from altgrad.quantization.devices import find_exact_device, move_to_exact_device
from altgrad.quantization.format_set import FormatSet
from altgrad.quantization.scale_groups import Amaxes

STEPS_PER_SCALE = 100
"""Number of observed steps for which a layer's amax is kept.

An amax is the largest finite magnitude of a tensor, from which scales of formats follow. An amax is
computed again earlier if it is 0 or a weight is clipped.
"""


class ScaleState:
    """The amax of each layer, or of each channel (slice along dimension 0), kept between steps.

    An amax is the largest finite magnitude of a tensor, from which scales of formats follow.

    Args:
        formats: The formats with their scaling.

    Attributes:
        scaling: Which elements share an amax scale, as in `altgrad.measure`.
    """

    def __init__(self, formats: FormatSet) -> None:
        self.scaling = formats.scaling
        self._formats = formats
        self._amaxes: dict[str, tuple[torch.Size, Amaxes]] = {}
        self._steps_left = 0
        self._exceeded: set[str] = set()  # layers with a weight that was clipped
        self._zero: set[str] = set()  # layers with an amax of 0, be it of one channel

    def prepare(
        self, stepped: Callable[[], Mapping[str, Tensor]], peers: Peers, *, are_new: bool = False
    ) -> bool:
        """Recompute the largest magnitudes (amaxes) of layers for which this is due, before a step.

        Every 100 observed steps, the amax of every layer is due. In between, it is due for layers
        with a weight that was clipped, because the weight became larger than its scale allows. All
        ranks that share the parameters call this method together.

        Args:
            stepped: Callback that returns all measured layers by name, before the step.
            peers: The ranks that share the parameters.
            are_new: True if there may be layers that are new or have a new shape. The amax of these
                layers is then due, too.

        Returns:
            True if an amax was computed.
        """
        is_due = not self._steps_left or self._exceeded or are_new
        if not self._formats.needs_amax or not is_due:
            return False
        due = parameters = stepped()
        if self._steps_left:
            wanted = self._exceeded.union(self._unknown(parameters) if are_new else ())
            due = {name: each for name, each in parameters.items() if name in wanted}
        self._take(due, peers)
        self._steps_left = self._steps_left or STEPS_PER_SCALE
        self._exceeded.clear()
        return True

    def begin(self, parameters: Mapping[str, Tensor], peers: Peers) -> None:
        """Compute the amax (largest magnitude) of layers that have none, on all ranks together.

        All ranks that share the parameters call this method between two steps.

        Args:
            parameters: Parameters of the layers by name, in the same order on every rank.
            peers: The ranks that share the parameters.
        """
        if self._formats.needs_amax:
            self._take({name: parameters[name] for name in self._unknown(parameters)}, peers)

    def ensure_amax(self, parameters: Mapping[str, Tensor], peers: Peers) -> None:
        """Compute the amax (largest magnitude) of layers that have none, where layers are measured.

        Args:
            parameters: Parameters of the layers, by name.
            peers: The ranks that share the parameters.

        Raises:
            RuntimeError: A sharded layer has changed its shape since `prepare`. Its amax would have
                to be taken together with the other ranks, which do not wait for it.
        """
        if not self._formats.needs_amax:
            return
        if unknown := self._unknown(parameters):
            if peers.size > 1:
                raise RuntimeError(
                    f"{few(unknown)} changed their shape during the step: reshape sharded "
                    "parameters between steps"
                )
            self._take({name: parameters[name] for name in unknown}, peers)
        for name, parameter in parameters.items():
            amaxes, device = self._amaxes[name][1], find_exact_device(parameter.device)
            if amaxes.groups.device != device:
                moved = Amaxes(*(each.to(device) for each in amaxes))
                self._amaxes[name] = parameter.shape, moved

    def has_amax(self, name: str, parameter: Tensor) -> bool:
        """Return True if the amax (largest magnitude) of a layer is known, or no format needs it.

        Args:
            name: Name of the layer.
            parameter: Its parameter, whose shape may have changed.
        """
        return not self._formats.needs_amax or not self._unknown({name: parameter})

    def amaxes(self, name: str) -> Amaxes:
        """Return the largest magnitudes of a layer and its channels, float32 or float64."""
        return self._amaxes[name][1]

    def settle(self, stepped: Callable[[], Mapping[str, Tensor]], peers: Peers) -> bool:
        """Recompute each amax (largest magnitude) that is 0, after an observed step.

        An amax of 0 sets no scale. Layers that stay 0 are read less and less often: in the 1st,
        2nd, 3rd, 5th, 9th, … observed step after `prepare` has computed all amaxes.

        Args:
            stepped: Callback that returns all measured layers by name, after the step.
            peers: The ranks that share the parameters.

        Returns:
            True if a layer was due.
        """
        steps = STEPS_PER_SCALE - self._steps_left
        if not self._zero or steps & (steps - 1):  # 0 for powers of two: 0b1000 & 0b0111
            return False
        # In the order of the parameters, which is equal on all ranks. The order of a set is not.
        layers = {name: each for name, each in stepped().items() if name in self._zero}
        self._take(layers, peers, keep=True)
        return bool(layers)

    def step_observed(self, record: StepRecord) -> None:
        """Count an observed step, and note layers with clipped weights, for `prepare`."""
        if not self._formats.needs_amax:
            return
        self._steps_left -= 1
        keys = [f"saturated_frac/{name}" for name in self._formats.fitted]
        # Look at the model's figure first: to read the figures of each layer takes longer.
        if any(record.model.get(key, 0) > 0 for key in keys):
            layers = record.layers
            self._exceeded |= {
                name for name in layers if any(layers[name].get(key, 0) > 0 for key in keys)
            }

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs to keep its scales.

        Returns:
            A dict of plain data and tensors, among them the amax (largest magnitude) of each layer.
        """
        each = self._amaxes
        return {
            "scaling": self._formats.scaling,
            "amax": {name: (tuple(s), amaxes.groups) for name, (s, amaxes) in each.items()},
            "tensor_amax": {n: a.layers for n, (_, a) in each.items() if len(a.groups) != 1},
            "steps_left": self._steps_left,
            "exceeded": sorted(self._exceeded),
            "zero": sorted(self._zero),
        }

    def description(self) -> dict[str, Any]:
        """Return `state_dict` with hashes in place of tensors, for ranks to compare.

        Returns:
            A dict of plain data.
        """
        state = self.state_dict()
        amax = {name: [*s, _hash_numbers(each)] for name, (s, each) in state["amax"].items()}
        layers = {name: _hash_numbers(each) for name, each in state["tensor_amax"].items()}
        return state | {"amax": amax, "tensor_amax": layers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a result of `state_dict`.

        If the scaling was another one, every amax (largest magnitude) is computed again before the
        next observed step.
        """
        self.__dict__ |= {"_amaxes": {}, "_steps_left": 0, "_exceeded": set(), "_zero": set()}
        if state["scaling"] != self._formats.scaling:
            return
        # Layers with several channels also have an amax of the whole layer. Version 0.1.0 did not
        # save it.
        layers = state.get("tensor_amax", {})
        for name, (shape, groups) in state["amax"].items():
            amaxes = Amaxes.from_groups(groups)
            amaxes = amaxes._replace(layers=layers.get(name, amaxes.layers))
            self._amaxes[name] = torch.Size(shape), amaxes
        # Version 0.1.0 counted below 0 in runs without a scale. 0 makes each amax due.
        self._steps_left = max(state["steps_left"], 0)
        self._exceeded, self._zero = set(state["exceeded"]), set(state["zero"])

    def _unknown(self, parameters: Mapping[str, Tensor]) -> list[str]:
        """Return the names of layers with no amax (largest magnitude), or one of another shape."""
        nothing = None, None
        return [n for n, p in parameters.items() if self._amaxes.get(n, nothing)[0] != p.shape]

    def _take(self, parameters: Mapping[str, Tensor], peers: Peers, *, keep: bool = False) -> None:
        """Compute the amax (largest magnitude) of layers; with `keep`, only where it is 0."""
        if not parameters:
            return
        each, has_zero = peers.amax(parameters, self._formats.scaling)
        each = move_to_exact_device(each)
        for (name, parameter), groups in zip(parameters.items(), each, strict=True):
            new = Amaxes.from_groups(groups)
            shape, known = self._amaxes.get(name, (None, new))
            is_kept = keep and shape == parameter.shape
            self._amaxes[name] = parameter.shape, known.fill_zeros(new) if is_kept else new
        pairs = zip(parameters.items(), has_zero, strict=True)
        zero = {name for (name, each), is_zero in pairs if is_zero and each.numel()}
        self._zero = self._zero - parameters.keys() | zero


def _hash_numbers(numbers: Tensor) -> str:
    """Hash the numbers of a tensor; equal numbers give equal hashes on every rank."""
    return sha256(repr(numbers.tolist()).encode()).hexdigest()[:16]
