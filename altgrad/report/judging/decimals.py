"""Write shares with two decimals, each on its side of 0, of 1 and of the thresholds of verdicts.

A share of 0.9796 is 0.97 in a table or a sentence, and not 0.98: a verdict begins at 0.98, and the
text stands beside the verdict. All shares have this one style, so that a reader can compare them.

Read `calibration` first; `summaries` and the tables of a report write shares with these functions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from altgrad.report.judging.calibration import calibration

_TWINS, _STEPS = calibration().thresholds, calibration().step_thresholds
_BEGINNINGS = (
    *(_TWINS.stores_fine, _TWINS.needs_remedy, _TWINS.frozen_kept),
    *(_STEPS.stores_fine, _STEPS.needs_remedy),
)
"""Shares of the progress at which a verdict begins, by twins and by single steps."""
_MANY = 1000  # of which two decimals would say nothing
_HUNDREDTH = 0.01


def format_kept(kept: float) -> str:
    """Return a share of the progress that is kept as text with two decimals, such as ``0.50``.

    Rounding keeps the share on its side of 0, of 1 and of the thresholds of verdicts. As a verdict
    begins at 0.98, 0.9796 is ``0.97``; 0.9999 is ``0.99``, and 0.001 is ``0.01``. A share of 1.1001
    overshoots and is ``1.11``. A share of thousands is ``5e+03``. NaN is empty.
    """
    if math.isnan(kept):
        return ""
    text = _round_below(kept, _BEGINNINGS)
    is_over = float(text) <= _TWINS.overshoots < kept
    return f"{float(text) + _HUNDREDTH:.2f}" if is_over else text


def format_lost(kept: float) -> str:
    """Return the share of the progress that is lost, as the rest of `format_kept` to 1.

    A share of 0.9796 is kept as ``0.97``, so that ``0.03`` is lost. NaN is empty.
    """
    return "" if math.isnan(kept) else f"{1 - float(format_kept(kept)):.2f}"


def format_interval(low: float, high: float) -> str:
    """Return the ends of an interval of shares, as ``0.55 to 0.89``.

    The text is empty if both ends have the same text or no value: such an interval says nothing.

    Args:
        low: The lower end.
        high: The upper end.
    """
    first, last = format_kept(low), format_kept(high)
    return "" if first == last else f"{first} to {last}"


def format_figure(figure: float, limit: float = 1.0) -> str:
    """Return a figure of a twin, such as the share of frozen weights, with two decimals.

    A *twin* is a sample of the layers that is stored and stepped as a recipe says.

    Rounding keeps a figure on its side of 0, of 1 and of `limit`: 0.996 is ``0.99``, 0.001 is
    ``0.01``, and 0.989 with the limit 0.99 is ``0.98``. NaN is ``–``.

    Args:
        figure: The figure.
        limit: A threshold that the reader compares figures with.
    """
    return "–" if math.isnan(figure) else _round_below(figure, (limit,))


def format_difference(difference: float) -> str:
    """Return the distance of two figures with two decimals, rounded to nearest; NaN is ``–``."""
    return "–" if math.isnan(difference) else f"{difference:.2f}"


def format_error(error: float) -> str:
    """Return a distance of weights as a share of their size, such as ``0.06``.

    A distance above the largest that is fine, 0.05, is not rounded down to it.
    """
    text = _round_below(error, ())
    is_over = float(text) <= _TWINS.weight_error < error
    return f"{float(text) + _HUNDREDTH:.2f}" if is_over else text


def _round_below(figure: float, limits: Iterable[float]) -> str:
    """Return a figure with two decimals, rounded so that it crosses none of some limits.

    A figure below 1 or below one of `limits` is not rounded up to it, and one above 0 is at least
    ``0.01``: 0.996 is ``0.99``.
    """
    if abs(figure) >= _MANY:
        return f"{figure:.0e}"
    rounded = round(figure, 2)
    if any(figure < limit <= rounded for limit in (0, 1, *limits)):
        rounded -= _HUNDREDTH
    if figure > 0 == rounded:
        rounded = _HUNDREDTH
    return f"{rounded:.2f}"
