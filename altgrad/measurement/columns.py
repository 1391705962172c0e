"""The columns of a measurement: names of the sums and maxima from which all metrics follow.

A row of a measurement is float64: the SUMS of a parameter, the FORMAT_SUMS of each format, then its
MAXIMA and the FORMAT_MAXIMA of each format. Rows of two parts of a parameter, of two layers, ranks
or steps add up to that of the whole, maxima by the larger one, so that every metric can be taken of
any of them. Counts below 2**53 and maxima are exact; a maximum without an element is −inf.
"""

from __future__ import annotations

OCTAVES = 64
"""Bins of a histogram of powers of two, the first and the last without an end."""
FIRST_STEPS_OCTAVE = -32
"""Exponent of the first bin of abs(update) / stiffness; that of ULPs begins at 0."""


def _octaves(name: str) -> tuple[str, ...]:
    """All but the first, which holds the rest of those that moved."""
    return tuple(f"{name}[{bin}]" for bin in range(1, OCTAVES))


# What the row kernel sums, in its order: first plain sums, then sums of squares. An element that is
# not finite in one of the three tensors is in none of them.
ROW_SUMS = (
    "finite",
    "nonzero_weights",
    "moved",  # update ≠ 0
    "ever_moved",  # in this observed step or one before it, where the elements are tracked
    "ulps",
    "gradients",  # elements that have one
    "nonzero_gradients",
    "moved_with_gradient",  # of those with a gradient ≠ 0
    "paired_gradient_abs",  # over weights ≠ 0, for the correlation with the stiffness
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
    # What-if, over updates ≠ 0 of weights that are stored finer than the format:
    "visible",
    "effective",  # effective update ≠ 0
    "ever_effective",
    "kept",  # Σ effective · update
    "kept_update_cubed",  # Σ effective · update³; this and the next are for the standard error
    "stochastic_move",
    "stochastic_variance",
)
FORMAT_ROW_SQUARES = (
    "stiffness_sq",
    "grid_error_sq",
    "kept_sq",  # Σ (effective · update)²
    "lost_sq",  # Σ (effective − update)²
)
FORMAT_ROW_MAXIMA = ("grid_error", "stiffness")
FORMAT_ROW_MINIMA = FORMAT_ROW_MAXIMA
WHAT_IF = (*FORMAT_ROW_SUMS[FORMAT_ROW_SUMS.index("visible") :], "kept_sq", "lost_sq")
"""Nothing where updates that stalled could not be seen."""
JUDGED = {
    "judged": "moved",
    "ever_judged": "ever_moved",
    "judged_sq": "update_sq",
    "judged_4th": "update_4th",
}
"""Sums of the parameter over the updates of which a format was judged, by name."""

SUMS = (
    "population",  # elements that those measured stand for: all of the parameter's
    "elements",  # that were measured
    *(*ROW_SUMS, *ROW_SQUARES),
    *_octaves("ulps"),  # of those that moved
)
POPULATION, ELEMENTS = 0, 1
"""Positions in SUMS."""
FORMAT_SUMS = (*FORMAT_ROW_SUMS, *FORMAT_ROW_SQUARES, *JUDGED, *_octaves("steps"))
MAXIMA = (*ROW_MAXIMA, *(f"minus_{name}" for name in ROW_MINIMA))
FORMAT_MAXIMA = (*FORMAT_ROW_MAXIMA, *(f"minus_{name}" for name in FORMAT_ROW_MINIMA))


def sum_count(formats: int) -> int:
    """Length of the vector of sums for so many formats."""
    return len(SUMS) + formats * len(FORMAT_SUMS)


def max_count(formats: int) -> int:
    """Length of the vector of maxima for so many formats."""
    return len(MAXIMA) + formats * len(FORMAT_MAXIMA)
