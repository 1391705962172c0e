"""Standard errors of ratios that are estimated from a sample of the elements.

A ratio Σ a / Σ b over the elements of a layer is estimated from a sample without replacement. The
ratio of a model is estimated from the samples of its layers, which are strata. The variance follows
from the residuals a − ratio · b of the sample::

    Σ (a − ratio · b)²  =  Σ a²  −  2 · ratio · Σ a · b  +  ratio² · Σ b²

so that three sums of squares are enough. Read `metrics` first, which defines the ratios;
`step_table` comes next and computes all errors of a step.

References:
    Cochran, Sampling Techniques (1977), chapters 2 and 6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from altgrad.measurement.columns import Numbers
from altgrad.measurement.metrics import Estimate, Formula, Sums, quiet

_FEWEST = 30  # elements; the spread of fewer is not known well enough


def estimate_sums(formula: Formula, n: Sums, width: int) -> list[Numbers]:
    """Return the sums from which the standard error of an estimate is computed.

    Args:
        formula: The estimate.
        n: The sums of some rows.
        width: Number of columns: 1 for a metric of the layer, else the number of formats.

    Returns:
        Σ a, Σ b, Σ a², Σ a · b, Σ b² and the number of elements that carry the ratio, float64
        (rows, width) each.
    """
    assert isinstance(formula, Estimate)
    with quiet():
        sums = (*formula.sums(n), formula.carrying(n))
    return [np.broadcast_to(each, (len(each), width)) for each in sums]


def standard_errors(
    sums: Sequence[Numbers], counted: Numbers, members: Mapping[int, Sequence[int]]
) -> Numbers:
    """Return the standard errors of ratios.

    Args:
        sums: Results of `estimate_sums` for all estimates side by side, (rows, keys) each.
        counted: Number of elements that each row stands for, and number measured, float64
            (rows, 2).
        members: Rows of the layers that a model's row stands for, by the model's row.

    Returns:
        Standard errors, float64 (rows, keys). They are 0 if all elements were measured. They are
        NaN if the ratio has no value or fewer than 30 elements carry it.
    """
    with quiet():
        return _standard_errors(sums, counted, members)


def _standard_errors(
    sums: Sequence[Numbers], counted: Numbers, members: Mapping[int, Sequence[int]]
) -> Numbers:
    a, b, a_squared, a_b, b_squared, carrying = sums
    population, elements = counted[:, :1], counted[:, 1:]
    # Cochran's (1 − f) · n / (n − 1), with f the share that was measured.
    per_residual = (1 - elements / population) * elements / (elements - 1)
    is_known = (elements >= population) | (b == 0)

    def variances(ratios: Numbers) -> Numbers:
        """Return the variance of Σ residuals of each row, with the share sampled accounted for."""
        residuals = a_squared - 2 * ratios * a_b + ratios * ratios * b_squared
        found = np.where(carrying < _FEWEST, np.nan, np.maximum(residuals, 0) * per_residual)
        return np.where(is_known, 0.0, found)

    ratios = a / b
    variance = variances(ratios)
    weights = population / np.maximum(elements, 1)  # each stands for so many
    for row, layers in members.items():
        # Strata are independent: the variances of the layers add up, about the model's own ratio.
        layer_variances = variances(ratios[row]) * np.square(weights)
        variance[row] = layer_variances[[*layers]].sum(0)
    return np.where(b == 0, np.nan, np.sqrt(variance) / b)
