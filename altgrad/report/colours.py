"""Colours of pictures, tables and terminals: one scale of shares, and one colour per verdict.

The colours are distinct for colour-blind readers, and in grey print: dark brown for what is lost,
over orange to pale blue for what is kept. What never moves is black, and so differs from what is
merely dark; what moves too far is purple.
"""

from __future__ import annotations

import math

from altgrad.report.judging.calibration import calibration
from altgrad.report.judging.verdicts import Verdict

LOST, KEPT = "#d55e00", "#0072b2"
"""Colours of what is lost and kept in bars and lines: of Okabe and Ito."""
# https://jfly.uni-koeln.de/color/
SHARE_SCALE = ("#7f2704", "#c74a02", "#f0802c", "#fbb877", "#f8dab5", "#dcecf8")
"""Colours of a share that is kept, evenly spaced from 0 to 1, each lighter than the one before."""
FROZEN, OVER, MISSING = "#1c1c1c", "#cc79a7", "#e4e4e4"
"""Colours of what never moves, of what moves too far, and of a cell without a value."""

CELLS = {
    Verdict.STORES_FINE: SHARE_SCALE[5],
    Verdict.WATCH: SHARE_SCALE[4],
    Verdict.NEEDS_REMEDY: SHARE_SCALE[3],
    Verdict.FROZEN: FROZEN,
    Verdict.STUCK: FROZEN,
    Verdict.OVERSHOOTS: OVER,
    Verdict.BREAKS: SHARE_SCALE[0],
    Verdict.RANGE: "#ecd5e6",
    Verdict.UNCERTAIN: MISSING,
    Verdict.NOT_JUDGED: "#ffffff",
}
"""Colour of a table's cell for each verdict, behind text of the colour `find_text_colour`."""
STYLES = {
    Verdict.STORES_FINE: "cyan",
    Verdict.WATCH: "yellow",
    Verdict.NEEDS_REMEDY: "red",
    Verdict.FROZEN: "bold reverse",
    Verdict.STUCK: "bold reverse",
    Verdict.OVERSHOOTS: "magenta",
    Verdict.BREAKS: "bold red",
    Verdict.RANGE: "magenta",
    Verdict.UNCERTAIN: "dim",
    Verdict.NOT_JUDGED: "dim",
}
"""Colour of each verdict in a terminal, as a style of the library rich."""


def find_share_colour(share: float) -> str:
    """Return the colour of a share that is kept, such as ``#7f2704`` for 0.

    A share below 0 has the colour of 0. A share so far above 1 that a layer overshoots is `OVER`,
    and NaN is `MISSING`.
    """
    if math.isnan(share):
        return MISSING
    if share > calibration().thresholds.overshoots:
        return OVER
    place = min(max(share, 0.0), 1.0) * (len(SHARE_SCALE) - 1)
    below = min(int(place), len(SHARE_SCALE) - 2)
    pairs = zip(_read_hex(SHARE_SCALE[below]), _read_hex(SHARE_SCALE[below + 1]), strict=True)
    mixed = (round(low + (high - low) * (place - below)) for low, high in pairs)
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def find_text_colour(background: str) -> str:
    """Return ``#ffffff`` or ``#000000``: the colour of text with more contrast on a background.

    Args:
        background: A colour such as ``#7f2704``.
    """
    # Both have a contrast of 4.6 at a luminance of 0.179: https://www.w3.org/TR/WCAG21/
    return "#ffffff" if measure_luminance(background) < 0.179 else "#000000"


def measure_luminance(colour: str) -> float:
    """Return the relative luminance of a colour such as ``#7f2704``: 0 is black, 1 is white."""
    # The sRGB curve: https://www.w3.org/TR/WCAG21/#dfn-relative-luminance
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (channel / 255 for channel in _read_hex(colour))
    ]
    weights = (0.2126, 0.7152, 0.0722)
    return math.fsum(weight * each for weight, each in zip(weights, linear, strict=True))


def _read_hex(colour: str) -> tuple[int, int, int]:
    """Return red, green and blue of a colour such as ``#7f2704``, each from 0 to 255."""
    red, green, blue = bytes.fromhex(colour.removeprefix("#"))
    return red, green, blue
