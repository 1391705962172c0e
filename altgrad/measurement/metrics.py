"""How each metric of the catalogue follows from sums, extrema and histograms.

A formula takes the sums of any rows, on the host, and returns a value for each of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from altgrad.measurement.columns import FIRST_STEPS_OCTAVE, OCTAVES


class Sums(Protocol):
    """Sums, extrema and histograms of some rows by name: float64 on the host.

    What belongs to a parameter is (rows, 1), what belongs to formats (rows, formats).
    """

    def sum(self, name: str) -> Tensor:
        """Return a column of SUMS or FORMAT_SUMS."""

    def max(self, name: str) -> Tensor:
        """Return a column of MAXIMA or FORMAT_MAXIMA."""

    def histogram(self, name: str) -> Tensor:
        """Return how many elements moved by each octave: (64, 1 or formats, rows).

        Args:
            name: ``"ulps"`` or ``"steps"``.
        """


Formula = Callable[[Sums], Tensor]


class Estimate(ABC):
    """A ratio Σ a / Σ b over elements, which has a standard error where these are a sample."""

    @abstractmethod
    def sums(self, n: Sums) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return Σ a, Σ b, Σ a², Σ a · b and Σ b²."""

    @abstractmethod
    def carrying(self, n: Sums) -> Tensor:
        """Return how many elements carry the ratio."""

    def __call__(self, n: Sums) -> Tensor:
        """Return the ratio; NaN where Σ b is 0."""
        a, b, *_ = self.sums(n)
        return _ratio(a, b)


@dataclass(frozen=True)
class Share(Estimate):
    """A count over another: (plus − minus) / total. What is counted is part of the total."""

    plus: str
    total: str
    minus: str | None = None

    def sums(self, n: Sums) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the two counts: a and b are 0 or 1, and b is 1 where a is."""
        count, total = n.sum(self.plus), n.sum(self.total)
        if self.minus:
            count = count - n.sum(self.minus)
        return count, total, count, count, total

    def carrying(self, n: Sums) -> Tensor:
        """Return the number of all elements."""
        return n.sum("elements")


@dataclass(frozen=True)
class KeptShare(Estimate):
    """⟨effective update, update⟩ / ⟨update, update⟩; its squares are fourth powers."""

    def sums(self, n: Sums) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the sums of a = effective · update and b = update²."""
        a, b = n.sum("kept"), n.sum("judged_sq")
        return a, b, n.sum("kept_sq"), n.sum("kept_update_cubed"), n.sum("judged_4th")

    def carrying(self, n: Sums) -> Tensor:
        """Return elements / energy_concentration: as many equal updates have that energy."""
        energy, fourth = n.sum("judged_sq"), n.sum("judged_4th")
        return (energy * energy / fourth).masked_fill(fourth == 0, 0.0)


def _paired(n: Sums) -> Tensor:
    """Return how many weights are not 0 and have a gradient: none, unless all have one."""
    return n.sum("nonzero_weights") * (n.sum("gradients") == n.sum("finite"))


def _unless(is_none: Tensor, value: Tensor) -> Tensor:
    """Return the value, and NaN where there is none, whatever was computed there."""
    return value.masked_fill(is_none, math.nan)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return (numerator / denominator).masked_fill(denominator == 0, math.nan)


def _per(count: str, total: str) -> Formula:
    return lambda n: _ratio(n.sum(count), n.sum(total))


def _per_pair(count: str) -> Formula:
    return lambda n: _ratio(n.sum(count), _paired(n))


def _rms(squares: str, total: str) -> Formula:
    return lambda n: _ratio(n.sum(squares), n.sum(total)).sqrt()


def _norm_ratio(squares: str, over: str) -> Formula:
    return lambda n: _ratio(n.sum(squares).sqrt(), n.sum(over).sqrt())


def _largest(name: str, among: str) -> Formula:
    return lambda n: _unless(n.sum(among) == 0, n.max(name))


def _smallest(name: str, among: str) -> Formula:
    return lambda n: _unless(n.sum(among) == 0, -n.max(f"minus_{name}"))


def _median_octave(name: str, total: str, first: int) -> Formula:
    """Return the middle, on a logarithmic scale, of the octave that holds the (lower) median."""

    def formula(n: Sums) -> Tensor:
        half = n.sum(total) / 2
        below = n.histogram(name).cumsum(0).transpose(1, 2)
        octave = (below < half).sum(0).clamp(max=OCTAVES - 1)
        is_none = (half == 0) | half.isnan() | below[-1].isnan()
        return _unless(is_none, octave.double() + (first + 0.5))

    return formula


def _deviation(n: Sums, name: str, squares: str, count: Tensor) -> Tensor:
    """Return the sum of squared deviations from the mean: 0 where the smallest is the largest.

    It is NaN where it is lost in the rounding of the sums, which is where the standard deviation is
    below 1e-5 of the mean.
    """
    deviation = n.sum(squares) - n.sum(name) * (n.sum(name) / count)
    deviation = _unless(deviation <= 1e-10 * n.sum(squares), deviation)
    return deviation.masked_fill(n.max(name) == -n.max(f"minus_{name}"), 0.0)


def _grid_error_std(n: Sums) -> Tensor:
    count = n.sum("finite")
    deviation = _deviation(n, "grid_error", "grid_error_sq", count)
    return _unless(count < 2, (deviation / (count - 1)).sqrt())


def _sqnr(n: Sums) -> Tensor:
    signal, noise = n.sum("weight_sq"), n.sum("grid_error_sq")
    decibels = 10 * (signal / noise).log10()
    return _unless(signal == 0, decibels.masked_fill(noise == 0, math.inf))


def _correlation(n: Sums) -> Tensor:
    count = _paired(n)
    gradient = _deviation(n, "paired_gradient_abs", "paired_gradient_sq", count)
    stiffness = _deviation(n, "stiffness", "stiffness_sq", count)
    product = n.sum("paired_gradient_abs") * (n.sum("stiffness") / count)
    common = n.sum("stiffness_gradient") - product
    correlation = (common / (gradient.sqrt() * stiffness.sqrt())).clamp(-1, 1)
    return _unless((count == 0) | (gradient == 0) | (stiffness == 0), correlation)


def _energy_concentration(n: Sums) -> Tensor:
    squares = n.sum("update_sq")
    return _ratio(n.sum("finite") * n.sum("update_4th"), squares * squares)


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
