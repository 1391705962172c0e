"""Draw the pictures of a report as matplotlib Figures, for loggers (PNG) and for the page (SVG).

The pictures are `steps_histogram` and `ranges`; `maps` has those of layers by steps and recipes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from altgrad._messages import format_percent
from altgrad.measurement.histogram import Histogram
from altgrad.report.canvas import finish_empty_figure, finish_figure, in_default_style, new_figure
from altgrad.report.colours import KEPT, LOST
from altgrad.report.names import shorten_names
from altgrad.report.records.schema import FormatInfo

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PALE, _GREY = "#cfe3f3", "#999999"
_TOO_FEW_TO_SEE = 1e-3  # share of the elements below which an octave is left out at the ends
_THRESHOLD = -1  # log2 of half a grid spacing: a smaller update of a weight on the grid stalls
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@in_default_style
def steps_histogram(histograms: Mapping[str, Histogram]) -> Figure:
    """Draw the distribution of abs(update) / spacing, in one row for each format.

    The spacing is the distance between neighbouring numbers of the format at a weight.

    Args:
        histograms: Histogram of log2(abs(update) / spacing), by format. Bins below −1 have the
            colour of lost updates: below half a spacing, a weight in the format does not move.

    Returns:
        The figure.
    """
    figure, each = new_figure(7, 0.85 * len(histograms) + 1.2, [1] * max(len(histograms), 1))
    figure.suptitle("Size of the updates, against the grid of each format", size=9)
    spans = [span for each in histograms.values() if (span := _find_span(each, _TOO_FEW_TO_SEE))]
    if not spans:
        nothing = "no finite update in this step" if histograms else "no step has been observed yet"
        return finish_empty_figure(figure, nothing)
    first = min(*(start for start, _ in spans), _THRESHOLD - 3)
    end = max(*(stop for _, stop in spans), _THRESHOLD + 4)
    for axes, (format, histogram) in zip(each, histograms.items(), strict=True):
        _draw_bins(axes, histogram, lambda octave: LOST if octave < _THRESHOLD else KEPT)
        axes.axvline(_THRESHOLD, color="black", lw=1.2)
        axes.set_ylabel(shorten_names([format], 28)[0], size=9, rotation=0, ha="right", va="center")
        _write_lost_and_kept(axes, histogram)
    each[-1].set_xlim(first - 0.2, end + 0.2)
    each[-1].set_xticks(*_make_ticks(first, end), size=7)
    each[-1].set_xlabel("update ÷ grid spacing at its weight; the line is at a half", size=8)
    return finish_figure(figure)


@in_default_style
def ranges(weights: Histogram, formats: Sequence[FormatInfo]) -> Figure:
    """Draw the distribution of the weights, and below it the range of each format.

    Args:
        weights: Histogram of log2(abs(weight)), without weights of 0.
        formats: Formats whose ranges are drawn. A format that stores weights under a scale is
            shifted, so that its largest value and the largest weight lie between the same powers of
            two. Under the scales of other layers or blocks its range lies further left.

    Returns:
        The figure.
    """
    height = 0.26 * max(len(formats), 1)
    figure, [top, below] = new_figure(8, height + 2.6, (1.5, height + 0.1))
    figure.suptitle("The weights, and the range of each format", size=9)
    span = _find_span(weights)
    if span is None:
        return finish_empty_figure(figure, "no weight other than 0 has been observed yet")
    first, end = span[0] - 12, span[1] + 6
    _draw_bins(top, weights, lambda _: _GREY)
    for x, side, text in ((span[0], "right", "smallest "), (span[1], "left", " largest")):
        place: dict[str, Any] = {"transform": top.get_xaxis_transform(), "va": "top"}
        top.text(x, 1, text, size=7, color="#555555", ha=side, **place)
    top.set_ylabel("weights", size=8, rotation=0, ha="right", va="center")
    for row, format in enumerate(formats):
        shift = span[1] - 1 - math.floor(math.log2(format.max)) if format.scaled else 0
        _draw_range(below, row, format, shift, (first, end))
    for axes in (top, below):
        for edge in span:
            axes.axvline(edge, color=_GREY, lw=0.8, ls=":", zorder=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    below.set_ylim(len(formats) - 0.4, -0.6)
    shortened = shorten_names([format.name for format in formats])
    names = [
        f"{name} *" if format.scaled else name
        for name, format in zip(shortened, formats, strict=True)
    ]
    below.set_yticks(range(len(formats)), names, size=8)
    below.tick_params(axis="y", length=0)
    below.set_xlim(first, end)
    below.set_xticks(*_make_ticks(first, end), size=7)
    where = "\n* under a scale, drawn for the layer or block of the largest weight"
    scaled = where if any(format.scaled for format in formats) else ""
    below.set_xlabel(
        "size of a weight. Dark: full precision; hatched: subnormal, fewer digits; left of a bar: "
        f"becomes 0{scaled}",
        size=8,
    )
    return finish_figure(figure)


# --- octaves


def _find_span(histogram: Histogram, least: float = 0) -> tuple[int, int] | None:
    """Return where the filled part of a histogram begins and ends, in log2.

    Filled are bins with more than a share `least` of all elements; each bin is one wide in log2.
    The result is None without such bins.
    """
    few = least * math.fsum(histogram.counts)
    full = [histogram.first + k for k, count in enumerate(histogram.counts) if count > few]
    return (full[0], full[-1] + 1) if full else None


def _draw_bins(axes: Axes, histogram: Histogram, colour: Callable[[int], str]) -> None:
    octaves = [histogram.first + k for k in range(len(histogram.counts))]
    colours = [colour(octave) for octave in octaves]
    white: dict[str, Any] = {"edgecolor": "white", "lw": 0.5}
    axes.bar(octaves, histogram.counts, width=1, align="edge", color=colours, **white)
    axes.set_ylim(0, 1.25 * max(*histogram.counts, 1e-300))  # limits must differ
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="x", labelsize=7)


def _write_lost_and_kept(axes: Axes, histogram: Histogram) -> None:
    total = math.fsum(histogram.counts)
    lost = math.fsum(histogram.counts[: max(0, _THRESHOLD - histogram.first)])
    place: dict[str, Any] = {"transform": axes.transAxes, "size": 8, "va": "top"}
    place["bbox"] = {"facecolor": "white", "lw": 0, "pad": 1}
    if not total:
        axes.text(0.01, 1, "no update", color=_GREY, **place)
        return
    axes.text(
        0.01, 1, f"{format_percent(lost / total)} too small to move a weight", color=LOST, **place
    )
    kept = format_percent(1 - lost / total)
    axes.text(0.99, 1, f"{kept} large enough", color=KEPT, ha="right", **place)


def _draw_range(
    axes: Axes, row: int, format: FormatInfo, shift: int, view: tuple[int, int]
) -> None:
    """Draw a bar from the smallest to the largest positive number of a format, subnormals hatched.

    `shift` is log2 of the scale, and `view` the range of the x axis in log2.
    """
    low, high = math.log2(format.smallest) + shift, math.log2(format.max) + shift
    normal = min(math.log2(format.smallest_normal) + shift, high)
    pale: dict[str, Any] = {"color": _PALE, "hatch": "/////", "edgecolor": KEPT, "lw": 0}
    axes.barh(row, normal - low, left=low, height=0.6, **pale)
    axes.barh(row, high - normal, left=normal, height=0.6, color=KEPT)
    text: dict[str, Any] = {"va": "center_baseline", "size": 7, "color": "black"}
    text["bbox"] = {"facecolor": "white", "lw": 0, "pad": 1}
    if low < view[0]:
        axes.text(view[0] + 0.2, row, f"← {_write_power(math.floor(low))}", **text)
    if high > view[1]:
        axes.text(view[1] - 0.2, row, f"{_write_power(math.ceil(high))} →", ha="right", **text)


def _make_ticks(first: int, end: int) -> tuple[list[int], list[str]]:
    """Return at most 17 exponents from `first` to `end` for ticks, and labels such as 2⁻⁴."""
    every = next(n for n in (1, 2, 4, 8, 16, 32, 64) if (end - first) / n <= 16 or n == 64)
    ticks = [tick for tick in range(first, end + 1) if tick % every == 0]
    return ticks, [_write_power(tick) for tick in ticks]


def _write_power(exponent: int) -> str:
    return f"2{str(exponent).translate(_SUPERSCRIPTS)}"
