"""`SampledGradients`: the gradients of a step at the sampled elements, gathered once for all twins.

A *twin* is a sample of each layer of the *run*, the training that is watched, stepped and stored as
a recipe says. All twins of a lane, a set of layers whose samples lie in one tensor, step with the
gradients that the run is about to apply.

Read `outside_changes` first; `gradient_sums` comes next.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from altgrad.observation.dtensor import to_local_tensor
from altgrad.quantization.devices import gather_all, move_to_exact_device
from altgrad.twins.layer_plan import LaneKind, LayerPlan, Stepped
from altgrad.twins.optimizer_twin import Gradients
from altgrad.twins.sample import Sampled


class SampledGradients:
    """The gradients of a lane's layers at the sampled elements, as one flat tensor.

    Args:
        kind: The properties that the layers share.

    Attributes:
        now: The gradients of the running step.
    """

    def __init__(self, kind: LaneKind) -> None:
        self.now = Gradients(torch.zeros(0, dtype=kind.gradient_dtype, device=kind.device), ())
        # Layers with a gradient, the elements on the device of each, and where theirs go.
        self._layers: dict[str, Sampled] = {}
        self._elements: list[Tensor] = []
        self._places: list[Tensor] = []

    @property
    def names(self) -> list[str]:
        """The names of the sampled layers that have a gradient in this step."""
        return [*self._layers]

    def arrange(self, plan: LayerPlan, present: Sequence[Stepped]) -> None:
        """Give the gradients the places of their layers; those of other layers are 0.

        Args:
            plan: The layers with their samples, and their places in a flat tensor.
            present: The layers that have a gradient in this step.
        """
        values = self.now.values.new_zeros(plan.layout.length)
        flags = plan.find_present({each.name for each in present})
        self.now = Gradients(values, flags)
        places = plan.layout.places
        self._layers = {
            each.name: plan.layers[each.name] for each in present if each.name in places
        }
        self._elements = [each.places.to(each.parameter.device) for each in self._layers.values()]
        self._places = [values[places[name]] for name in self._layers]

    def gather(self, optimizer: Optimizer) -> None:
        """Gather the gradients that the training's optimizer is about to apply, into `now`."""
        gradients = [layer.gradient for layer in self._layers.values()]
        gather_all(gradients, self._elements, self._places)
        values, present = self.now.values, self.now.present
        self.now = Gradients(values, present, *_read_scaler(optimizer))


def _read_scaler(optimizer: Optimizer) -> tuple[Tensor | None, Tensor | None]:
    """Return the scale and the flag of a GradScaler, where samples are stepped; None without it."""
    # GradScaler sets these attributes on fused optimizers: torch/amp/grad_scaler.py, step.
    given = [
        to_local_tensor(getattr(optimizer, each, None)) for each in ("grad_scale", "found_inf")
    ]
    moved = iter(move_to_exact_device([each for each in given if each is not None]))
    scale, found_inf = (None if each is None else next(moved) for each in given)
    return scale, found_inf
