"""That two records are of the same elements: counts, bins and extrema exactly, sums nearly."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set as AbstractSet
from dataclasses import replace

import torch

from altgrad import Figures, StepRecord, model_figures
from altgrad.measurement.columns import (
    FORMAT_MAXIMA,
    FORMAT_SUMS,
    MAXIMA,
    ROW_SQUARES,
    SUMS,
    sum_count,
)

# Σ of what is no whole number; of all others the sum of absolute terms is the sum itself.
_FLOATS = {
    *("ulps", "gradients_abs", "paired_gradient_abs", *ROW_SQUARES),
    *("stiffness", "stiffness_gradient", "gradient_per_stiffness", "grid_error"),
    *("kept", "kept_update_cubed", "stochastic_move", "stochastic_variance"),
    *("stiffness_sq", "grid_error_sq", "kept_sq", "lost_sq", "judged_sq", "judged_4th"),
}


def differences(record: StepRecord, expected: StepRecord) -> list[str]:
    """What is not the same, in words."""
    if record.layers.keys() != expected.layers.keys():
        return [f"layers {sorted(record.layers.keys() ^ expected.layers.keys())}"]
    found = []
    for name, figures in record.layers.items():
        other = expected.layers[name]
        if figures.formats != other.formats or figures.population != other.population:
            found.append(f"{name}: {figures.formats} of {figures.population}")
        found += [f"{name}: {each}" for each in _of_layer(figures, other, record.model.formats)]
    for key, value in record.model.items():
        truth = expected.model[key]
        if math.isnan(value) != math.isnan(truth) or abs(value - truth) > 1e-9 * abs(truth):
            found.append(f"model {key}: {value} for {truth}")
    return found


def without(record: StepRecord, left_out: AbstractSet[str]) -> StepRecord:
    """As if these layers had not been observed."""
    if not left_out:
        return record
    layers = {name: each for name, each in record.layers.items() if name not in left_out}
    return replace(record, layers=layers, model=model_figures([*layers.values()]))


def _of_layer(figures: Figures, expected: Figures, formats: Sequence[str]) -> list[str]:
    ((own, _),), ((true, _),) = (each.layer_vectors(formats) for each in (figures, expected))
    names = [(name, None) for name in SUMS]
    names += [(name, f) for f in formats for name in FORMAT_SUMS]
    found = []
    middle = sum_count(len(formats))
    by_name = dict(zip(names, true[:middle].tolist(), strict=True))
    for (name, format), value in zip(names, own[:middle].tolist(), strict=True):
        truth = by_name[name, format]
        tolerance = 1e-12 * _of_absolute_terms(name, format, by_name) if name in _FLOATS else 0
        if abs(value - truth) > tolerance or math.isnan(value):
            found.append(f"{name} {format or ''}: {value} for {truth}")
    maxima = [*MAXIMA, *(f"{n} {f}" for f in formats for n in FORMAT_MAXIMA)]
    for name, value, truth in zip(maxima, own[middle:], true[middle:], strict=True):
        if not torch.equal(value, truth):
            found.append(f"largest {name}: {value} for {truth}")
    return found


def _of_absolute_terms(name: str, format: str | None, sums: dict) -> float:
    """Or more, by Cauchy and Schwarz."""
    if name == "kept":
        return math.sqrt(sums["elements", None] * sums["kept_sq", format])
    if name == "kept_update_cubed":
        return math.sqrt(sums["kept_sq", format] * sums["judged_4th", format])
    return abs(sums[name, format])
