"""How each metric of the catalogue follows from sums, extrema and bins.

A formula takes the numbers of any layers, on the host, and gives a value for each of them.
"""

from __future__ import annotations

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


FORMULAS: Mapping[str, Formula] = {
    "update_rms": _rms("update_sq", "finite"),
    "weight_rms": _rms("weight_sq", "finite"),
    "gradient_rms": _rms("gradient_sq", "gradients"),
    "update_weight_ratio": _norm_ratio("update_sq", "weight_sq"),
    "zero_gradient_frac": Share("gradients", "gradients", "nonzero_gradients"),
    "nonfinite_frac": Share("elements", "elements", "finite"),
    "unmoved_frac": Share("nonzero_gradients", "nonzero_gradients", "moved_with_gradient"),
    "ulp_mean": _per("ulps", "finite"),
    "ulp_max": _largest("ulps", "finite"),
    "ulp_zero_frac": Share("finite", "finite", "moved"),
    "ulp_median_log2": _median_octave("ulps", "moved", 0),
    "energy_concentration": _energy_concentration,
    # Of a format:
    "kept_update_ratio": KeptShare(),
    "stall_frac": Share("judged", "judged", "effective"),
    "update_error": _norm_ratio("lost_sq", "judged_sq"),
    "visible_frac": Share("visible", "judged"),
    "never_moved_frac": Share("ever_judged", "ever_judged", "ever_effective"),
    "stochastic_move_frac": _per("stochastic_move", "judged"),
    "stochastic_noise_ratio": _norm_ratio("stochastic_variance", "judged_sq"),
    "steps_median_log2": _median_octave("steps", "judged", FIRST_STEPS_OCTAVE),
    "stiffness_mean": _per("stiffness", "nonzero_weights"),
    "stiffness_min": _smallest("stiffness", "nonzero_weights"),
    "stiffness_max": _largest("stiffness", "nonzero_weights"),
    "grid_error_mean": _per("grid_error", "finite"),
    "grid_error_max": _largest("grid_error", "finite"),
    "grid_error_std": _grid_error_std,
    "on_grid_frac": Share("finite", "finite", "off_grid"),
    "sqnr_db": _sqnr,
    "underflow_frac": Share("nonzero_weights", "finite", "stored_nonzero"),
    "saturated_frac": Share("saturated", "finite"),
    "subnormal_frac": Share("stored_nonzero", "finite", "stored_normal"),
    "grad_stiff_correlation": _correlation,
    "grad_stiff_ratio_mean": _per_pair("gradient_per_stiffness"),
    "grad_below_stiffness_frac": _per_pair("gradient_below_stiffness"),
}
"""By the name of the metric; those of the catalogue, in its order."""
