"""`find_spacings`: how finely the run stores each weight that a `WeightStorage` rounds.

The *run* is the training that is watched. A storage rounds its weights after each step, so that the
self-check, which compares a sample with the run, must allow for this rounding.

Read `fused_sgd` first; `lane_twins` comes next.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from altgrad.observation.stored import get_stored
from altgrad.quantization.ops import spacing
from altgrad.twins.layout import Layout
from altgrad.twins.sample import Sampled


def find_spacings(
    optimizer: Optimizer, layers: Mapping[str, Sampled], layout: Layout, weights: Tensor
) -> Tensor:
    """Return the distance between neighbouring numbers of the format that stores each weight.

    Args:
        optimizer: The training's optimizer.
        layers: The layers by name, with their sampled elements.
        layout: The places of the layers in a flat tensor.
        weights: The sampled weights, floating-point (elements).

    Returns:
        float64 (elements); 0 in layers whose weights no storage rounds, and at padding.
    """
    stored, spacings = get_stored([optimizer]), torch.zeros_like(weights, dtype=torch.float64)
    for name, place in layout.places.items():
        layer = layers[name]
        how = stored.get(layer.parameter)
        if how is None or how.element is None:
            continue
        scale: Tensor | float = 1.0
        if (scales := how.scale()) is not None:
            scale = torch.take(scales.expand(layer.shape), layer.indices)
        spacings[place] = spacing(weights[place].double(), how.element, scale)
    return spacings
