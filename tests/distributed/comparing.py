"""Compare records of the same elements: counts, bins and extrema exactly, sums of floats nearly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Set as AbstractSet
from dataclasses import replace

from altgrad import StepRecord, model_figures
from altgrad.measurement.catalogue import figure_keys
from altgrad.measurement.columns import CLUSTERS
from altgrad.measurement.figures import Figures

_NEARLY = 1e-12
"""Relative tolerance of a float64 sum whose terms are added in any order."""

# Metrics that follow from sums of positive floats alone.
_OF_SUMS = {
    *("update_rms", "weight_rms", "gradient_rms", "update_weight_ratio", "ulp_mean"),
    *("energy_concentration", "update_error", "stochastic_move_frac", "stochastic_noise_ratio"),
    *("stiffness_mean", "grid_error_mean", "grad_stiff_ratio_mean"),
}


def differences(record: StepRecord, expected: StepRecord) -> list[str]:
    """Describe each difference between two records."""
    if record.layers.keys() != expected.layers.keys():
        return [f"layers {sorted(record.layers.keys() ^ expected.layers.keys())}"]
    found = []
    for name, figures in record.layers.items():
        found += [f"{name}: {each}" for each in _compare_layer(figures, expected.layers[name])]
    for key in figure_keys(record.model.formats):
        value, truth = record.model[key], expected.model[key]
        if not _is_near(value, truth, 1e-9 * abs(truth)):
            found.append(f"model {key}: {value} for {truth}")
    return found


def without(record: StepRecord, left_out: AbstractSet[str]) -> StepRecord:
    """Return the record without some layers."""
    if not left_out:
        return record
    layers = {name: each for name, each in record.layers.items() if name not in left_out}
    return replace(record, layers=layers, model=model_figures([*layers.values()]))


def plain(record: StepRecord) -> str:
    """Return all figures and bins as a text that is equal only if every bit is equal."""
    each = [record.model, *record.layers.values()]
    return repr([(_list_figures(f), f.population, f.elements, [*_histograms(f)]) for f in each])


def _list_figures(figures: Figures) -> list[tuple[str, float]]:
    """Return all figures, with those of twins but for ratios, which ranks read from bins."""
    own = [(key, figures[key]) for key in figure_keys(figures.formats)]
    return own + [each for each in figures.twins.items() if "_ratio/" not in each[0]]


def _compare_layer(figures: Figures, expected: Figures) -> Iterator[str]:
    for kind in ("formats", "population", "elements"):
        value, truth = getattr(figures, kind), getattr(expected, kind)
        if value != truth:
            yield f"{kind} {value} for {truth}"
    for own, other in zip(_histograms(figures), _histograms(expected), strict=True):
        if own != other:
            yield f"bins {own} for {other}"
    for key in figure_keys(expected.formats):
        truth = expected[key]
        if not _is_near(figures[key], truth, _tolerance(key, expected)):
            yield f"{key}: {figures[key]} for {truth}"
        value, error = figures.standard_error(key), expected.standard_error(key)
        if not _is_near(value**2, error**2, _standard_error_tolerance(key, expected)):
            yield f"standard error of {key}: {value} for {error}"


def _histograms(figures: Figures) -> Iterator[tuple[str, int, list[float]]]:
    for key in ("ulps", "weights", *(f"steps/{name}" for name in figures.formats)):
        histogram = figures.histogram(key)
        yield key, histogram.first, [*histogram.counts]


def _is_near(value: float, truth: float, tolerance: float) -> bool:
    if math.isnan(value) or math.isnan(truth):
        return math.isnan(value) and math.isnan(truth)
    return value == truth or abs(value - truth) <= tolerance


def _tolerance(key: str, figures: Figures) -> float:
    """Return the tolerance of a figure: 0 unless it follows from sums of floats."""
    name, _, format = key.partition("/")
    if name in _OF_SUMS:
        return _NEARLY * abs(figures[key])
    if name == "kept_update_ratio":  # Σ |effective · update| ≤ (1 + error) Σ update²
        return _NEARLY * (1 + figures[f"update_error/{format}"])
    if name == "grid_error_std":  # a difference: its square, relative to the square of the mean
        mean, std = figures[f"grid_error_mean/{format}"], figures[key]
        return _NEARLY * (std + 2 * mean**2 / std) if std > 0 else 0.0
    if name == "sqnr_db":  # a logarithm
        return 10 * _NEARLY
    # A quotient of two differences, which are no figures themselves.
    return 1e-9 if name == "grad_stiff_correlation" else 0.0


def _standard_error_tolerance(key: str, figures: Figures) -> float:
    """Return the tolerance of the square of a standard error.

    The errors of shares follow from counts. The error of the kept_update_ratio is a difference of
    sums of fourth powers of updates; energy_concentration shows the same sums. Each rank forms
    clusters of the blocks that it holds: where rows cut through blocks, these differ from those of
    one process, and so do errors.
    """
    name, _, _ = key.partition("/")
    error = figures.standard_error(key)
    if figures.layer_vectors(figures.formats)[0][0][CLUSTERS]:
        return error**2
    if name != "kept_update_ratio" or not error > 0:
        return 0.0
    fourth = figures["energy_concentration"] / figures.elements
    return 8 * _NEARLY * (error**2 + (1 + figures[key] ** 2) * fourth)
