"""`LaneSorter`: sort the layers that an optimizer steps into lanes.

A *twin* is a sample of the layers that is stepped and stored as a recipe says. A *lane* is a set of
layers whose samples can lie in one tensor, so that a twin steps them together. Sorting asks many
questions about each layer. Its result is therefore kept as long as parameters, groups and gradients
are of the same kind.

Read `layer_plan` first; `run_weights` comes next.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from altgrad.observation.dtensor import find_unreduced, is_sharded
from altgrad.observation.stored import get_stored
from altgrad.quantization.arguments import INPUT_DTYPES
from altgrad.quantization.devices import find_exact_device
from altgrad.twins.drawing import Drawing
from altgrad.twins.layer_plan import LaneKind, Stepped
from altgrad.twins.twin_source import TwinSource

_Key: TypeAlias = tuple[object, ...]


class LaneSorter:
    """A sorter of the layers of one optimizer into lanes.

    A *lane* is a set of layers that are alike in dtype, gradient dtype, device, and whether a
    `WeightStorage` rounds them after each step. Small samples of these layers are stepped together
    in one tensor.

    Args:
        source: The layers of the training.
        drawings: The numbers of neighbouring elements that recipes need to be drawn together; each
            layer is in a lane for each of them.
    """

    def __init__(self, source: TwinSource, drawings: Collection[Drawing]) -> None:
        self._source = source
        self._drawings = drawings
        self._gradient_dtypes: dict[str, torch.dtype] = {}  # of layers that had a gradient
        self._key: _Key = ()
        self._names: object = None
        self._waits = False  # for layers that not all ranks know yet
        self._lanes: Mapping[LaneKind, Sequence[Stepped]] = {}

    def sort(self, optimizer: Optimizer) -> Mapping[LaneKind, Sequence[Stepped]]:
        """Return for each lane the layers that an optimizer is about to step.

        A *lane* is a set of layers with equal `LaneKind`: dtypes, device and block size.

        Args:
            optimizer: The training's optimizer.

        Returns:
            The layers, with a gradient or without; the same objects as before if none has changed.
        """
        stored, names = get_stored([optimizer]), self._source.names
        key = (_describe_parameters(optimizer), *map(id, stored))
        if key != self._key or names is not self._names or not self._lanes:
            self._lanes = self._sort(optimizer, stored)
            # Whether all ranks know a layer, and its scales, is no property of the parameter.
            self._key, self._names = (() if self._waits else key), names
        return self._lanes

    def _sort(
        self, optimizer: Optimizer, stored: Collection[Tensor]
    ) -> dict[LaneKind, list[Stepped]]:
        groups = {
            parameter: number
            for number, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        }
        lanes: dict[LaneKind, list[Stepped]] = {}
        self._waits = False
        for name, parameter in self._source.find_stepped(optimizer):
            gradient = parameter.grad
            if not self._can_sample(name, parameter, gradient):
                continue
            dtype = self._gradient_dtypes.get(name, parameter.dtype)
            if gradient is not None:
                dtype = self._gradient_dtypes[name] = gradient.dtype
            stepped = Stepped(name, parameter, groups[parameter])
            place = parameter.dtype, dtype, find_exact_device(parameter.device)
            for drawing in self._drawings:
                block = drawing.find_block(parameter.numel())
                if self._is_torn(name, block, drawing):
                    continue
                kind = LaneKind(*place, block, parameter in stored, drawing.packed)
                lanes.setdefault(kind, []).append(stepped)
        return lanes

    def _can_sample(self, name: str, parameter: Tensor, gradient: Tensor | None) -> bool:
        if parameter.dtype not in INPUT_DTYPES or not self._source.has_twins(name):
            return False
        if self._source.is_shared:
            if find_unreduced({name: parameter}):  # a notice of the observer says why
                return False
            if not self._source.is_ready(name, parameter):
                self._waits = True
                return False
        elif is_sharded(parameter):
            self._source.warn_about_omission("has no twins of parameters sharded after attach()")
            return False
        if gradient is not None and gradient.layout != torch.strided:
            self._source.warn_about_omission(f"has no twin of {name}, whose gradient is sparse")
            return False
        return True

    def _is_torn(self, name: str, block: int, drawing: Drawing) -> bool:
        """Return True if ranks share a block of a layer, which no rank can then sample; warn.

        Which states an optimizer packs in blocks depends on the size of each local shard, so that
        no such recipe has twins where ranks share layers.

        Args:
            name: Name of the layer.
            block: Number of elements that are drawn together.
            drawing: What the recipes need to be drawn together.
        """
        if drawing.packed is not None and self._source.is_shared:
            self._source.warn_about_omission(
                "has no twins of recipes with packed states where several ranks hold the layers"
            )
            return True
        if block == 1 or not self._source.is_shared or not self._source.tears(name, block):
            return False
        self._source.warn_about_omission(
            f"has no twins with blocks of {block} elements of {name}, of which several ranks hold "
            "parts"
        )
        return True


def _describe_parameters(optimizer: Optimizer) -> _Key:
    """Return a key that changes when the layers of an optimizer must be sorted into lanes anew.

    A *lane* is a set of layers whose samples are stepped in one tensor. The key holds identity,
    dtype, shape and device of each parameter, kind of its gradient, and size of each group.
    """
    return tuple(
        (
            id(p),
            p.dtype,
            p.shape,
            p.device,
            None
            if p.grad is None
            else (p.grad.dtype, p.grad.layout, getattr(p.grad, "placements", None)),
        )
        for group in optimizer.param_groups
        for p in group["params"]
    ) + tuple(len(group["params"]) for group in optimizer.param_groups)
