"""Compute each metric of the catalogue from sums, extrema and histograms.

A formula takes the sums of any number of rows, on the host, and returns a figure for each row. A
row is a layer or a model. `FORMULAS` at the end lists all formulas; a new metric is a line there
and a line of `catalogue`. An `Estimate` is a formula whose metric also has a standard error.

Read `columns` first, which describes the sums; `standard_errors` comes next.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from altgrad.measurement.histogram import FIRST_STEPS_OCTAVE, OCTAVES
from altgrad.measurement.numbers import Numbers


class Sums(Protocol):
    """A source of sums, extrema and histograms over the elements of layers, by name.

    All are float64 on the host, with a row for each layer or model. A sum such as Σ weight² has
    shape (rows, 1). A sum that depends on a number format, such as the count of updates that bf16
    would lose, has shape (rows, formats). `altgrad.measurement.columns` lists the names.
    """

    def sum(self, name: str) -> Numbers:
        """Return a sum over elements by name, float64 (rows, 1 or formats).

        A row is a layer or a model. SUMS and FORMAT_SUMS in `altgrad.measurement.columns` list the
        names.
        """

    def max(self, name: str) -> Numbers:
        """Return a maximum over elements by name, float64 (rows, 1 or formats).

        A row is a layer or a model. MAXIMA and FORMAT_MAXIMA in `altgrad.measurement.columns` list
        the names.
        """

    def histogram(self, name: str) -> Numbers:
        """Return the number of elements in each octave, from a power of two up to the next.

        Args:
            name: ``"ulps"``, ``"weights"`` or ``"steps"``.

        Returns:
            Counts, float64 (64, 1 or formats, rows), a row for each layer or model.
        """


Formula = Callable[[Sums], Numbers]
"""A function that takes sums over elements, and returns the figures (values) of a metric.

The figures are float64 (rows, 1 or formats), with a row for each layer or model.
"""

Flags = npt.NDArray[np.bool_]
"""Conditions on the host, bool (rows, 1 or formats), with a row for each layer or model."""


def quiet() -> AbstractContextManager[object]:
    """Return a context in which NumPy gives NaN or inf, such as for 0 / 0, without a warning."""
    return np.errstate(all="ignore")


class Estimate(ABC):
    """A ratio Σ a / Σ b over elements, with a standard error if the elements are a sample.

    Each element has a number a and a number b. For ``stall_frac``, a is 1 if the element's update
    stalled, and b is 1 if the update is other than 0.

    Attributes:
        plus: Name of the sum Σ a, or of a sum from which `minus` is subtracted to get Σ a.
        total: Name of the sum Σ b.
        minus: Name of the sum to subtract; None to subtract nothing.
    """

    plus: str
    total: str
    minus: str | None

    @abstractmethod
    def squares(self, n: Sums) -> tuple[Numbers, Numbers, Numbers]:
        """Return Σ a², Σ a · b and Σ b² over elements, from which a standard error follows.

        Each element has a number a and a number b, and the metric is Σ a / Σ b. For ``stall_frac``,
        b is 1 if the element's update is other than 0, and a is 1 if a format keeps nothing of it.

        Args:
            n: The sums over elements of some layers or models, a row for each.

        Returns:
            Σ a², Σ a · b and Σ b², float64 (rows, 1 or formats) each.
        """

    @abstractmethod
    def carrying(self, n: Sums) -> Numbers:
        """Return how many elements of each layer have a b other than 0, and so count in the metric.

        Each element has a number a and a number b, and the metric is Σ a / Σ b. For ``stall_frac``,
        b is 1 if the element's update is other than 0, and a is 1 if a format keeps nothing of it.

        Args:
            n: The sums over elements of some layers or models, a row for each.

        Returns:
            Numbers of elements, float64 (rows, 1 or formats).
        """

    def sums(self, n: Sums) -> tuple[Numbers, Numbers]:
        """Return Σ a and Σ b over elements, whose ratio Σ a / Σ b is the metric.

        Args:
            n: The sums of some layers or models, a row for each.

        Returns:
            Σ a and Σ b, float64 (rows, 1 or formats) each.
        """
        a = n.sum(self.plus)
        return (a - n.sum(self.minus) if self.minus else a), n.sum(self.total)

    def __call__(self, n: Sums) -> Numbers:
        """Compute the metric: the ratio Σ a / Σ b over the elements of each layer.

        Each element has a number a and a number b.

        Args:
            n: The sums of some layers or models, a row for each.

        Returns:
            The ratios, float64 (rows, 1 or formats); NaN where Σ b is 0.
        """
        return _ratio(*self.sums(n))


@dataclass(frozen=True)
class Share(Estimate):
    """A share of elements, (plus − minus) / total.

    Attributes:
        plus: Name of a count of elements.
        total: Name of the count of all elements considered, among which are those of `plus`.
        minus: Name of a count to subtract, of elements among those of `plus`; None for 0.
    """

    plus: str
    total: str
    minus: str | None = None

    def squares(self, n: Sums) -> tuple[Numbers, Numbers, Numbers]:
        """Return Σ a², Σ a · b and Σ b² of a share, which are counts of elements.

        a is 1 for an element in the share, b is 1 for an element considered, and both are 0 for
        others. Therefore a² = a · b = a, and b² = b.

        Args:
            n: The sums of some layers or models, a row for each.

        Returns:
            Σ a², Σ a · b and Σ b², float64 (rows, 1 or formats) each.
        """
        count, total = self.sums(n)
        return count, count, total

    def carrying(self, n: Sums) -> Numbers:
        """Return the denominator of the share: how many elements are considered.

        For ``stall_frac``, these are the elements with an update other than 0.

        Args:
            n: The sums over elements of some layers or models, a row for each.

        Returns:
            Numbers of elements, float64 (rows, 1 or formats). There is a number for each number
            format if the share depends on the format, otherwise one.
        """
        return n.sum(self.total)


@dataclass(frozen=True)
class KeptShare(Estimate):
    """The ratio ⟨effective update, update⟩ / ⟨update, update⟩, which is kept_update_ratio.

    The effective update is what a number format keeps of an update. An element adds a = effective ·
    update to the numerator and b = update² to the denominator.

    Attributes:
        plus: Name of the sum Σ a.
        total: Name of the sum Σ b.
        minus: None: nothing is subtracted.
    """

    plus: str = "kept"
    total: str = "judged_sq"
    minus: None = None

    def squares(self, n: Sums) -> tuple[Numbers, Numbers, Numbers]:
        """Return Σ a², Σ a · b and Σ b² with a = effective · update and b = update².

        The effective update is what a number format keeps of an element's update.

        Args:
            n: The sums of some layers or models, a row for each.

        Returns:
            Σ a², Σ a · b and Σ b², float64 (rows, formats) each.
        """
        return n.sum("kept_sq"), n.sum("kept_update_cubed"), n.sum("judged_4th")

    def carrying(self, n: Sums) -> Numbers:
        """Return how many elements have an update other than 0, for each layer and number format.

        Args:
            n: The sums over elements of some layers or models, a row for each.

        Returns:
            Numbers of elements, float64 (rows, formats); 0 for a format that is no coarser than the
            dtype of the weights.
        """
        return n.sum("judged")


# Steps of formulas, on numbers:


def _count_pairs(n: Sums) -> Numbers:
    """Return the number of weights other than 0, float64 (rows, 1); 0 for rows without gradients.

    Some metrics pair the gradient at such a weight with the spacing of a format there, the distance
    between neighbouring numbers of the format.
    """
    # A count of 0 makes the metrics of pairs NaN. A model has no gradients if a layer has none.
    return np.where(n.sum("gradients") == n.sum("finite"), n.sum("nonzero_weights"), 0.0)


def _unless(is_undefined: Flags, value: Numbers) -> Numbers:
    """Return `value`, replaced by NaN where `is_undefined` is True."""
    return np.where(is_undefined, np.nan, value)


def _ratio(numerator: Numbers, denominator: Numbers) -> Numbers:
    """Divide element by element; NaN where the denominator is 0, as nothing is counted."""
    return np.where(denominator == 0, np.nan, numerator / denominator)


# Functions that return a formula. They take names of sums and extrema:


def _per(count: str, total: str) -> Formula:
    """Return the formula of a mean: the sum named `count`, divided by the count named `total`."""
    return lambda n: _ratio(n.sum(count), n.sum(total))


def _per_pair(count: str) -> Formula:
    """Return the formula of a mean over weights other than 0: a sum divided by their number.

    The sum is of a quantity that compares the gradient at a weight with the spacing of a format
    there, the distance between neighbouring numbers of the format. The mean is NaN if there are no
    gradients.

    Args:
        count: Name of the sum of the quantity, such as ``gradient_per_stiffness``.
    """
    return lambda n: _ratio(n.sum(count), _count_pairs(n))


def _rms(squares: str, total: str) -> Formula:
    """Return the formula of an RMS, from the sum named `squares` and the count named `total`."""
    return lambda n: np.sqrt(_ratio(n.sum(squares), n.sum(total)))


def _norm_ratio(squares: str, over: str) -> Formula:
    """Return the formula of a ratio of two norms, from the names of two sums of squares."""
    # Roots first: the quotient of the squares may leave the range of float64.
    return lambda n: _ratio(np.sqrt(n.sum(squares)), np.sqrt(n.sum(over)))


def _largest(name: str, among: str) -> Formula:
    """Return the formula of the maximum `name`; NaN where the count named `among` is 0."""
    return lambda n: _unless(n.sum(among) == 0, n.max(name))


def _smallest(name: str, among: str) -> Formula:
    """Return the formula of the minimum `name`; NaN where the count named `among` is 0."""
    # A minimum is kept as the maximum of the negated quantity.
    return lambda n: _unless(n.sum(among) == 0, -n.max(f"minus_{name}"))


def _median_octave(name: str, total: str, first: int) -> Formula:
    """Return the formula of log2 of a median, from a histogram by octaves.

    An octave reaches from a power of two up to the next. The result is the middle of the octave
    with the median, such as 3.5 for an octave from 2**3 to 2**4.

    Of an even number of elements, the median is the lower one of the two in the middle.

    Args:
        name: Name of the histogram.
        total: Name of the count of its elements.
        first: Exponent of the histogram's first bin.
    """

    def formula(n: Sums) -> Numbers:
        half = n.sum(total) / 2
        # The first octave up to which at least half of the elements lie.
        below = n.histogram(name).cumsum(0).swapaxes(1, 2)
        octave = np.minimum((below < half).sum(0), OCTAVES - 1)
        is_undefined = (half == 0) | np.isnan(half) | np.isnan(below[-1])
        return _unless(is_undefined, octave + (first + 0.5))

    return formula


def _deviation(n: Sums, name: str, squares: str, count: Numbers) -> Numbers:
    """Return for each layer the sum of squared deviations of a quantity from its mean.

    The result is 0 if all values are equal. It is NaN if the standard deviation is below 1e-5 of
    the mean, since rounding of the sums may then exceed the result.

    Args:
        n: The sums of some layers or models, a row for each.
        name: Name of the sum of the quantity.
        squares: Name of the sum of the quantity's squares.
        count: Number of elements in the sums, float64 (rows, 1).

    Returns:
        Sums of squared deviations, float64 (rows, 1 or formats).
    """
    deviation = n.sum(squares) - n.sum(name) * (n.sum(name) / count)
    # Rounding is of the order of n · 2**-53 of the sum of squares; 1e-10 leaves room for large n.
    deviation = _unless(deviation <= 1e-10 * n.sum(squares), deviation)
    return np.where(n.max(name) == -n.max(f"minus_{name}"), 0.0, deviation)


def _grid_error_std(n: Sums) -> Numbers:
    count = n.sum("finite")
    deviation = _deviation(n, "grid_error", "grid_error_sq", count)
    # The standard deviation of a sample, over count − 1.
    return _unless(count < 2, np.sqrt(deviation / (count - 1)))


def _sqnr(n: Sums) -> Numbers:
    # 10 · log10 of a ratio of powers; inf if every weight is on the grid.
    signal, noise = n.sum("weight_sq"), n.sum("grid_error_sq")
    decibels = 10 * np.log10(signal / noise)
    return _unless(signal == 0, np.where(noise == 0, np.inf, decibels))


def _correlation(n: Sums) -> Numbers:
    # Pearson's correlation of |gradient| and stiffness, from sums: cov / sqrt(var · var).
    count = _count_pairs(n)
    gradient = _deviation(n, "paired_gradient_abs", "paired_gradient_sq", count)
    stiffness = _deviation(n, "stiffness", "stiffness_sq", count)
    product = n.sum("paired_gradient_abs") * (n.sum("stiffness") / count)
    common = n.sum("stiffness_gradient") - product
    correlation = np.clip(common / (np.sqrt(gradient) * np.sqrt(stiffness)), -1, 1)
    return _unless((count == 0) | (gradient == 0) | (stiffness == 0), correlation)


def _energy_concentration(n: Sums) -> Numbers:
    # n · Σ d⁴ / (Σ d²)²: 1 if all updates are equal, n if a single element has the whole update.
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
    # Metrics of a format:
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
"""The formula that computes each metric from sums, by name, in the order of the catalogue."""
