"""Describe a run as plain data, for the header of its run file.

This file does not import torch, so that a report can compare formats with those of a run.
`run_storage` comes next and describes how the run itself is stored; the room `altgrad.report`
writes the header.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from altgrad.quantization.number_format import NumberFormat, get_applied_scaling

if TYPE_CHECKING:
    from torch import Tensor

    from altgrad.observation.rules import LayerSampling
    from altgrad.quantization.formats import Scaling
    from altgrad.recipes.recipe import Recipe


def describe_run(
    formats: Iterable[NumberFormat],
    scaling: Scaling | None,
    layers: Mapping[str, dict[str, Any]],
    recipes: Iterable[Recipe] = (),
) -> dict[str, Any]:
    """Describe formats, scaling, layers and recipes for the header of a run file.

    Args:
        formats: Formats for which figures (values of metrics) are computed.
        scaling: Which elements share a scale, which follows from their amax (largest magnitude).
        layers: Results of `describe_layer`, by name of the layer.
        recipes: Recipes whose twins are stepped: samples of each layer that are stored as a recipe
            says.

    Returns:
        A dict with the keys ``formats``, ``scaling``, ``layers`` and ``recipes`` that JSON can
        hold.
    """
    return {
        "formats": {format.name: describe_format(format, scaling) for format in formats},
        "scaling": scaling,
        "layers": dict(layers),
        "recipes": {recipe.name: describe_recipe(recipe, scaling) for recipe in recipes},
    }


def describe_format(format: NumberFormat, scaling: Scaling | None) -> dict[str, Any]:
    """Describe the range and precision of a format, or of the elements of a block format.

    Args:
        format: The format.
        scaling: Which elements share a scale, which follows from their amax (largest magnitude), in
            formats that prescribe no scaling.

    Returns:
        A dict of plain numbers, and under ``scaled`` True if the format is scaled.
    """
    element = format.element
    return {
        "bits": element.bits,
        "max": element.max,
        "smallest": element.smallest_subnormal,
        "smallest_normal": element.smallest_normal,
        "eps": element.eps,
        "scaled": get_applied_scaling(format, scaling) is not None,
    }


def describe_recipe(recipe: Recipe, scaling: Scaling | None) -> dict[str, Any]:
    """Describe how a recipe stores weights and states, by names of formats and dtypes.

    Args:
        recipe: The recipe.
        scaling: Which elements share a scale in formats that prescribe no scaling.

    Returns:
        A dict that JSON can hold. Under ``sizes`` it has what the memory of a layer follows from.
    """
    maker = recipe.maker
    return {
        "weights": None if recipe.weights is None else str(recipe.weights),
        "rounding": recipe.rounding,
        "compensation": recipe.compensation,
        "states": {state: str(format) for state, format in recipe.states.items()},
        "dtype": None if recipe.dtype is None else str(recipe.dtype).removeprefix("torch."),
        "optimizer": None if maker is None else describe_name(maker.make),
        "fused": recipe.fused,
        "accumulate": None if recipe.accumulate is None else str(recipe.accumulate),
        "bytes_per_parameter": recipe.bytes_per_parameter,
        "sizes": _describe_sizes(recipe, scaling),
    }


def _describe_sizes(recipe: Recipe, scaling: Scaling | None) -> dict[str, Any]:
    """Return bits and scaling of each format of a recipe, and what its own optimizer keeps."""
    weights, maker = recipe.weights_format, recipe.maker
    packed = None if maker is None else maker.packed
    return {
        "weights": None if weights is None else _describe_size(weights, scaling),
        "states": {
            name: _describe_size(format, scaling) for name, format in recipe.state_formats.items()
        },
        "optimizer": None
        if maker is None
        else {
            "state_bytes": maker.state_bytes,
            "compensation_bytes": maker.compensation_bytes,
            "packed": None
            if packed is None
            else {
                "block": packed.block,
                "least": packed.least,
                "only_whole": packed.only_whole,
                "states": packed.states,
                "table_bytes": packed.table_bytes,
            },
        },
    }


def _describe_size(format: NumberFormat, scaling: Scaling | None) -> dict[str, Any]:
    return {"bits": format.element.bits, "scaling": get_applied_scaling(format, scaling)}


def describe_name(factory: Callable[..., Any]) -> str:
    """Return module and name of a class or function; for any other object, those of its class."""
    named = factory if hasattr(factory, "__qualname__") else type(factory)
    return f"{named.__module__}.{named.__qualname__}"


def describe_layer(
    parameter: Tensor,
    sampling: LayerSampling,
    elements: int,
    states: Mapping[str, Mapping[str, int]] | None = None,
) -> dict[str, Any]:
    """Describe the shape, dtype, sampling and optimizer states of a layer.

    Args:
        parameter: The layer's parameter.
        sampling: The layer's settings.
        elements: Number of elements that are measured in a step.
        states: Sizes of the optimizer's states, as `measure_states` returns them; None if unknown.

    Returns:
        A dict that JSON can hold.
    """
    return {
        "shape": tuple(parameter.shape),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "elements": elements,
        "formats": sampling.formats,
        "every_n_steps": sampling.every_n_steps,
        "states": states,
        "twin_elements": sampling.twin_elements,
    }
