"""Compute the standard errors of ratios that are estimated from a sample of the elements.

Each element has a number a and a number b, and the ratio of a layer is Σ a / Σ b. For
``stall_frac``, a is 1 if the element's update stalled, and b is 1 if the update is other than 0.

Units are drawn without replacement. A unit is an element. If elements are drawn in blocks of
neighbours, as for formats with a scale for each block, a unit is a cluster of such blocks. The
ratio of a model is estimated from the samples of its layers, which are strata. The variance follows
from the residuals a − ratio · b of the units, less their mean in each layer::

    Σ (a − ratio · b)²  =  Σ a²  −  2 · ratio · Σ a · b  +  ratio² · Σ b²

so that three sums over units are enough. A standard error is half of the width of the interval of
95 %, divided by 1.96: read `intervals` first.

`step_table` comes next, and computes all errors of a step.

References:
    Cochran, Sampling Techniques (1977), chapters 2, 5, 6 and 9. Korn, Graubard, Survey
    Methodology 24 (1998), 193: intervals of shares from samples of clusters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from altgrad.measurement.columns import PRODUCTS
from altgrad.measurement.intervals import WIDTH
from altgrad.measurement.metrics import FORMULAS, Estimate, Share, Sums, quiet
from altgrad.measurement.numbers import Numbers

# An error is NaN if the sample has fewer units than this, as the spread between so few units is not
# known. tests/measurement/test_coverage.py measures how many intervals contain the truth. Higher
# limits would drop the samples with the widest intervals, and of the others fewer would contain it.
# Units are counted as units of equal b: (Σ b)² / Σ b².
_FEWEST_CLUSTERS = 5
# Limits if units are elements, for ratios that are no shares, such as kept_update_ratio. In these
# an element counts by the square of its update. Shares of elements have no limit.
_FEWEST_ELEMENTS_KEPT = 15
_FEWEST_MOVED = 100  # elements with b other than 0, also if units are clusters
# Degrees of freedom of Student's distribution, at least: below, the quantile is not accurate.
_LEAST_FREEDOM = 3.0


class EstimateSums(NamedTuple):
    """The sums of some estimates Σ a / Σ b, float64 (rows, keys) each.

    Each element has an a and a b. For ``stall_frac``, a is 1 if the element's update stalled, and
    b is 1 if the update is other than 0. A unit is an element, or a cluster of elements with the
    sums of their a and b. A row is a layer or a model. A key is ``metric`` or ``metric/format``.

    Attributes:
        a: Σ a.
        b: Σ b.
        aa: Σ a² over units.
        ab: Σ a · b over units.
        bb: Σ b² over units.
        carrying: Number of elements with b other than 0.
        is_share: 1 for shares of elements; 0 for ratios in which an element counts by the square of
            its update or weight, such as kept_update_ratio.
    """

    a: Numbers
    b: Numbers
    aa: Numbers
    ab: Numbers
    bb: Numbers
    carrying: Numbers
    is_share: Numbers


def estimate_sums(name: str, n: Sums, width: int) -> EstimateSums:
    """Return the sums from which the standard error of a metric, a ratio Σ a / Σ b, follows.

    Args:
        name: Name of the metric, whose formula is an `Estimate`.
        n: The sums of some layers or models, a row for each.
        width: Number of keys: 1 for a metric without formats, else the number of formats.

    Returns:
        The sums, (rows, width) each. Units are clusters in rows of layers whose sample was drawn in
        clusters of neighbours, and elements in other rows.
    """
    formula = FORMULAS[name]
    assert isinstance(formula, Estimate)
    with quiet():
        by_element = formula.squares(n)
    by_cluster = (n.sum(f"{name} {product}") for product in PRODUCTS)
    has_clusters = n.sum("clusters") > 0
    squares = (np.where(has_clusters, *pair) for pair in zip(by_cluster, by_element, strict=True))
    is_share = np.array([[float(isinstance(formula, Share))]])
    sums = (*formula.sums(n), *squares, formula.carrying(n), is_share)
    shape = len(has_clusters), width
    return EstimateSums(*(np.broadcast_to(each, shape) for each in sums))


def standard_errors(
    sums: EstimateSums, counted: Numbers, members: Mapping[int, Sequence[int]]
) -> Numbers:
    """Return the standard errors of ratios Σ a / Σ b that are estimated from samples of layers.

    Each element has an a and a b. For ``stall_frac``, a is 1 if the element's update stalled, and
    b is 1 if the update is other than 0. A unit is an element, or a cluster of neighbours that were
    drawn together.

    Args:
        sums: Results of `estimate_sums` for all ratios side by side, (rows, keys) each.
        counted: For each layer or model its number of elements, its number of measured elements,
            and the number of clusters of these, 0 without clusters, float64 (rows, 3).
        members: For each row of a model, the rows of the layers that form the model.

    Returns:
        Standard errors, float64 (rows, keys). They are 0 if all elements were measured. They are
        NaN if the ratio has no value, or if too few units have a b other than 0.
    """
    with quiet():
        strata = _Strata(sums, counted)
        ratios = sums.a / sums.b
        spreads = strata.spreads(ratios)
        for row, layers in members.items():
            # The samples of layers are independent, so that their variances add up. Residuals are
            # those from the ratio of the model, and not from the ratio of each layer.
            own = strata.spreads(ratios[row])
            for column, spread in zip(spreads, own, strict=True):
                column[row] = spread[[*layers]].sum(0)
        return _combine(sums, ratios, spreads, strata.weights)


class _Spreads(NamedTuple):
    """Sums from which the errors of ratios Σ a / Σ b follow; each float64 (rows, keys).

    Each element has an a and a b. For ``stall_frac``, a is 1 if the element's update stalled, and
    b is 1 if the update is other than 0. A unit is an element, or a cluster of elements with the
    sums of their a and b. Sums over units are multiplied by (population / measured elements)², to
    stand for the whole layer. Where every element of a layer was measured, no error is left, and
    all sums are set to 0. A row is a layer or a model, and a key is ``metric`` or
    ``metric/format``.

    Attributes:
        variance: Variance of Σ (a − ratio · b), where the ratio is Σ a / Σ b.
        b_variance: Σ b² over units, times the share of the layer's elements that was not measured.
        aa: Σ a² over units.
        rest: Σ (b − a)² over units.
        bb: Σ b² over units.
        carrying: Number of measured elements with b other than 0.
        clusters: Number of clusters; 0 if units are elements.
    """

    variance: Numbers
    b_variance: Numbers
    aa: Numbers
    rest: Numbers
    bb: Numbers
    carrying: Numbers
    clusters: Numbers


class _Strata:
    """The layers of a model as strata: parts that were sampled separately, by elements or clusters.

    Args:
        sums: Σ a, Σ b and the other sums of each estimate Σ a / Σ b, float64 (rows, keys) each. A
            row is a layer or a model, and a key is ``metric`` or ``metric/format``.
        counted: For each layer or model its number of elements, its number of measured elements,
            and the number of clusters of these, 0 without clusters, float64 (rows, 3).

    Attributes:
        weights: Number of elements over number of measured elements, float64 (rows, 1).
    """

    def __init__(self, sums: EstimateSums, counted: Numbers) -> None:
        population, elements, self._clusters = counted[:, :1], counted[:, 1:2], counted[:, 2:]
        self._sums = sums
        self.weights = population / np.maximum(elements, 1)
        self._units = np.where(self._clusters > 0, self._clusters, elements)
        self._not_drawn = 1 - elements / population
        self._is_drawn = (elements < population) & (sums.b != 0)

    def spreads(self, ratios: Numbers) -> _Spreads:
        """Return the sums of each layer from which standard errors of ratios Σ a / Σ b follow.

        Each element has an a and a b. For ``stall_frac``, a is 1 if the element's update stalled,
        and b is 1 if the update is other than 0. The residuals a − ratio · b of the sampled
        elements or clusters say how far the ratio may be off.

        Args:
            ratios: The ratio of each row, float64 (rows, keys), for errors of layers. For the error
                of a model, the ratios of the model, float64 (keys).

        Returns:
            A `_Spreads`: the variance of Σ (a − ratio · b), Σ a² and others. They are 0 for layers
            of which all elements were measured, and where Σ b is 0.
        """
        a, b, aa, ab, bb, carrying, _ = self._sums
        # Subtract the mean x of the stratum's residuals: Σ (x − mean)² = Σ x² − (Σ x)² / units.
        residuals = aa - 2 * ratios * ab + ratios * ratios * bb
        residuals = residuals - np.square(a - ratios * b) / self._units
        # If a = 0 in all units, or a = b in all, residuals are 0, but the next unit drawn could be
        # the first one that differs. Assume the residual of one unit of the usual size, at least.
        is_uniform = (aa == 0) | ((aa == ab) & (ab == bb))
        residuals = np.maximum(residuals, np.where(is_uniform, np.square(bb / b), 0))
        # The factor n / (n − 1), since residuals are from a mean of the same n units.
        variance = residuals * self._units / np.maximum(self._units - 1, 1)
        scale = np.where(self._is_drawn, np.square(self.weights), 0)
        drawn = np.where(self._is_drawn, 1.0, 0.0)
        return _Spreads(
            *(
                np.where(each > 0, each * value, 0.0)
                for each, value in (
                    (scale, variance * self._not_drawn),
                    (scale, bb * self._not_drawn),
                    (scale, aa),
                    (scale, bb - 2 * ab + aa),
                    (scale, bb),
                    (drawn, carrying),
                    (drawn, self._clusters),
                )
            )
        )


def _combine(sums: EstimateSums, ratios: Numbers, spreads: _Spreads, weights: Numbers) -> Numbers:
    """Compute standard errors of ratios: half of the width of their intervals, divided by 1.96.

    A ratio is Σ a / Σ b over elements. For ``stall_frac``, a is 1 if the element's update stalled,
    and b is 1 if the update is other than 0.

    Args:
        sums: Σ a, Σ b and the other sums over the measured elements, (rows, keys) each.
        ratios: The ratios Σ a / Σ b, float64 (rows, keys).
        spreads: For each ratio the sums of its layer, or of all layers of its model, that say how
            far the ratio may be off.
        weights: Number of elements over number of measured elements, float64 (rows, 1).

    Returns:
        Standard errors, float64 (rows, keys). They are 0 if all elements were measured. They are
        NaN if the ratio has no value, or if too few units have a b other than 0.
    """
    a, b, is_share = weights * sums.a, weights * sums.b, sums.is_share > 0
    has_clusters, units = spreads.clusters > 0, b * b / spreads.bb
    # A variance that few units determine is uncertain, and Student's distribution widens the
    # interval. (Σ x)² / Σ x² is the number of units of equal x. Take the least of these numbers for
    # b, for a (a coarse format keeps the updates of a few elements alone), and, of clusters, for
    # b − a. For single elements, b − a has either sign, and says nothing. A share of single
    # elements needs no such number: its variance follows from the share itself.
    carriers = np.fmin(units, a * a / spreads.aa)
    by_cluster = np.fmin(carriers, np.square(b - a) / spreads.rest)
    freedom = np.maximum(np.where(has_clusters, by_cluster, carriers) - 1, _LEAST_FREEDOM)
    width = np.where(is_share & ~has_clusters, WIDTH, _student_quantile(freedom))
    variance = spreads.variance / (b * b)
    # The share in n independent elements has the variance share · (1 − share) / n. Solve for n, and
    # take Wilson's interval of n elements (Korn, Graubard). At the shares 0 and 1, where n has no
    # value, take n from the sizes of the units instead.
    product = ratios * (1 - ratios)
    elements = np.where(product > 0, product / variance, b * b / spreads.b_variance)
    u = width * width / elements
    share_half = np.sqrt(u * np.maximum(product, 0) + u * u / 4) / (1 + u)
    half = np.where(is_share, share_half, width * np.sqrt(variance))
    few_elements = np.where(is_share, 0, _FEWEST_ELEMENTS_KEPT)
    few_units = np.where(has_clusters, _FEWEST_CLUSTERS, few_elements)
    is_unknown = (units < few_units) | (~is_share & (spreads.carrying < _FEWEST_MOVED))
    errors = np.where(is_unknown, np.nan, half / WIDTH)
    errors = np.where(spreads.bb == 0, 0.0, errors)  # all elements were measured
    return np.where(sums.b == 0, np.nan, errors)


def _student_quantile(freedom: Numbers) -> Numbers:
    """Return the 97.5 % quantile of Student's distribution for 3 or more degrees of freedom.

    Accurate to 1 %: Abramowitz, Stegun, Handbook of Mathematical Functions (1964), 26.7.5.
    """
    z = WIDTH
    terms: tuple[float, ...] = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    quantile = np.full_like(freedom, z)
    for power, term in enumerate(terms, 1):
        quantile += term / freedom**power
    return quantile
