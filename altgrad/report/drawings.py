"""Draw the pictures of a report as matplotlib Figures, for loggers (PNG) and for the page (SVG).

The pictures are `heat_map`, `kept_map`, `steps_histogram` and `ranges`. A map of more than 60
layers shows the 60 worst layers, and its title says so. The colours are distinct for colour-blind
readers, a cell without a value is grey and hatched, and what never moves is black.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from altgrad._messages import format_count, format_percent
from altgrad.measurement.catalogue import NOW
from altgrad.measurement.histogram import Histogram
from altgrad.report.canvas import (
    finish_empty_figure,
    finish_figure,
    in_default_style,
    new_figure,
    png,
    svg,
)
from altgrad.report.colours import (
    FROZEN,
    KEPT,
    LOST,
    MISSING,
    OVER,
    SHARE_SCALE,
    find_share_colour,
    find_text_colour,
)
from altgrad.report.judging.calibration import calibration
from altgrad.report.judging.decimals import format_kept
from altgrad.report.judging.verdicts import Verdict
from altgrad.report.means import average_finite
from altgrad.report.names import shorten_names
from altgrad.report.records.schema import FormatInfo

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["heat_map", "kept_map", "png", "ranges", "steps_histogram", "svg"]

MOST_ROWS = 60
"""Maximum number of layers in `heat_map` and `kept_map`; of more layers the worst are shown."""
_MOST_COLUMNS = 240  # columns of a heat map; neighbouring steps are averaged to fit
_ROW = 0.17  # height of a row in inches
_HIGH_IS_GOOD = frozenset({"kept_update_ratio", "visible_frac", "on_grid_frac"})
_MEANINGS = {
    "kept_update_ratio": "share of the update that is kept",
    "stall_frac": "share of the updates that stall",
    "never_moved_frac": "share of the weights that never moved",
}
_PALE, _GREY = "#cfe3f3", "#999999"
_TOO_FEW_TO_SEE = 1e-3  # share of the elements below which an octave is left out at the ends
_THRESHOLD = -1  # log2 of half a grid spacing: a smaller update of a weight on the grid stalls
_FROZEN_WORD = Verdict.FROZEN.short
_CELL_TEXT: dict[str, Any] = {"ha": "center", "va": "center_baseline", "size": 7, "zorder": 4}
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@in_default_style
def heat_map(
    values: Mapping[str, Mapping[int, float]],
    *,
    title: str,
    label: str = "stall_frac",
    frozen: Collection[str] = (),
) -> Figure:
    """Draw a metric as a map of layers by steps, with dark colours for bad figures.

    A layer that never moves is a black row, and so differs from one that is merely dark.

    Args:
        values: By name of the layer, and then by step, the figure. A layer that is observed less
            often than other layers keeps its last figure in between.
        title: Heading, such as the name of the format.
        label: Name of the metric. Figures below 0 are drawn as 0, figures above 1 as 1.
        frozen: Names of the layers that never move.

    Returns:
        The figure.
    """
    good = label in _HIGH_IS_GOOD
    means = {name: average_finite(by_step.values()) for name, by_step in values.items()}
    shown = _choose_worst(means, low_is_bad=good)
    steps = sorted({step for by_step in values.values() for step in by_step})
    width = max(1, math.ceil(len(steps) / _MOST_COLUMNS))
    groups = [steps[i : i + width] for i in range(0, len(steps), width)]
    figure, [axes] = new_figure(8, _ROW * max(len(shown), 4) + 1.3)
    figure.suptitle(_make_title(title, len(shown), len(values)), size=9)
    if not groups:
        return finish_empty_figure(figure, "no step has been observed yet")
    shares = [_average_columns(values[name], groups) for name in shown]
    _draw_shares(axes, shares, SHARE_SCALE if good else SHARE_SCALE[::-1])
    still = [row for row, name in enumerate(shown) if name in frozen]
    for row in still:
        _draw_frozen(axes, row, 0, len(groups))
        _write_word(axes, (len(groups) - 1) / 2, row, _FROZEN_WORD)
    _name_rows(axes, shown)
    ticks = _spread_ticks(len(groups), 10)
    axes.set_xticks(ticks, [str(groups[tick][0]) for tick in ticks], size=7)
    mean = f", a column is the mean of {width}" if width > 1 else ""
    over = f"; {_write_over()}" if any(map(_is_over, itertools.chain(*shares))) else ""
    hatched = "; grey: no value" if any(math.isnan(x) for row in shares for x in row) else ""
    black = f"; black: {_FROZEN_WORD}, never moves" if still else ""
    meaning = f", the {_MEANINGS[label]}" if label in _MEANINGS else ""
    axes.set_xlabel(f"step{mean}\ncolour: {label}{meaning}{black}{over}{hatched}", size=8)
    bar = figure.colorbar(axes.images[0], ax=axes, aspect=30, pad=0.015)
    ends = ("0: all lost", "1: all kept") if good else ("0: none", "1: all")
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=[ends[0], "0.25", "0.5", "0.75", ends[1]], size=7)
    return finish_figure(figure)


@in_default_style
def kept_map(
    kept: Mapping[str, Mapping[str, float]],
    words: Mapping[str, Mapping[str, str]],
    *,
    title: str,
) -> Figure:
    """Draw how much of the progress each recipe keeps, as a map of layers by recipes.

    A *recipe* says how weights and optimizer states are stored.

    Args:
        kept: By layer and recipe the progress_kept: 1 if all of the progress is kept, 0 if nothing.
            A layer may lack a recipe. Layers with a word count as the worst, and then those with
            the smallest share: that of the run itself, ``now``, if known, or else the mean.
        words: By layer and recipe, a word for the cell in place of the number, such as ``frozen``.
            Most cells have none.
        title: Heading.

    Returns:
        The figure.
    """
    scores = {name: _score_kept(by_recipe, words.get(name, {})) for name, by_recipe in kept.items()}
    shown = _choose_worst(scores, low_is_bad=True)
    recipes = list(dict.fromkeys(recipe for by_recipe in kept.values() for recipe in by_recipe))
    figure, [axes] = new_figure(max(5.5, 3 + 0.9 * len(recipes)), _ROW * max(len(shown), 3) + 1)
    figure.suptitle(_make_title(title, len(shown), len(kept)), size=9)
    if not recipes:
        return finish_empty_figure(figure, "no step has been observed yet")
    shares = [[kept[name].get(recipe, math.nan) for recipe in recipes] for name in shown]
    _draw_shares(axes, shares, SHARE_SCALE)
    for row, name in enumerate(shown):
        for column, recipe in enumerate(recipes):
            word = words.get(name, {}).get(recipe, "")
            _write_share(axes, column, row, shares[row][column], word)
    axes.set_xticks(range(len(recipes)), shorten_names(recipes, 14), size=8)
    axes.tick_params(axis="x", top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    _name_rows(axes, shown)
    over = f"; {_write_over()}" if any(map(_is_over, itertools.chain(*shares))) else ""
    axes.set_xlabel(
        f"share of the progress kept: 1 all, 0 nothing; black: never moves{over}", size=8
    )
    return finish_figure(figure)


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


# --- maps of shares


def _choose_worst(scores: Mapping[str, float], *, low_is_bad: bool) -> list[str]:
    """Return the up to 60 names with the worst scores, in the order of `scores`; NaN is best."""
    worst_first = sorted(scores, key=lambda name: _rank_score(scores[name], low_is_bad))
    chosen = {*worst_first[:MOST_ROWS]}
    return [name for name in scores if name in chosen]


def _score_kept(by_recipe: Mapping[str, float], words: Mapping[str, str]) -> float:
    """Return a score by which the worst layers are chosen: low is bad.

    It is the share of the progress that the layer keeps in the run itself, ``now``, or otherwise
    the mean over the recipes. A layer that stands still or is NaN has -inf.

    Args:
        by_recipe: The share kept, by recipe.
        words: By recipe a word such as ``frozen``, where the layer stands still or is NaN.
    """
    if NOW in by_recipe:
        return -math.inf if NOW in words else by_recipe[NOW]
    return -math.inf if words else average_finite(by_recipe.values())


def _is_over(share: float) -> bool:
    return share > calibration().thresholds.overshoots


def _write_over() -> str:
    return f"purple: above {calibration().thresholds.overshoots:g}, moves too far"


def _rank_score(score: float, low_is_bad: bool) -> float:
    if math.isnan(score):
        return math.inf
    return score if low_is_bad else -score


def _make_title(title: str, shown: int, all: int) -> str:
    return title if shown == all else f"{title}\nthe worst {shown} of {format_count(all, 'layer')}"


def _average_columns(values: Mapping[int, float], groups: Sequence[Sequence[int]]) -> list[float]:
    """Return means of a layer's figures, one for each group of steps: a row of a heat map.

    `values` has a figure by step. A step without one counts with the figure before it, up to the
    last step of `values`. A group without a figure has the mean NaN.
    """
    last, held, columns = max(values, default=-1), math.nan, []
    for group in groups:
        seen = []
        for step in group:
            held = values.get(step, held) if step <= last else math.nan
            seen.append(held)
        columns.append(average_finite(seen))
    return columns


def _draw_shares(axes: Axes, shares: Sequence[Sequence[float]], colours: Sequence[str]) -> None:
    """Draw a matrix of shares, given by rows, as coloured cells; NaN is grey and hatched.

    Shares so far above 1 that a layer overshoots are purple, and not of the colour of 1. `colours`
    are those of shares that are evenly spaced from 0 to 1.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    # A kept_update_ratio can lie far outside of 0 and 1, where matplotlib's arithmetic overflows.
    clamped = [
        [2.0 if _is_over(share) else min(max(share, 0), 1) for share in row] for row in shares
    ]
    scale = LinearSegmentedColormap.from_list("shares", [*colours]).with_extremes(over=OVER)
    axes.imshow(clamped, vmin=0, vmax=1, cmap=scale, aspect="auto", interpolation="nearest")
    axes.images[0].set_zorder(2)  # above the hatched rectangle, which NaN leaves visible
    behind: dict[str, Any] = {
        "facecolor": MISSING,
        "edgecolor": _GREY,
        "hatch": "////",
        "lw": 0,
        "zorder": 1,
    }
    axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, **behind))
    axes.spines[:].set_visible(False)


def _draw_frozen(axes: Axes, row: int, first: int, count: int) -> None:
    """Paint `count` cells of a row black, from the column `first` on."""
    from matplotlib.patches import Rectangle

    # A thin white edge keeps neighbouring rows apart.
    style: dict[str, Any] = {"facecolor": FROZEN, "edgecolor": "white", "lw": 0.5, "zorder": 3}
    axes.add_patch(Rectangle((first - 0.5, row - 0.5), count, 1, **style))


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), shorten_names(names), size=7)
    axes.tick_params(axis="y", length=0)


def _write_share(axes: Axes, column: int, row: int, share: float, word: str) -> None:
    """Write a share into its cell; a cell with a word is black and has the word alone."""
    if word:
        _draw_frozen(axes, row, column, 1)
        _write_word(axes, column, row, word)
        return
    colour = find_text_colour(find_share_colour(share))
    axes.text(column, row, format_kept(share) or "–", color=colour, **_CELL_TEXT)


def _write_word(axes: Axes, column: float, row: int, word: str) -> None:
    axes.text(column, row, word, color="white", **_CELL_TEXT)


def _spread_ticks(count: int, most: int) -> list[int]:
    """Return evenly spaced integers from 0 to count − 1, at most `most` of them."""
    return [*range(0, count, math.ceil(count / most))]


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
