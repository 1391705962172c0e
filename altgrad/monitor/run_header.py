"""Describe a run that is observed, for the header of its run file: layers, optimizers, kernel.

Read `header`, `run_storage` and `state_sizes` first, which describe the parts; `monitor` comes
next.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from altgrad.measurement.native_code import native_code
from altgrad.monitor.header import describe_layer, describe_run
from altgrad.monitor.measured_layers import MeasuredLayers
from altgrad.monitor.run_storage import count_classes, describe_storage
from altgrad.monitor.state_sizes import find_owners, measure_states
from altgrad.quantization.format_set import FormatSet
from altgrad.recipes.recipe import Recipe


def write_header(
    formats: FormatSet,
    recipes: Sequence[Recipe],
    layers: MeasuredLayers,
    optimizers: Sequence[Optimizer],
    seen: Collection[str],
) -> dict[str, Any]:
    """Describe a run as plain data: formats, scaling, layers, recipes, and how it is stored.

    Args:
        formats: The formats for which figures (values of metrics) are computed.
        recipes: The recipes that are tried out.
        layers: The layers that are measured.
        optimizers: The optimizers whose steps are observed.
        seen: Names of the layers that were part of an observed step.

    Returns:
        A dict that JSON can hold.
    """
    trained = layers.parameters
    owners = find_owners(optimizers)
    described = {
        name: describe_layer(
            parameter,
            layers.settings.get(name),
            layers.settings.count_measured(name, parameter.shape),
            measure_states(owners.get(parameter), parameter, has_stepped=name in seen),
        )
        for name, parameter in layers.registry.parameters.items()
        # A layer that was observed may be frozen at the moment, as in an alternating GAN.
        if name in trained or name in seen
    }
    return describe_run(formats, formats.scaling, described, recipes) | {
        "versions": {"torch": torch.__version__},
        "now": describe_storage(optimizers, trained.values()),
        "optimizers": count_classes(optimizers),
        "kernel": native_code.describe() if layers.measures_on_host else "eager",
    }
