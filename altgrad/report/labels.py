"""`Label`: a text in a picture that is drawn from pixels which are kept for its next use.

Text takes most of the time of a map: matplotlib lays each text out and draws it letter by letter,
in every picture anew. The maps of a run have the same names of layers, again and again. In an SVG,
a label is the text itself.

`maps` draws maps with labels.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import RendererAgg, get_hinting_flag
from matplotlib.colors import to_rgba
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.text import Text

_MOST_TEXTS = 4096  # whose pixels are kept, about a kilobyte each
_FAMILY = "DejaVu Sans"  # comes with matplotlib
_POINTS = 72  # per inch
# Heights as shares of the size of this font.
_LINE = 1.2
_CAPITAL = 0.73
_ASCENT = 0.93
_LAYOUT_DPI = 110  # of the pixels that measure the width of a text

Coverage = npt.NDArray[np.uint8]
"""How much of each pixel a text covers, uint8 (height, width), from top to bottom."""


class Label(Text):
    """A text without rotation, of one line or of several, that is drawn from kept pixels.

    Args:
        x: Position in x, in the coordinates of `transform`.
        y: Position in y: the middle of the capital letters of a single line, or the top of all
            lines if `va` is ``"top"``.
        text: The text.
        size: Size of the font in points.
        options: Other arguments of `matplotlib.text.Text`, such as ``ha`` and ``transform``.
    """

    def __init__(self, x: float, y: float, text: str, size: float, **options: Any) -> None:
        super().__init__(x, y, text, size=size, **{"va": "center_baseline", **options})

    def draw(self, renderer: RendererBase) -> None:
        """Draw the label: from kept pixels if the picture has pixels, or else as text."""
        if not isinstance(renderer, RendererAgg):
            super().draw(renderer)
            return
        size, dpi = self.get_fontsize(), renderer.dpi
        x, y = self.get_transform().transform(self.get_position())
        pixels = size * dpi / _POINTS
        is_top = self.get_verticalalignment() == "top"
        baseline = y - pixels * (_ASCENT if is_top else _CAPITAL / 2)
        red, green, blue, alpha = to_rgba(self.get_color())
        place = {"left": 0.0, "center": 0.5, "right": 1.0}[self.get_horizontalalignment()]
        gc = renderer.new_gc()
        for number, line in enumerate(self.get_text().split("\n")):
            coverage, descent = draw_coverage(line, size, dpi)
            image = np.empty((*coverage.shape, 4), np.uint8)
            image[..., :3] = [round(255 * each) for each in (red, green, blue)]
            image[..., 3] = coverage * alpha
            left = round(x - place * coverage.shape[1])
            bottom = round(baseline - number * _LINE * pixels) - descent
            # A renderer has the origin at the bottom, and so the lowest row of pixels first.
            renderer.draw_image(gc, left, bottom, np.ascontiguousarray(image[::-1]))
        gc.restore()


@functools.lru_cache(maxsize=_MOST_TEXTS)
def draw_coverage(text: str, size: float, dpi: float) -> tuple[Coverage, int]:
    """Draw a line of text, and keep the result for its next use.

    Args:
        text: The text.
        size: Size of the font in points.
        dpi: Pixels per inch.

    Returns:
        How much of each pixel the text covers, and the number of rows of pixels below its baseline.
    """
    if not text.strip():
        return np.zeros((0, 0), np.uint8), 0
    font = get_font(findfont(FontProperties(family=_FAMILY)))
    font.set_size(size, dpi)
    font.set_text(text, 0.0, flags=get_hinting_flag())  # type: ignore[no-untyped-call]
    font.draw_glyphs_to_bitmap(antialiased=True)
    # The font's own array is overwritten by the next text. Lengths are in 64ths of a pixel.
    return np.array(font.get_image()), round(font.get_descent() / 64)


def measure_width(text: str, size: float) -> float:
    """Return the width of the widest line of a text, in inches.

    Args:
        text: The text.
        size: Size of the font in points.
    """
    lines = (draw_coverage(line, size, _LAYOUT_DPI)[0] for line in text.split("\n"))
    pixels: int = max(line.shape[1] for line in lines)
    return pixels / _LAYOUT_DPI


def measure_height(text: str, size: float) -> float:
    """Return the height of all lines of a text, in inches.

    Args:
        text: The text.
        size: Size of the font in points.
    """
    return (text.count("\n") + 1) * _LINE * size / _POINTS
