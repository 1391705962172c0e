"""Compute the confidence interval of 95 % around a figure that a sample estimates.

Of 100 samples, about 95 have an interval that contains the figure of the whole layer. The package
defines a standard error as half of the width of this interval, divided by 1.96. The interval
therefore follows from a figure and its error, and a run file stores these two numbers.

The interval of a ratio is symmetric. A share has Wilson's interval, which stays between 0 and 1,
and is wider than 0 also at the shares 0 and 1.

Read `standard_errors` next, which computes the errors. This file does not import torch, so that
reports start fast.

References:
    Wilson, J. Am. Stat. Assoc. 22 (1927), 209. Brown, Cai, DasGupta, Stat. Sci. 16 (2001), 101,
    section 4.1.1, on shares near 0 and 1.
"""

from __future__ import annotations

import math

from altgrad.measurement.catalogue import get_metric

WIDTH = 1.959963984540054
"""Half of the width of an interval of 95 %, in standard errors.

This is the 97.5 % quantile of the normal distribution, 1.96.
"""
# If fewer than 3 elements of a sample belong to the share, Wilson's lower end is too high, and 0
# replaces it. If all but fewer than 3 belong to it, 1 replaces the upper end (Brown, Cai,
# DasGupta). Numbers of elements are computed back from the error and may be off by rounding, so
# that the limit is not a whole number.
_FEWEST = 2.5


def find_interval(metric: str, figure: float, error: float) -> tuple[float, float]:
    """Return the confidence interval of 95 % around a figure, the value of a metric.

    Args:
        metric: Name of the metric.
        figure: The figure, which a sample estimates.
        error: The standard error of the figure, as `Figures.standard_error` returns it.

    Returns:
        The lower and the upper end. Both equal the figure if the error is 0. Both are NaN if the
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
    """Return the standard error of a share in a sample of elements that were drawn one by one.

    Args:
        share: The share, 0 to 1.
        elements: Number of elements of the sample, more than 0.

    Returns:
        Half of the width of Wilson's interval, divided by 1.96.
    """
    u = WIDTH * WIDTH / elements
    return math.sqrt(u * share * (1 - share) + u * u / 4) / (1 + u) / WIDTH


def _find_share_interval(share: float, half: float) -> tuple[float, float]:
    """Return the lower and the upper end of Wilson's interval of a share, given half of its width.

    The width determines the number of elements, and this number the centre of the interval.
    """
    if half >= 0.5:  # the interval of a sample without elements
        return 0.0, 1.0
    if half * half == 0:  # the square underflows, and u below would be 0 / 0
        return max(share - half, 0.0), min(share + half, 1.0)
    # Half of the width is sqrt(u · share · (1 − share) + u² / 4) / (1 + u) with u = z² / elements
    # and z = WIDTH: a quadratic equation for u with one positive root.
    linear = 2 * half * half - share * (1 - share)
    root = math.sqrt(linear * linear + (1 - 4 * half * half) * half * half)
    # The root can be written in two ways. Use the one that adds two terms of one sign: a difference
    # of nearly equal terms would lose digits.
    u = 2 * half * half / (root - linear) if linear < 0 else (linear + root) / (0.5 - 2 * half**2)
    centre, elements = (share + u / 2) / (1 + u), WIDTH * WIDTH / u
    return (
        0.0 if share * elements < _FEWEST else max(centre - half, 0.0),
        1.0 if (1 - share) * elements < _FEWEST else min(centre + half, 1.0),
    )
