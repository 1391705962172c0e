"""The columns of a measurement: names of the sums and maxima from which all metrics follow.

A layer's measurement is one float64 vector::

    SUMS | FORMAT_SUMS of format 0 | FORMAT_SUMS of format 1 | … | MAXIMA | FORMAT_MAXIMA of 0 | …

Vectors of two shards of a layer, of two layers or of two ranks combine to the vector of the whole:
sums are added, and the larger maximum is kept. Every metric can therefore be computed at every
level. Counts are exact below 2**53, maxima always; a maximum over no element is −inf.

This is the first file to read of this room; `kernel` comes next and computes the columns.
`metrics` says which sums an estimate consists of.
"""

from __future__ import annotations

from altgrad.measurement.catalogue import FORMAT_METRICS, LAYER_METRICS
from altgrad.measurement.histogram import OCTAVES
from altgrad.measurement.metrics import FORMULAS, Estimate


def _octaves(name: str) -> tuple[str, ...]:
    """Return the names of all bins but the first; its count is the total minus the others."""
    return tuple(f"{name}[{bin}]" for bin in range(1, OCTAVES))


# The sums of a row in the kernel's order: plain sums, then sums of squares. Squares come last
# because the kernel computes them as norms, and squares all norms at once.
# An element is left out of all sums if its weight before, weight after or gradient is not finite.
ROW_SUMS = (
    "finite",
    "nonzero_weights",
    "moved",  # update ≠ 0
    "ever_moved",  # update ≠ 0 in this or an earlier observed step, if elements are tracked
    "ulps",
    "gradients",  # elements with a gradient, which may be 0
    "nonzero_gradients",
    "moved_with_gradient",  # update ≠ 0 and gradient ≠ 0
    "paired_gradient_abs",  # Σ |gradient| over weights ≠ 0, for the correlation with stiffness
)
ROW_SQUARES = ("weight_sq", "update_sq", "update_4th", "gradient_sq", "paired_gradient_sq")
ROW_MAXIMA = ("ulps", "paired_gradient_abs")
ROW_MINIMA = ("paired_gradient_abs",)

FORMAT_ROW_SUMS = (
    # Over weights ≠ 0:
    "stiffness",
    "stiffness_gradient",
    "gradient_per_stiffness",
    "gradient_below_stiffness",
    # Over all weights:
    "grid_error",
    "off_grid",
    "stored_nonzero",
    "stored_normal",
    "saturated",
    # What-if, over updates ≠ 0, if weights are stored finer than the format:
    "visible",
    "effective",  # effective update ≠ 0
    "ever_effective",
    "kept",  # Σ effective · update
    "kept_update_cubed",  # Σ effective · update³, for the standard error
    "stochastic_move",
    "stochastic_variance",
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
"""Names of what-if sums, which are 0 if weights are stored no finer than the format.

Updates that stalled are then lost before they can be measured.
"""
JUDGED = {
    "judged": "moved",
    "ever_judged": "ever_moved",
    "judged_sq": "update_sq",
    "judged_4th": "update_4th",
}
"""Names of sums by the format that are copies of a layer's sum, if the format is judged."""

LAYER_ESTIMATES, FORMAT_ESTIMATES = (
    tuple(name for name in metrics if isinstance(FORMULAS[name], Estimate))
    for metrics in (LAYER_METRICS, FORMAT_METRICS)
)
"""Names of the metrics that have a standard error."""
PRODUCTS = ("aa", "ab", "bb")
"""Names of the sums over clusters that an estimate Σ a / Σ b has: Σ A², Σ A · B and Σ B².

A cluster holds blocks that were drawn together; A and B are the sums of a and b over a cluster.
"""


def _products(metrics: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the sums over clusters of some metrics."""
    return tuple(f"{name} {product}" for name in metrics for product in PRODUCTS)


SUMS = (
    "population",  # elements of the layer, for which those measured stand
    "elements",  # elements that were measured
    "clusters",  # clusters that these are drawn in; 0 if elements are drawn one by one
    *(*ROW_SUMS, *ROW_SQUARES),
    *_products(LAYER_ESTIMATES),  # 0 without clusters
    *_octaves("ulps"),  # elements with an update ≠ 0, by its size
    *_octaves("weights"),  # weights ≠ 0, by their size
)
POPULATION, ELEMENTS, CLUSTERS = 0, 1, 2
"""Positions of these three in SUMS."""
FORMAT_SUMS = (
    *(*FORMAT_ROW_SUMS, *FORMAT_ROW_SQUARES, *JUDGED),
    *_products(FORMAT_ESTIMATES),  # 0 without clusters
    *_octaves("steps"),
)
# A minimum is kept as the maximum of the negated quantity, so that one operation combines both.
MAXIMA = (*ROW_MAXIMA, *(f"minus_{name}" for name in ROW_MINIMA))
FORMAT_MAXIMA = (*FORMAT_ROW_MAXIMA, *(f"minus_{name}" for name in FORMAT_ROW_MINIMA))


def sum_count(formats: int) -> int:
    """Return the number of sums in the vector that is a layer's measurement.

    The vector begins with its sums: SUMS, then FORMAT_SUMS for each format.

    Args:
        formats: Number of formats that the layer is measured for.
    """
    return len(SUMS) + formats * len(FORMAT_SUMS)


def max_count(formats: int) -> int:
    """Return the number of maxima in the vector that is a layer's measurement.

    The vector ends with its maxima: MAXIMA, then FORMAT_MAXIMA for each format.

    Args:
        formats: Number of formats that the layer is measured for.
    """
    return len(MAXIMA) + formats * len(FORMAT_MAXIMA)
