"""Standard errors of ratios that are estimated from a sample of the elements.

A ratio Σ a / Σ b over the elements of a layer is known from a sample of them without replacement;
that of a model from such samples of its layers, which are strata. The variance follows from the
residuals a − ratio · b, squared and added up, for which three sums of squares are kept.

References:
    Cochran, Sampling Techniques (1977), chapters 2 and 6.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from altgrad.measurement.metrics import Estimate, Formula, Sums

_FEWEST = 30  # with fewer elements that matter, their spread is not known


def estimate_sums(formula: Formula, n: Sums, width: int) -> list[Tensor]:
    """Return what the standard error of an estimate follows from.

    Args:
        formula: The estimate.
        n: The sums of some rows.
        width: 1 for a metric of the parameter, else the number of formats.

    Returns:
        Σ a, Σ b, Σ a², Σ a · b, Σ b² and how many elements carry the ratio: float64, (rows, width)
        each.
    """
    assert isinstance(formula, Estimate)
    sums = (*formula.sums(n), formula.carrying(n))
    return [each if each.shape[1] == width else each.expand(-1, width) for each in sums]


def standard_errors(
    sums: Sequence[Tensor], counted: Tensor, members: Mapping[int, Sequence[int]]
) -> Tensor:
    """Return the standard errors of ratios.

    Args:
        sums: What `estimate_sums` returns, of all estimates side by side: (rows, keys) each.
        counted: The elements that each row stands for, and how many were measured, (rows, 2).
        members: For rows that stand for several layers: which rows these are.

    Returns:
        float64, (rows, keys): 0 where all elements were measured; NaN where the ratio has no value
        or fewer than 30 elements carry it.
    """
    a, b, a_squared, a_b, b_squared, carrying = sums
    population, elements = counted[:, :1], counted[:, 1:]
    per_residual = (1 - elements / population) * elements / (elements - 1)
    is_known = (elements >= population) | (b == 0)

    def variances(ratios: Tensor) -> Tensor:
        """Return the variance of Σ residuals over the sample of each row."""
        residuals = a_squared - 2 * ratios * a_b + ratios * ratios * b_squared
        found = residuals.clamp(min=0) * per_residual
        return found.masked_fill(carrying < _FEWEST, math.nan).masked_fill(is_known, 0.0)

    ratios = a / b
    variance = variances(ratios)
    weights_sq = (population / elements.clamp(min=1)).square()  # elements that each stands for
    for row, layers in members.items():
        of_layers = variances(ratios[row]) * weights_sq
        variance[row] = of_layers.t()[:, [*layers]].sum(1)
    return (variance.sqrt() / b).masked_fill(b == 0, math.nan)
