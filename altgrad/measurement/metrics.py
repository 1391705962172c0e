"""The catalogue of metrics: what each is called, what it means, and how it follows from sums.

An element that is not finite before, after or in the gradient is counted in `nonfinite_frac` and
left out of every other metric. A metric that has no value is NaN.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from altgrad.measurement.columns import FIRST_STEPS_OCTAVE, OCTAVES


@dataclass(frozen=True)
class Numbers:
    """Sums and maxima of some layers on the host, by name: float64, a column for each layer.

    Those of the parameters are (1, layers), those of formats (formats, layers).

    Attributes:
        sum: Of SUMS and FORMAT_SUMS, without octaves.
        max: Of MAXIMA and FORMAT_MAXIMA.
        octaves: Of ``"ulps"`` and ``"steps"``: (63, 1 or formats, layers), all but the first.
    """

    sum: Mapping[str, Tensor]
    max: Mapping[str, Tensor]
    octaves: Mapping[str, Tensor]

    @property
    def paired(self) -> Tensor:
        """How many weights are not 0 and have a gradient: none, unless all have one."""
        all_have = self.sum["gradients"] == self.sum["finite"]
        return self.sum["nonzero_weights"] * all_have


Formula = Callable[[Numbers], Tensor]


@dataclass(frozen=True)
class Share:
    """A count over another: (plus − minus) / total. What is counted is part of the total.

    As an estimate from sampled elements it has a standard error: that of a ratio of means.
    """

    plus: str
    total: str
    minus: str | None = None

    def __call__(self, n: Numbers) -> Tensor:
        """The share; NaN of nothing."""
        return _ratio(self._count(n), n.sum[self.total])

    def denominator(self, n: Numbers) -> Tensor:
        """What the share is of."""
        return n.sum[self.total]

    def squared_residuals(self, n: Numbers, share: Tensor) -> Tensor:
        """Σ (counted − share · in total)² over the sampled elements, each being 0 or 1."""
        count = self._count(n)
        return count - 2 * share * count + share * share * n.sum[self.total]

    def _count(self, n: Numbers) -> Tensor:
        return n.sum[self.plus] - n.sum[self.minus] if self.minus else n.sum[self.plus]


@dataclass(frozen=True)
class KeptShare:
    """⟨effective update, update⟩ / ⟨update, update⟩; its residuals follow from fourth powers."""

    def __call__(self, n: Numbers) -> Tensor:
        """The ratio; NaN without an update."""
        return _ratio(n.sum["kept"], n.sum["judged_sq"])

    def denominator(self, n: Numbers) -> Tensor:
        """The energy of the update."""
        return n.sum["judged_sq"]

    def squared_residuals(self, n: Numbers, share: Tensor) -> Tensor:
        """Σ (effective · update − share · update²)² over the sampled elements."""
        cross, fourth = n.sum["kept_update_cubed"], n.sum["judged_4th"]
        return n.sum["kept_sq"] - 2 * share * cross + share * share * fourth


@dataclass(frozen=True)
class Metric:
    """One line of the catalogue.

    Attributes:
        name: As in log keys.
        unit: Of the value.
        range: Which values it can take.
        high: What a high value means.
        formula: From the numbers of some layers to the value for each of them.
    """

    name: str
    unit: str
    range: str
    high: str
    formula: Formula


def _unless(is_none: Tensor, value: Tensor) -> Tensor:
    """The value, or NaN where there is none, whatever was computed there."""
    return value.masked_fill(is_none, math.nan)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return _unless(denominator == 0, numerator / denominator)


def _per(count: str, total: str) -> Formula:
    return lambda n: _ratio(n.sum[count], n.sum[total])


def _per_pair(count: str) -> Formula:
    return lambda n: _ratio(n.sum[count], n.paired)


def _rms(squares: str, total: str) -> Formula:
    return lambda n: _ratio(n.sum[squares], n.sum[total]).sqrt()


def _norm_ratio(squares: str, over: str) -> Formula:
    return lambda n: _ratio(n.sum[squares].sqrt(), n.sum[over].sqrt())


def _largest(name: str, among: str) -> Formula:
    return lambda n: _unless(n.sum[among] == 0, n.max[name])


def _smallest(name: str, among: str) -> Formula:
    return lambda n: _unless(n.sum[among] == 0, -n.max[f"minus_{name}"])


def histogram_of(n: Numbers, name: str, total: str) -> Tensor:
    """How many of all that moved lie in each octave, the first holding what is not in the others.

    ``"ulps"`` of ``"moved"``, or ``"steps"`` of ``"judged"``.

    Returns:
        (64, 1 or formats, layers).
    """
    octaves = n.octaves[name]
    # Of layers with weights the rounding of the sums may leave a little less than nothing.
    first = (n.sum[total] - octaves.sum(0)).clamp(min=0)
    return torch.cat((first.unsqueeze(0), octaves))


def _median_octave(name: str, total: str, first: int) -> Formula:
    """The middle, on a logarithmic scale, of the octave that holds the (lower) median."""

    def formula(n: Numbers) -> Tensor:
        half = n.sum[total] / 2
        below = histogram_of(n, name, total).cumsum(0)
        octave = (below < half).sum(0).clamp(max=OCTAVES - 1)
        is_none = (half == 0) | half.isnan() | below[-1].isnan()
        return _unless(is_none, octave.double() + (first + 0.5))

    return formula


def _deviation(n: Numbers, name: str, squares: str, count: Tensor) -> Tensor:
    """Sum of squared deviations from the mean: 0 where the smallest is the largest.

    NaN where it is lost in the rounding of the sums, which is where the standard deviation is
    below 1e-5 of the mean.
    """
    deviation = n.sum[squares] - n.sum[name] * (n.sum[name] / count)
    deviation = _unless(deviation <= 1e-10 * n.sum[squares], deviation)
    return deviation.masked_fill(n.max[name] == -n.max[f"minus_{name}"], 0.0)


def _grid_error_std(n: Numbers) -> Tensor:
    count = n.sum["finite"]
    deviation = _deviation(n, "grid_error", "grid_error_sq", count)
    return _unless(count < 2, (deviation / (count - 1)).sqrt())


def _sqnr(n: Numbers) -> Tensor:
    signal, noise = n.sum["weight_sq"], n.sum["grid_error_sq"]
    decibels = 10 * (signal / noise).log10()
    return _unless(signal == 0, decibels.masked_fill(noise == 0, math.inf))


def _correlation(n: Numbers) -> Tensor:
    count = n.paired
    gradient = _deviation(n, "paired_gradient_abs", "paired_gradient_sq", count)
    stiffness = _deviation(n, "stiffness", "stiffness_sq", count)
    product = n.sum["paired_gradient_abs"] * (n.sum["stiffness"] / count)
    common = n.sum["stiffness_gradient"] - product
    correlation = (common / (gradient.sqrt() * stiffness.sqrt())).clamp(-1, 1)
    return _unless((count == 0) | (gradient == 0) | (stiffness == 0), correlation)


def _energy_concentration(n: Numbers) -> Tensor:
    squares = n.sum["update_sq"]
    return _ratio(n.sum["finite"] * n.sum["update_4th"], squares * squares)


_LAYER_METRICS = (
    Metric("update_rms", "weight", "≥ 0", "large steps", _rms("update_sq", "finite")),
    Metric("weight_rms", "weight", "≥ 0", "large weights", _rms("weight_sq", "finite")),
    Metric("gradient_rms", "gradient", "≥ 0", "large gradients", _rms("gradient_sq", "gradients")),
    Metric(
        *("update_weight_ratio", "1", "≥ 0", "the step changes much; about 1e-3 is usual"),
        _norm_ratio("update_sq", "weight_sq"),
    ),
    Metric(
        "zero_update_frac",
        "share",
        "0 … 1",
        "weights that did not move",
        Share("finite", "finite", "moved"),
    ),
    Metric(
        *("zero_gradient_frac", "share", "0 … 1", "gradients that are 0"),
        Share("gradients", "gradients", "nonzero_gradients"),
    ),
    Metric(
        "nonfinite_frac", "share", "0 … 1", "NaN or inf", Share("elements", "elements", "finite")
    ),
    Metric(
        *("unmoved_frac", "share", "0 … 1", "stalled already, in the weights' own dtype"),
        Share("nonzero_gradients", "nonzero_gradients", "moved_with_gradient"),
    ),
    Metric("ulp_mean", "ULP", "≥ 0", "far from stalling where stored now", _per("ulps", "finite")),
    Metric("ulp_max", "ULP", "≥ 0", "one weight moved far", _largest("ulps", "finite")),
    Metric(
        "ulp_zero_frac",
        "share",
        "0 … 1",
        "weights that did not move",
        Share("finite", "finite", "moved"),
    ),
    Metric(
        *("ulp_median_log2", "log2 ULP", "≥ 0.5", "those that moved did so by many ULPs"),
        _median_octave("ulps", "moved", 0),
    ),
    Metric(
        *("energy_concentration", "1", "1 … n", "few elements carry the update"),
        _energy_concentration,
    ),
)
_FORMAT_METRICS = (
    Metric("kept_update_ratio", "1", "real", "the update is kept; 1 is all", KeptShare()),
    Metric(
        "stall_frac", "share", "0 … 1", "updates vanish", Share("judged", "judged", "effective")
    ),
    Metric(
        "update_error", "1", "≥ 0", "the update is distorted", _norm_ratio("lost_sq", "judged_sq")
    ),
    Metric(
        "visible_frac", "share", "0 … 1", "a cast shows the updates", Share("visible", "judged")
    ),
    Metric(
        *("never_moved_frac", "share", "0 … 1", "frozen since the run began"),
        Share("ever_judged", "ever_judged", "ever_effective"),
    ),
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
        _median_octave("steps", "judged", FIRST_STEPS_OCTAVE),
    ),
    Metric(
        "stiffness_mean", "weight", "> 0", "a coarse grid", _per("stiffness", "nonzero_weights")
    ),
    Metric(
        "stiffness_min",
        "weight",
        "> 0",
        "coarse everywhere",
        _smallest("stiffness", "nonzero_weights"),
    ),
    Metric(
        "stiffness_max",
        "weight",
        "> 0",
        "coarse somewhere",
        _largest("stiffness", "nonzero_weights"),
    ),
    Metric("grid_error_mean", "weight", "≥ 0", "off the grid", _per("grid_error", "finite")),
    Metric(
        "grid_error_max", "weight", "≥ 0", "one far off the grid", _largest("grid_error", "finite")
    ),
    Metric("grid_error_std", "weight", "≥ 0", "errors differ", _grid_error_std),
    Metric(
        "on_grid_frac",
        "share",
        "0 … 1",
        "weights are grid points",
        Share("finite", "finite", "off_grid"),
    ),
    Metric("sqnr_db", "dB", "real or inf", "rounding is a small noise", _sqnr),
    Metric(
        "underflow_frac",
        "share",
        "0 … 1",
        "weights become 0",
        Share("nonzero_weights", "finite", "stored_nonzero"),
    ),
    Metric(
        "saturated_frac", "share", "0 … 1", "weights beyond the top", Share("saturated", "finite")
    ),
    Metric(
        "subnormal_frac",
        "share",
        "0 … 1",
        "few digits are left",
        Share("stored_nonzero", "finite", "stored_normal"),
    ),
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
        _per_pair("gradient_per_stiffness"),
    ),
    Metric(
        *("grad_below_stiffness_frac", "share", "0 … 1", "descriptive: gradients below gaps"),
        _per_pair("gradient_below_stiffness"),
    ),
)
LAYER_METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _LAYER_METRICS}
"""Metrics of a parameter, by name."""
FORMAT_METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _FORMAT_METRICS}
"""Metrics of a parameter and a format, by name."""


NEED_GRADIENT = frozenset(
    {
        *("gradient_rms", "zero_gradient_frac", "unmoved_frac"),
        *("grad_stiff_correlation", "grad_stiff_ratio_mean", "grad_below_stiffness_frac"),
    }
)
"""Metrics that have a value only where the gradient was measured, too."""
NEED_TRACKING = frozenset({"never_moved_frac"})
"""Metrics of more than one step: they have a value where the same elements are tracked."""


def get_metric(name: str) -> Metric:
    """The metric of that name, of the parameter or of a format.

    Raises:
        ValueError: There is none; the nearest names are listed.
    """
    metric = LAYER_METRICS.get(name) or FORMAT_METRICS.get(name)
    if metric is not None:
        return metric
    catalogue = (*LAYER_METRICS, *FORMAT_METRICS)
    near = difflib.get_close_matches(name, catalogue, n=3) or catalogue
    raise ValueError(f"unknown metric {name!r}; nearest: {', '.join(near)}")


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
