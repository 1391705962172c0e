"""What pictures are drawn on, and how they become PNG and SVG: without pyplot or any global state.

All are drawn in matplotlib's default style, whatever style users have set for plots of their own.
"""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from altgrad.report.names import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_P = ParamSpec("_P")
_R = TypeVar("_R")


def in_default_style(draw: Callable[_P, _R]) -> Callable[_P, _R]:
    """In the default style; the user's own holds again afterwards."""

    @functools.wraps(draw)
    def drawn(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        from matplotlib import style

        with style.context("default"), warnings.catch_warnings():
            # A name in a script that the font lacks is boxes in a PNG, and whole in an SVG.
            warnings.filterwarnings("ignore", message=r"(?s).*Glyph .* missing from")
            warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
            return draw(*args, **kwargs)

    return drawn


def new_figure(
    width: float, height: float, heights: Sequence[float] = (1,)
) -> tuple[Figure, list[Axes]]:
    """A Figure of so many inches, and its axes, one for each of the heights, with one x axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)
    return figure, [*axes[:, 0]]


def finished(figure: Figure) -> Figure:
    """No text in it is a formula: names stay as they are, but for what cannot be printed."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)
        text.set_text("\n".join(map(printable, text.get_text().split("\n"))))
    return figure


def finished_empty(figure: Figure, why: str) -> Figure:
    """A sentence in place of a picture of nothing."""
    for axes in figure.axes:
        axes.set_axis_off()
    figure.text(0.5, 0.4, why, ha="center", va="center", size=9, color="#555555")
    return finished(figure)


@in_default_style
def png(figure: Figure, dpi: int = 110) -> bytes:
    """The picture as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return file.getvalue()


@in_default_style
def svg(figure: Figure, prefix: str) -> str:
    """The picture as an SVG element to be put into a page: the same for the same picture.

    Text stays text, to be searched and read aloud.

    Args:
        figure: The picture.
        prefix: What its ids begin with: another one for each picture of a page.

    Raises:
        ValueError: The prefix cannot begin an id.
    """
    from matplotlib import rc_context

    if not re.fullmatch(r"[A-Za-z][\w-]*", prefix, re.ASCII):
        raise ValueError(f"prefix={prefix!r}: expected a letter, then letters, digits, '-' or '_'")
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "altgrad"}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing)
    text = file.getvalue()
    # Tags only: a layer's name may look like an attribute, but its < and > are escaped.
    return re.sub("<[^>]*>", lambda tag: _with_prefix(tag[0], prefix), text[text.index("<svg") :])


def _with_prefix(tag: str, prefix: str) -> str:
    """Each id and each reference to one."""
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", tag)
