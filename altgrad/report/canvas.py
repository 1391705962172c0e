"""Make matplotlib figures, and convert them to PNG and SVG.

Figures are made without pyplot, which keeps global state and may open windows. All figures have
matplotlib's default style, even if the user has set another style.

Read `new_figure`, `finish_figure`, `png`, `draw_pixels` and `svg`; `drawings` comes next and draws
on these figures.
"""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from altgrad.report.names import replace_unprintable_in_lines

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_P = ParamSpec("_P")
_R = TypeVar("_R")


def in_default_style(draw: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a function to run in matplotlib's default style; the user's style is restored."""

    @functools.wraps(draw)
    def draw_in_style(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        from matplotlib import style

        with style.context("default"), warnings.catch_warnings():
            # The default font lacks some scripts: a PNG shows boxes, an SVG has the text.
            warnings.filterwarnings("ignore", message=r"(?s).*Glyph .* missing from")
            warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
            return draw(*args, **kwargs)

    return draw_in_style


def make_figure(width: float, height: float) -> Figure:
    """Make a figure without axes.

    Args:
        width: Width of the figure in inches.
        height: Height of the figure in inches.

    Returns:
        The figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def new_figure(
    width: float, height: float, heights: Sequence[float] = (1,)
) -> tuple[Figure, list[Axes]]:
    """Make a figure with one column of axes that share an x axis.

    Args:
        width: Width of the figure in inches.
        height: Height of the figure in inches.
        heights: Relative heights of the axes, from top to bottom.

    Returns:
        The figure, and its axes from top to bottom.
    """
    figure = make_figure(width, height)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)
    return figure, [*axes[:, 0]]


def new_panels(width: float, height: float, count: int) -> tuple[Figure, list[Axes]]:
    """Make a figure with axes side by side.

    Args:
        width: Width of the figure in inches.
        height: Height of the figure in inches.
        count: Number of axes.

    Returns:
        The figure, and its axes from left to right.
    """
    figure = make_figure(width, height)
    figure.set_layout_engine("constrained", h_pad=0.1)  # inches between titles
    return figure, [*figure.subplots(1, count, squeeze=False)[0]]


def finish_figure(figure: Figure) -> Figure:
    """Make all texts of a figure literal: `$` as itself, unprintable characters as �.

    Returns:
        The same figure.
    """
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)
        text.set_text(replace_unprintable_in_lines(text.get_text()))
    return figure


def finish_empty_figure(figure: Figure, reason: str) -> Figure:
    """Hide the axes of a figure without data, and show a sentence instead.

    Args:
        figure: The figure; its axes are hidden.
        reason: The sentence.

    Returns:
        The same figure.
    """
    for axes in figure.axes:
        axes.set_axis_off()
    figure.text(0.5, 0.4, reason, ha="center", va="center", size=9, color="#555555")
    return finish_figure(figure)


@in_default_style
def png(figure: Figure, dpi: int = 110) -> bytes:
    """Return a figure as the content of a PNG file.

    Args:
        figure: The figure.
        dpi: Pixels per inch.
    """
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return file.getvalue()


@in_default_style
def draw_pixels(figure: Figure, dpi: int = 110) -> np.ndarray:
    """Draw a figure, and return the pixels that its PNG has, without the time to encode one.

    Args:
        figure: The figure.
        dpi: Pixels per inch.

    Returns:
        Red, green and blue of each pixel, uint8 (height, width, 3).
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return np.array(canvas.buffer_rgba())[..., :3]  # type: ignore[no-untyped-call]


@in_default_style
def svg(figure: Figure, prefix: str) -> str:
    """Return a figure as an SVG element that can be inserted in a page.

    Equal figures give equal elements. Texts of the figure remain texts, which users can search and
    screen readers can read.

    Args:
        figure: The figure.
        prefix: Start of all ids in the element. Each figure of a page needs its own prefix.

    Raises:
        ValueError: The prefix starts with another character than a letter, or contains other
            characters than letters, digits, ``-`` and ``_``.
    """
    from matplotlib import rc_context

    if not re.fullmatch(r"[A-Za-z][\w-]*", prefix, re.ASCII):
        raise ValueError(f"prefix={prefix!r}: expected a letter, then letters, digits, '-' or '_'")
    file = io.StringIO()
    # fonttype "none" keeps text as text; hashsalt makes ids repeatable, which are random without
    # it: https://matplotlib.org/stable/users/explain/customizing.html (svg.*)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "altgrad"}):
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=no_metadata)
    text = file.getvalue()
    # Only tags are changed: text may look like an attribute, but its < and > are escaped.
    return re.sub("<[^>]*>", lambda tag: _add_prefix(tag[0], prefix), text[text.index("<svg") :])


def _add_prefix(tag: str, prefix: str) -> str:
    """Add a prefix to each id in a tag, and to each reference to an id."""
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", tag)
