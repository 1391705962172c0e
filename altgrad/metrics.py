"""The catalogue of metrics: what each is called, what it means, and how it follows from sums.

An element that is not finite before, after or in the gradient is counted in `nonfinite_frac` and
left out of every other metric. A metric that has no value is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from altgrad.statistics import (
    FIRST_STEPS_OCTAVE,
    FORMAT_MAXIMA,
    FORMAT_SUMS,
    MAXIMA,
    OCTAVES,
    SUMS,
    LayerStatistics,
)


@dataclass(frozen=True)
class Numbers:
    """Sums and maxima on the host, by name: those of the parameter and those of one format."""

    sum: Mapping[str, float]
    max: Mapping[str, float]

    @property
    def finite(self) -> float:
        """How many elements are finite in all three tensors."""
        return self.sum["elements"] - self.sum["nonfinite"]


Formula = Callable[[Numbers], float]


@dataclass(frozen=True)
class Metric:
    """One line of the catalogue.

    Attributes:
        name: As in log keys.
        unit: Of the value.
        range: Which values it can take.
        high: What a high value means.
        formula: From the numbers to the value.
    """

    name: str
    unit: str
    range: str
    high: str
    formula: Formula


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def _per(count: str, total: str) -> Formula:
    return lambda n: _ratio(n.sum[count], n.sum[total])


def _per_element(count: str) -> Formula:
    return lambda n: _ratio(n.sum[count], n.finite)


def _rms(squares: str, total: str | None = None) -> Formula:
    return lambda n: math.sqrt(_ratio(n.sum[squares], n.sum[total] if total else n.finite))


def _norm_ratio(squares: str, over: str) -> Formula:
    return lambda n: _ratio(math.sqrt(n.sum[squares]), math.sqrt(n.sum[over]))


def _largest(name: str, sign: int = 1) -> Formula:
    return lambda n: sign * n.max[name] if n.max[name] > -math.inf else math.nan


def _median_octave(name: str, first: int) -> Formula:
    """The middle, on a logarithmic scale, of the octave that holds the (lower) median."""

    def formula(n: Numbers) -> float:
        counts = [n.sum[f"{name}[{octave}]"] for octave in range(OCTAVES)]
        below, total = 0.0, sum(counts)
        for octave, count in enumerate(counts):
            below += count
            if total and 2 * below >= total:
                return first + octave + 0.5
        return math.nan

    return formula


def _deviation(n: Numbers, name: str, squares: str, count: float) -> float:
    """Sum of squared deviations from the mean: 0 where the smallest is the largest.

    NaN where it is lost in the rounding of the sums, which is where the standard deviation is
    below 1e-5 of the mean.
    """
    if n.max[name] == -n.max[f"minus_{name}"]:
        return 0.0
    deviation = n.sum[squares] - n.sum[name] * (n.sum[name] / count)
    return deviation if deviation > 1e-10 * n.sum[squares] else math.nan


def _grid_error_std(n: Numbers) -> float:
    if n.finite < 2:
        return math.nan
    return math.sqrt(_deviation(n, "grid_error", "grid_error_sq", n.finite) / (n.finite - 1))


def _sqnr(n: Numbers) -> float:
    signal, noise = n.sum["weight_sq"], n.sum["grid_error_sq"]
    if not signal:
        return math.nan
    return 10 * math.log10(signal / noise) if noise else math.inf


def _correlation(n: Numbers) -> float:
    count = n.sum["paired_gradients"]
    if not count:
        return math.nan
    gradient = _deviation(n, "paired_gradient_abs", "paired_gradient_sq", count)
    stiffness = _deviation(n, "paired_stiffness", "paired_stiffness_sq", count)
    if not gradient or not stiffness:
        return math.nan
    product = n.sum["paired_gradient_abs"] * (n.sum["paired_stiffness"] / count)
    common = n.sum["stiffness_gradient"] - product
    correlation = common / (math.sqrt(gradient) * math.sqrt(stiffness))
    return correlation if math.isnan(correlation) else max(-1.0, min(1.0, correlation))


def _energy_concentration(n: Numbers) -> float:
    squares = n.sum["update_sq"]
    return _ratio(n.finite * n.sum["update_4th"], squares * squares)


def _unmoved(n: Numbers) -> float:
    return _ratio(n.finite - n.sum["moved"], n.finite)


_LAYER_METRICS = (
    Metric("update_rms", "weight", "≥ 0", "large steps", _rms("update_sq")),
    Metric("weight_rms", "weight", "≥ 0", "large weights", _rms("weight_sq")),
    Metric("gradient_rms", "gradient", "≥ 0", "large gradients", _rms("gradient_sq", "gradients")),
    Metric(
        *("update_weight_ratio", "1", "≥ 0", "the step changes much; about 1e-3 is usual"),
        _norm_ratio("update_sq", "weight_sq"),
    ),
    Metric("zero_update_frac", "share", "0 … 1", "weights that did not move", _unmoved),
    Metric(
        *("zero_gradient_frac", "share", "0 … 1", "gradients that are 0"),
        lambda n: _ratio(n.sum["gradients"] - n.sum["nonzero_gradients"], n.sum["gradients"]),
    ),
    Metric("nonfinite_frac", "share", "0 … 1", "NaN or inf", _per("nonfinite", "elements")),
    Metric(
        *("unmoved_frac", "share", "0 … 1", "stalled already, in the weights' own dtype"),
        _per("unmoved", "nonzero_gradients"),
    ),
    Metric("ulp_mean", "ULP", "≥ 0", "far from stalling where stored now", _per_element("ulps")),
    Metric("ulp_max", "ULP", "≥ 0", "one weight moved far", _largest("ulps")),
    Metric("ulp_zero_frac", "share", "0 … 1", "weights that did not move", _unmoved),
    Metric(
        *("ulp_median_log2", "log2 ULP", "≥ 0.5", "those that moved did so by many ULPs"),
        _median_octave("ulps", 0),
    ),
    Metric(
        *("energy_concentration", "1", "1 … n", "few elements carry the update"),
        _energy_concentration,
    ),
)
_FORMAT_METRICS = (
    Metric(
        "kept_update_ratio", "1", "real", "the update is kept; 1 is all", _per("kept", "judged_sq")
    ),
    Metric("stall_frac", "share", "0 … 1", "updates vanish", _per("stalled", "judged")),
    Metric(
        "update_error", "1", "≥ 0", "the update is distorted", _norm_ratio("lost_sq", "judged_sq")
    ),
    Metric("visible_frac", "share", "0 … 1", "a cast shows the updates", _per("visible", "judged")),
    Metric(
        *("stochastic_move_frac", "share", "0 … 1", "stochastic rounding would move weights"),
        _per("stochastic_move", "judged"),
    ),
    Metric(
        *("stochastic_noise_ratio", "1", "≥ 0", "the noise that it would add"),
        _norm_ratio("stochastic_variance", "judged_sq"),
    ),
    Metric(
        *("steps_median_log2", "log2 stiffness", "−31.5 … 31.5", "far above the threshold of −1"),
        _median_octave("steps", FIRST_STEPS_OCTAVE),
    ),
    Metric(
        "stiffness_mean", "weight", "> 0", "a coarse grid", _per("stiffness", "nonzero_weights")
    ),
    Metric("stiffness_min", "weight", "> 0", "coarse everywhere", _largest("minus_stiffness", -1)),
    Metric("stiffness_max", "weight", "> 0", "coarse somewhere", _largest("stiffness")),
    Metric("grid_error_mean", "weight", "≥ 0", "off the grid", _per_element("grid_error")),
    Metric("grid_error_max", "weight", "≥ 0", "one far off the grid", _largest("grid_error")),
    Metric("grid_error_std", "weight", "≥ 0", "errors differ", _grid_error_std),
    Metric("on_grid_frac", "share", "0 … 1", "weights are grid points", _per_element("on_grid")),
    Metric("sqnr_db", "dB", "real or inf", "rounding is a small noise", _sqnr),
    Metric("underflow_frac", "share", "0 … 1", "weights become 0", _per_element("underflow")),
    Metric("saturated_frac", "share", "0 … 1", "weights beyond the top", _per_element("saturated")),
    Metric("subnormal_frac", "share", "0 … 1", "few digits are left", _per_element("subnormal")),
    Metric(
        *("grad_stiff_correlation", "1", "−1 … 1", "descriptive: large gradients where coarse"),
        _correlation,
    ),
    Metric(
        *(
            "grad_stiff_ratio_mean",
            "gradient / weight",
            "≥ 0",
            "descriptive: gradients exceed gaps",
        ),
        _per("gradient_per_stiffness", "paired_gradients"),
    ),
    Metric(
        *("grad_below_stiffness_frac", "share", "0 … 1", "descriptive: gradients below gaps"),
        _per("gradient_below_stiffness", "paired_gradients"),
    ),
)
LAYER_METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _LAYER_METRICS}
"""Metrics of a parameter, by name."""
FORMAT_METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _FORMAT_METRICS}
"""Metrics of a parameter and a format, by name."""


def metrics_of(statistics: Sequence[LayerStatistics]) -> list[dict[str, float]]:
    """All metrics of each, from one host copy: ``metric`` and ``metric/format``."""
    if not statistics:
        return []
    numbers = iter(torch.cat([v for each in statistics for v in (each.sums, each.maxima)]).tolist())
    return [_metrics_from(numbers, each.formats) for each in statistics]


def _metrics_from(numbers: Iterator[float], formats: Sequence[str]) -> dict[str, float]:
    def take(names: Sequence[str]) -> dict[str, float]:
        return dict(zip(names, numbers, strict=False))

    sums, format_sums = take(SUMS), [take(FORMAT_SUMS) for _ in formats]
    maxima, format_maxima = take(MAXIMA), [take(FORMAT_MAXIMA) for _ in formats]
    layer = Numbers(sums, maxima)
    figures = {name: metric.formula(layer) for name, metric in LAYER_METRICS.items()}
    for position, format in enumerate(formats):
        both = Numbers(sums | format_sums[position], maxima | format_maxima[position])
        for name, metric in FORMAT_METRICS.items():
            figures[f"{name}/{format}"] = metric.formula(both)
    return figures


def as_markdown() -> str:
    """The catalogue as the tables of docs/metrics.md."""
    tables = {
        "Of a layer: `altgrad/{metric}/{layer}`": LAYER_METRICS,
        "Of a layer and a format: `altgrad/{metric}/{format}/{layer}`": FORMAT_METRICS,
    }
    lines = ["# Metrics", "", *(__doc__ or "").strip().splitlines()[2:]]
    for title, metrics in tables.items():
        lines += ["", f"## {title}", "", "| metric | unit | range | high means |"]
        lines.append("| --- | --- | --- | --- |")
        lines += [f"| {m.name} | {m.unit} | {m.range} | {m.high} |" for m in metrics.values()]
    return "\n".join(lines) + "\n"
