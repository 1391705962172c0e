"""Texts and colours of verdicts in tables of the terminal, the HTML page and the loggers.

A verdict says how well a number format would store a layer.
"""

from __future__ import annotations

import math

from altgrad._messages import format_percent
from altgrad.report.calibration import calibration
from altgrad.report.verdicts import Advice, Verdict

_LIMITS = calibration().thresholds
_MANY = 1000  # of which two decimals would say nothing

COLOURS = {
    Verdict.STORES_FINE: "green",
    Verdict.WATCH: "yellow",
    Verdict.NEEDS_REMEDY: "red",
    Verdict.FROZEN: "bold red",
    Verdict.RANGE: "magenta",
    Verdict.UNCERTAIN: "cyan",
    Verdict.NOT_JUDGED: "dim",
}
"""Colour of each verdict, as a style of the library rich."""

MEANINGS = {
    Verdict.STORES_FINE: f"at least {_LIMITS.stores_fine:g} of the update is kept",
    Verdict.WATCH: f"{_LIMITS.needs_remedy:g} to {_LIMITS.stores_fine:g} is kept: stochastic "
    "rounding or Kahan (WeightStorage)",
    Verdict.NEEDS_REMEDY: f"below {_LIMITS.needs_remedy:g}: stochastic rounding, Kahan, or fp32 "
    "master weights",
    Verdict.FROZEN: f"{format_percent(_LIMITS.frozen)} or more of the weights never moved",
    Verdict.RANGE: "weights fall out of the format's range: a finer scale",
    Verdict.UNCERTAIN: "the sample is too small to tell: raise max_elements",
    Verdict.NOT_JUDGED: "no finite update that the format could lose",
}
"""Meaning of each verdict in a few words, for the legend of a table."""
EVIDENCE = {verdict: calibration().evidence(verdict.name) for verdict in Verdict}
"""By verdict a sentence such as “3 of 4 runs like this lost over 10 % of their progress”.

The runs really stored their weights in a format. UNCERTAIN and NOT_JUDGED have an empty text.
"""


def format_kept(kept: float) -> str:
    """Return a kept_update_ratio, how much of an update is kept, as text such as ``0.50``.

    The text has four characters. Rounding keeps a ratio on its side of 0, of 1 and of the
    thresholds of verdicts: 0.996 is ``>.99`` and 0.001 is ``<.01``. A ratio of thousands takes more
    characters, as ``5e+03``. NaN is empty.
    """
    if math.isnan(kept):
        return ""
    if abs(kept) >= _MANY:
        return f"{kept:.0e}"
    rounded = round(kept, 2)
    if kept < 1 <= rounded:
        return ">.99"
    if kept > 0 == rounded:
        return "<.01"
    limits = (_LIMITS.stores_fine, _LIMITS.needs_remedy)
    if any(kept < limit <= rounded for limit in limits):
        return f"{math.floor(1000 * kept) / 1000:.3f}"[1:]  # ".989": without its 0
    return f"{kept:.2f}"


def format_figure(figure: float, limit: float = 1.0) -> str:
    """Return a figure of a twin, such as the share of frozen weights, in about four characters.

    Rounding keeps a figure on its side of 0, of 1 and of `limit`: 0.996 is ``>.99``, 0.001 is
    ``<.01``, and 0.988 with the limit 0.99 is ``.988``. NaN is ``–``.

    Args:
        figure: The figure.
        limit: A threshold that the reader compares figures with.
    """
    if math.isnan(figure):
        return "–"
    if abs(figure) >= _MANY:
        return f"{figure:.0e}"
    rounded = round(figure, 2)
    if figure < 1 <= rounded:
        return ">.99"
    if figure > 0 == rounded:
        return "<.01"
    if figure < limit <= rounded:
        return f"{math.floor(1000 * figure) / 1000:.3f}"[1:]
    return f"{figure:.2f}"


NONFINITE, NONFINITE_MEANING = "NaN", "some elements are NaN or inf: the verdict is on the others"
"""Mark in a cell if elements of the layer are NaN or inf, and the mark's meaning for legends."""


def cell_text(advice: Advice | None) -> str:
    """Return the text of a table's cell for a layer in a format, such as ``fine >.99``.

    The text is empty if `advice` is None. Otherwise the text has the verdict in one word, the
    kept_update_ratio, and the mark ``NaN`` if some elements of the layer are NaN or inf.
    """
    if advice is None:
        return ""
    mark = NONFINITE if advice.nonfinite else ""
    return " ".join(filter(None, (advice.verdict.short, format_kept(advice.kept), mark)))
