"""Intervals that contain the figure of a whole layer for 95 of 100 samples.

A standard error is half of the width of such an interval, over 1.96. The interval follows from a
figure and its error, so that a run file holds both by one number each. It is symmetric about a
ratio. That of a share is Wilson's, which lies between 0 and 1 and has a width at 0 and 1, too.

Read `standard_errors` next, which computes the errors. This file does not import torch, so that
reports start fast.

References:
    Wilson, J. Am. Stat. Assoc. 22 (1927), 209. Brown, Cai, DasGupta, Stat. Sci. 16 (2001), 101,
    section 4.1.1, on the ends.
"""

from __future__ import annotations

import math

from altgrad.measurement.catalogue import get_metric

WIDTH = 1.959963984540054
"""The 97.5 % quantile of the normal distribution: standard errors to either side of a figure."""
# Wilson's interval is too narrow at the end of which a sample has fewer than 3 elements. Counts
# follow from an error, and are rounded: this lies between 2 and 3.
_FEWEST = 2.5


def find_interval(metric: str, figure: float, error: float) -> tuple[float, float]:
    """Return the interval of 95 % around a figure.

    Args:
        metric: Name of the metric.
        figure: The figure, which a sample estimates.
        error: Its standard error, as `Figures.standard_error` returns it.

    Returns:
        The lower and the upper end. Both equal the figure if the error is 0, and are NaN if the
        figure or the error is NaN.

    Raises:
        ValueError: The metric is unknown.
    """
    if math.isnan(figure) or math.isnan(error):
        return math.nan, math.nan
    if get_metric(metric).unit != "share" or error == 0:
        return figure - WIDTH * error, figure + WIDTH * error
    return _find_share_interval(figure, WIDTH * error)


def find_share_error(share: float, elements: float) -> float:
    """Return the standard error of a share of elements that were drawn one by one.

    Args:
        share: The share.
        elements: Number of elements, more than 0.

    Returns:
        Half of the width of Wilson's interval, over 1.96.
    """
    u = WIDTH * WIDTH / elements
    return math.sqrt(u * share * (1 - share) + u * u / 4) / (1 + u) / WIDTH


def _find_share_interval(share: float, half: float) -> tuple[float, float]:
    """Return Wilson's interval of a share, from half of its width."""
    if half >= 0.5:  # of no element
        return 0.0, 1.0
    if half * half == 0:  # the square, on which all below rests, underflows
        return max(share - half, 0.0), min(share + half, 1.0)
    # Half of the width is sqrt(u · share · (1 − share) + u² / 4) / (1 + u) with u = z² / elements:
    # a quadratic equation for u with one positive root.
    linear = 2 * half * half - share * (1 - share)
    root = math.sqrt(linear * linear + (1 - 4 * half * half) * half * half)
    # Of the two ways to write the root, the one whose terms have the same sign.
    u = 2 * half * half / (root - linear) if linear < 0 else (linear + root) / (0.5 - 2 * half**2)
    centre, elements = (share + u / 2) / (1 + u), WIDTH * WIDTH / u
    return (
        0.0 if share * elements < _FEWEST else max(centre - half, 0.0),
        1.0 if (1 - share) * elements < _FEWEST else min(centre + half, 1.0),
    )
