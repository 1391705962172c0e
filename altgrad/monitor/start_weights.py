"""`StartWeights`: find which share of a run's weights differs from the start, without twins.

Weights in 16 bits may stand still for ever, or move at some steps only, as with stochastic rounding
or Kahan summation. A figure of single steps is 1 for all of these. The share that differs from the
start tells them apart: ``moved_since_start_frac/now``, where *now* stands for the run itself.

With recipes, *twins* have this figure: samples of the layers that are stepped as recipes say.

Read `twin_layers` first, which draws the sample; `run_samples` comes next.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.optim import Optimizer

from altgrad.measurement.catalogue import NOW
from altgrad.measurement.numbers import Numbers
from altgrad.measurement.twin_parts import TwinPart, TwinShare
from altgrad.measurement.twin_sums import TwinStack, measure_alone
from altgrad.observation.stored import get_stored_formats
from altgrad.quantization.devices import find_exact_device, gather, move_to_exact_device
from altgrad.twins.twin_source import TwinSource

_LOW = (torch.float16, torch.bfloat16)


class _Start(NamedTuple):
    """The sampled weights of a layer at the start.

    Attributes:
        indices: Their places in the flattened layer, int64 (elements) on its device.
        weights: The weights, (elements) in the dtype of the layer; on its device, or on the CPU if
            that lacks float64.
        elements: Number of elements of the whole layer.
    """

    indices: Tensor
    weights: Tensor
    elements: int


class _Group(NamedTuple):
    """The layers on one device, and how many of their sampled weights moved.

    Attributes:
        names: Names of the layers.
        starts: Their weights at the start.
        values: Result of `measure_alone`, float64 (layers, 1, columns).
    """

    names: Sequence[str]
    starts: Sequence[_Start]
    values: Tensor


class StartWeights:
    """The weights of each layer at the start, to find later how many have moved since.

    Only layers in 16 bits, and those that a `WeightStorage` rounds, are kept: nearly all weights of
    others differ from the start after a step. A layer that an optimizer gets later begins just
    before its first observed step, so that figures of the model join layers of different starts.

    Args:
        source: The layers and their samples.
    """

    def __init__(self, source: TwinSource) -> None:
        self._source = source
        self._starts: dict[str, _Start] = {}

    @torch.no_grad()
    def begin(self, optimizers: Sequence[Optimizer]) -> None:
        """Keep a sample of the weights of each layer that has none so far.

        Layers that several ranks share are left out.

        Args:
            optimizers: The optimizers that step the layers.
        """
        stored = get_stored_formats(optimizers)
        new: dict[str, tuple[Tensor, Tensor]] = {}
        for optimizer in optimizers:
            for name, parameter in self._source.find_stepped(optimizer):
                is_low = parameter.dtype in _LOW or parameter in stored
                is_known = name in self._starts and self._starts[name].elements == parameter.numel()
                if is_low and not is_known and self._can_sample(name, parameter):
                    indices = self._source.draw(name, parameter.shape, 1).to(parameter.device)
                    new[name] = parameter.detach(), indices
        if not new:
            return
        weights = _gather(new.values())
        for (name, (parameter, indices)), own in zip(new.items(), weights, strict=True):
            self._starts[name] = _Start(indices, own, parameter.numel())

    @torch.no_grad()
    def measure(self, optimizer: Optimizer, names: Collection[str]) -> list[_Group]:
        """Compare the weights of an optimizer's layers with those at the start, on their devices.

        Args:
            optimizer: The optimizer, which has just stepped.
            names: Names of the layers to measure.

        Returns:
            The result for each device, for `read`. Empty if several ranks share the layers, as in a
            run that goes on from the state of one process.
        """
        if not self._starts or self._source.is_shared:
            return []
        by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
        for name, parameter in self._source.find_stepped(optimizer):
            start = self._starts.get(name)
            if name in names and start is not None and start.elements == parameter.numel():
                by_device.setdefault(parameter.device, []).append((name, parameter.detach()))
        return [self._compare(layers) for layers in by_device.values()]

    def read(self, groups: Sequence[_Group], numbers: Sequence[Numbers]) -> TwinShare:
        """Return the sums from which figures follow.

        Args:
            groups: Result of `measure`.
            numbers: The `values` of each group, on the host; empty after an error.
        """
        if not numbers:
            return TwinShare()
        parts = [
            TwinPart(
                layers=group.names,
                recipes=(NOW,),
                states=(),
                values=values,
                sizes=[len(each.indices) for each in group.starts],
                populations=[each.elements for each in group.starts],
                blocks=[0] * len(group.names),
            )
            for group, values in zip(groups, numbers, strict=True)
        ]
        return TwinShare(parts)

    def state_dict(self) -> dict[str, tuple[Tensor, Tensor, int]]:
        """Return the weights at the start, for a run that goes on.

        Returns:
            For each layer the places of its sample, int64 (elements) on the CPU, the weights there,
            and the number of elements of the layer.
        """
        return {name: (i.cpu(), w.cpu(), n) for name, (i, w, n) in self._starts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the weights at the start from a result of `state_dict`.

        Raises:
            ValueError: The state, or the weights of a layer, are damaged.
        """
        if not isinstance(state, Mapping):
            raise ValueError(  # noqa: TRY004 - a damaged state, as the errors of its entries
                f"starts={str(state)[:60]}: expected the weights of each layer by name; leave out "
                "load_state_dict() to begin anew"
            )
        for name, each in state.items():
            if not _is_whole(each):
                raise ValueError(
                    f"starts of {name} is {str(each)[:60]}: expected places, weights and the number"
                    " of elements; leave out load_state_dict() to begin anew"
                )
        self._starts = {name: _Start(*each) for name, each in state.items()}

    def _can_sample(self, name: str, parameter: Tensor) -> bool:
        has_weights = parameter.numel() > 0 and parameter.device.type != "meta"
        return has_weights and not self._source.is_shared and self._source.has_twins(name)

    def _compare(self, layers: Sequence[tuple[str, Tensor]]) -> _Group:
        starts = [self._find_start(name, parameter) for name, parameter in layers]
        pairs = zip(layers, starts, strict=True)
        taken = _gather([(parameter, start.indices) for (_, parameter), start in pairs])
        # Padding with tensors that are there: a new tensor of numbers would be copied to a device.
        mask = pad_sequence([torch.ones_like(each, dtype=torch.bool) for each in taken], True)
        now = pad_sequence([each.double() for each in taken], True)
        start = pad_sequence([each.weights.double() for each in starts], True)
        unknown = torch.zeros_like(mask)  # `still_frac` has no value
        run = TwinStack(start, start, start, now, unknown, unknown, {})
        return _Group([name for name, _ in layers], starts, measure_alone(mask, run, unknown))

    def _find_start(self, name: str, parameter: Tensor) -> _Start:
        """Return the weights of a layer at the start, on the devices where they are compared."""
        start, device = self._starts[name], parameter.device
        if start.indices.device != device:  # of a state, or of a layer that was moved
            weights = start.weights.to(find_exact_device(device))
            start = self._starts[name] = _Start(start.indices.to(device), weights, start.elements)
        return start


def _gather(layers: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Return sampled weights, each on the device of its layer, or on the CPU if it lacks float64.

    Args:
        layers: The weights of each layer, and the places of its sample.
    """
    return move_to_exact_device([gather(weights, indices) for weights, indices in layers])


def _is_whole(start: object) -> bool:
    """Return True for places and weights of a sample, and the number of elements of its layer."""
    if not (isinstance(start, (tuple, list)) and len(start) == 3):
        return False
    indices, weights, elements = start
    if not (isinstance(indices, Tensor) and isinstance(weights, Tensor)):
        return False
    if not isinstance(elements, int) or isinstance(elements, bool):
        return False
    is_inside = bool(((indices >= 0) & (indices < elements)).all())
    return is_inside and indices.dtype == torch.int64 and indices.shape == weights.shape
