"""Texts and colours of verdicts in tables of the terminal, the HTML page and the loggers.

A verdict says whether a layer would make its progress if it were stored as a *recipe* says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from altgrad.report.judging.calibration import calibration
from altgrad.report.judging.verdicts import Advice, Verdict

_LIMITS = calibration().thresholds
_MANY = 1000  # of which two decimals would say nothing

COLOURS = {
    Verdict.STORES_FINE: "green",
    Verdict.WATCH: "yellow",
    Verdict.NEEDS_REMEDY: "red",
    Verdict.FROZEN: "bold red",
    Verdict.STUCK: "bold red",
    Verdict.OVERSHOOTS: "magenta",
    Verdict.BREAKS: "bold red",
    Verdict.RANGE: "magenta",
    Verdict.UNCERTAIN: "cyan",
    Verdict.NOT_JUDGED: "dim",
}
"""Colour of each verdict, as a style of the library rich."""

MEANINGS = {
    Verdict.STORES_FINE: f"at least {_LIMITS.stores_fine:g} of the progress is kept, weights are "
    f"off by at most {100 * _LIMITS.weight_error:g} %",
    Verdict.WATCH: f"{_LIMITS.needs_remedy:g} to {_LIMITS.stores_fine:g} is kept, or weights are "
    "further off",
    Verdict.NEEDS_REMEDY: f"below {_LIMITS.needs_remedy:g}: stochastic rounding, Kahan, or fp32 "
    "master weights",
    Verdict.FROZEN: f"at least {100 * _LIMITS.frozen:g} % of the weights that float32 moved "
    "never moved",
    Verdict.STUCK: "moved at first, and no longer does",
    Verdict.OVERSHOOTS: f"moves more than {_LIMITS.overshoots:g} times as far as float32",
    Verdict.BREAKS: "becomes NaN or inf",
    Verdict.RANGE: "weights fall out of the format's range, and a scale would help",
    Verdict.UNCERTAIN: "the sample is too small to tell: raise twin_elements or max_elements",
    Verdict.NOT_JUDGED: "nothing moved that the recipe could lose",
}
"""Meaning of each verdict in a few words, for the legend of a table."""


def format_kept(kept: float) -> str:
    """Return the share of the progress that is kept as text such as ``0.50``.

    The text has four characters. Rounding keeps a ratio on its side of 0, of 1 and of the
    thresholds of verdicts: 0.996 is ``>.99`` and 0.001 is ``<.01``. A ratio of thousands takes more
    characters, as ``5e+03``. NaN is empty.
    """
    limits = (_LIMITS.stores_fine, _LIMITS.needs_remedy)
    return "" if math.isnan(kept) else _round_beside(kept, limits)


def format_figure(figure: float, limit: float = 1.0) -> str:
    """Return a figure of a twin, such as the share of frozen weights, in about four characters.

    Rounding keeps a figure on its side of 0, of 1 and of `limit`: 0.996 is ``>.99``, 0.001 is
    ``<.01``, and 0.988 with the limit 0.99 is ``.988``. NaN is ``–``.

    Args:
        figure: The figure.
        limit: A threshold that the reader compares figures with.
    """
    return "–" if math.isnan(figure) else _round_beside(figure, (limit,))


def _round_beside(figure: float, limits: Sequence[float]) -> str:
    """Round a figure to two decimals, or so that it stays on its side of 0, of 1 and of limits."""
    if abs(figure) >= _MANY:
        return f"{figure:.0e}"
    rounded = round(figure, 2)
    if figure < 1 <= rounded:
        return ">.99"
    if figure > 0 == rounded:
        return "<.01"
    if any(figure < limit <= rounded for limit in limits):
        return f"{math.floor(1000 * figure) / 1000:.3f}"[1:]  # ".989": without its 0
    return f"{figure:.2f}"


NONFINITE, NONFINITE_MEANING = "NaN", "some elements are NaN or inf: the verdict is on the others"
"""Mark in a cell if elements of the layer are NaN or inf, and the mark's meaning for legends."""
UNMOVED = "unmoved"
"""Heading of a column with the mean unmoved_frac of each layer."""
UNMOVED_MEANING = (
    "unmoved_frac, the share of single updates that moved no weight; high without a loss under "
    "stochastic rounding or Kahan: “now” counts"
)
"""Meaning of the column `UNMOVED`, for legends."""
KEPT_MEANING = (
    "The number is progress_kept since the start, 1 all and 0 nothing; of formats without a twin "
    "kept_update_ratio, step by step."
)
"""Meaning of the number in a cell, for legends."""


def cell_text(advice: Advice | None) -> str:
    """Return the text of a table's cell for a layer in a recipe, such as ``fine >.99``.

    The text is empty if `advice` is None. Otherwise it has the verdict in one word, the share of
    the progress that is kept, and the mark ``NaN`` if some elements of the layer are NaN or inf.
    """
    if advice is None:
        return ""
    is_marked = advice.nonfinite and advice.verdict is not Verdict.BREAKS
    mark = NONFINITE if is_marked else ""
    return " ".join(filter(None, (advice.verdict.short, format_kept(advice.kept), mark)))
