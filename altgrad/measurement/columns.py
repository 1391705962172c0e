"""Name the columns of a measurement: the sums and maxima from which all metrics follow.

A layer's measurement is one float64 vector. Each of its numbers is called a column, since the
vectors of several layers are the rows of a table::

    SUMS | FORMAT_SUMS of format 0 | FORMAT_SUMS of format 1 | … | MAXIMA | FORMAT_MAXIMA of 0 | …

The vectors of two chunks, shards or layers combine to the vector of both: sums are added, and the
larger maximum is kept. Every metric can therefore be computed at every level. Counts are exact
below 2**53, maxima always; a maximum over no element is −inf.

In the comments, w is a weight before the step, the update is its change by the step, the effective
update is what the format's grid keeps of that, and the stiffness is the grid's spacing at w.

This is the first file to read of this room; `workspace` and `kernel` come next, and compute the
columns.
"""

from __future__ import annotations

from altgrad.measurement.catalogue import FORMAT_METRICS, LAYER_METRICS
from altgrad.measurement.histogram import OCTAVES
from altgrad.measurement.metrics import FORMULAS, Estimate


def _octaves(name: str) -> tuple[str, ...]:
    """Return the names of 63 bins of a histogram: ``{name}[1]`` to ``{name}[63]``.

    Bin 0 is left out, as its count is the total less the others.
    """
    return tuple(f"{name}[{bin}]" for bin in range(1, OCTAVES))


# ROW_… are the columns that the kernel computes for one row of elements, in its order: plain sums,
# then sums of squares. Squares come last because the kernel computes them as norms, and squares all
# norms at once.
# An element is left out of all sums if its weight before, weight after or gradient is not finite.
ROW_SUMS = (
    "finite",  # elements that are not left out
    "nonzero_weights",  # w ≠ 0
    "moved",  # update ≠ 0
    "ever_moved",  # update ≠ 0 in this or, with ever-moved flags, in an earlier observed step
    "ulps",  # Σ |update| / spacing of the dtype in which the weights are stored
    "gradients",  # elements with a gradient, which may be 0
    "nonzero_gradients",  # gradient ≠ 0
    "moved_with_gradient",  # update ≠ 0 and gradient ≠ 0
    "paired_gradient_abs",  # Σ |gradient| over w ≠ 0, for the correlation with stiffness
)
ROW_SQUARES = ("weight_sq", "update_sq", "update_4th", "gradient_sq", "paired_gradient_sq")
ROW_MAXIMA = ("ulps", "paired_gradient_abs")
ROW_MINIMA = ("paired_gradient_abs",)

FORMAT_ROW_SUMS = (
    # Over w ≠ 0:
    "stiffness",
    "stiffness_gradient",  # Σ stiffness · |gradient|
    "gradient_per_stiffness",  # Σ |gradient| / stiffness
    "gradient_below_stiffness",  # |gradient| < stiffness
    # Over all w; Q(w) is the nearest grid point:
    "grid_error",  # Σ |w − Q(w)|
    "off_grid",  # w ≠ Q(w)
    "stored_nonzero",  # Q(w) ≠ 0
    "stored_normal",  # |Q(w)| ≥ the smallest normal number
    "saturated",  # w is rounded beyond the largest value, if the grid went on there
    # What-if sums, over updates ≠ 0; see WHAT_IF:
    "visible",  # Q(weight after) ≠ Q(w)
    "effective",  # effective update ≠ 0
    "ever_effective",  # effective update ≠ 0 in this or an earlier observed step
    "kept",  # Σ effective · update
    "kept_update_cubed",  # Σ effective · update³, for the standard error
    "stochastic_move",  # Σ of the probability to move, under stochastic rounding
    "stochastic_variance",  # Σ of the variance of the weight, under stochastic rounding
)
FORMAT_ROW_SQUARES = (
    "stiffness_sq",
    "grid_error_sq",
    "kept_sq",  # Σ (effective · update)², for the standard error
    "lost_sq",  # Σ (effective − update)²
)
FORMAT_ROW_MAXIMA = ("grid_error", "stiffness")
FORMAT_ROW_MINIMA = FORMAT_ROW_MAXIMA
WHAT_IF = (*FORMAT_ROW_SUMS[FORMAT_ROW_SUMS.index("visible") :], "kept_sq", "lost_sq")
"""Names of what-if sums, which say what a number format would keep of updates of weights.

They are 0 for a format that is no coarser than the dtype of the weights: updates that the format
would lose are lost in that dtype already, before they can be measured.
"""
JUDGED = {
    "judged": "moved",
    "ever_judged": "ever_moved",
    "judged_sq": "update_sq",
    "judged_4th": "update_4th",
}
"""Names of four sums of a format, each with the name of the layer's sum that it copies.

The copies are denominators of metrics that say what a format would keep of updates. A copy is 0 for
a format that is no coarser than the dtype of the weights, so that the metric becomes NaN: what such
a format would lose is lost already.
"""

LAYER_ESTIMATES, FORMAT_ESTIMATES = (
    tuple(name for name in metrics if isinstance(FORMULAS[name], Estimate))
    for metrics in (LAYER_METRICS, FORMAT_METRICS)
)
"""Names of the metrics that have a standard error: those without a format, and those of a format.

Each is a ratio Σ a / Σ b over elements, see `metrics.Estimate`.
"""
PRODUCTS = ("aa", "ab", "bb")
"""Names of three sums, from which the standard error of a ratio Σ a / Σ b over elements follows.

The elements of a sample form clusters if they were drawn in blocks of neighbours. A and B are the
sums of a and b over one cluster, and the three sums over all clusters are Σ A², Σ A · B and Σ B².
"""


def _products(metrics: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of three sums for each metric, such as ``stall_frac ab``.

    The metric is a ratio Σ a / Σ b over elements. Its sums ``aa``, ``ab`` and ``bb`` are Σ A²,
    Σ A · B and Σ B² over clusters, groups of neighbouring elements. A and B are the sums of a and b
    over one cluster.
    """
    return tuple(f"{name} {product}" for name in metrics for product in PRODUCTS)


SUMS = (
    "population",  # all elements of the layer
    "elements",  # elements that were measured: all of them, or a sample
    "clusters",  # clusters in the sample; 0 if elements were drawn one by one
    *(*ROW_SUMS, *ROW_SQUARES),
    *_products(LAYER_ESTIMATES),  # 0 without clusters
    *_octaves("ulps"),  # elements with an update ≠ 0, by |update| in ULPs
    *_octaves("weights"),  # elements with w ≠ 0, by |w|
)
POPULATION, ELEMENTS, CLUSTERS = 0, 1, 2
"""Positions in SUMS of a layer's number of elements, of measured elements and of clusters.

A cluster is a group of measured elements that were drawn in blocks of neighbours.
"""
FORMAT_SUMS = (
    *(*FORMAT_ROW_SUMS, *FORMAT_ROW_SQUARES, *JUDGED),
    *_products(FORMAT_ESTIMATES),  # 0 without clusters
    *_octaves("steps"),  # elements with an update ≠ 0, by |update| / stiffness; a what-if sum
)
# A minimum is kept as the maximum of the negated quantity, so that one operation combines both.
MAXIMA = (*ROW_MAXIMA, *(f"minus_{name}" for name in ROW_MINIMA))
FORMAT_MAXIMA = (*FORMAT_ROW_MAXIMA, *(f"minus_{name}" for name in FORMAT_ROW_MINIMA))


def sum_count(formats: int) -> int:
    """Return the number of sums in a layer's vector: SUMS, then FORMAT_SUMS for each format.

    Args:
        formats: Number of formats that the layer is measured for.
    """
    return len(SUMS) + formats * len(FORMAT_SUMS)


def max_count(formats: int) -> int:
    """Return the number of maxima in a layer's vector: MAXIMA, then FORMAT_MAXIMA for each format.

    Args:
        formats: Number of formats that the layer is measured for.
    """
    return len(MAXIMA) + formats * len(FORMAT_MAXIMA)
