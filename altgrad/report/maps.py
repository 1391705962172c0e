"""Draw shares of layers as maps: `heat_map` by steps, `kept_map` by recipes.

A map of more than 60 layers shows the 60 worst layers, and its title says so. The colours are
distinct for colour-blind readers, a cell without a value is grey and hatched, and what never moves
is black.

The margins of a map follow from the sizes of its texts. These are `Label`s, most of which a run
draws once: the maps of a run have the same layers. Read `labels` first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from altgrad._messages import format_count
from altgrad.measurement.catalogue import NOW
from altgrad.report.canvas import finish_empty_figure, finish_figure, in_default_style, make_figure
from altgrad.report.colours import (
    FROZEN,
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
from altgrad.report.names import replace_unprintable_in_lines, shorten_names

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.transforms import Transform

    from altgrad.measurement.numbers import Numbers
    from altgrad.report.labels import Label

MOST_ROWS = 60
"""Maximum number of layers in `heat_map` and `kept_map`; of more layers the worst are shown."""
_MOST_COLUMNS = 240  # columns of a heat map; neighbouring steps are averaged to fit
_HIGH_IS_GOOD = frozenset({"kept_update_ratio", "visible_frac", "on_grid_frac"})
_MEANINGS = {
    "kept_update_ratio": "share of the update that is kept",
    "stall_frac": "share of the updates that stall",
    "never_moved_frac": "share of the weights that never moved",
}
_FROZEN_WORD = Verdict.FROZEN.short
# Lengths in inches, and sizes of fonts in points.
_ROW, _PAD, _BAR, _COLUMN = 0.17, 0.07, 0.2, 0.9
_TITLE, _LEGEND, _SMALL, _HEAD = 9, 8, 7, 8
_GREY = "#999999"
_NOTHING = "no step has been observed yet"


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
    title = _make_title(title, len(shown), len(values))
    if not groups:
        return _draw_empty(title, 8)
    shares = _tabulate(_average_columns(values[name], groups) for name in shown)
    still = [row for row, name in enumerate(shown) if name in frozen]
    mean = f", a column is the mean of {width}" if width > 1 else ""
    meaning = f", the {_MEANINGS[label]}" if label in _MEANINGS else ""
    notes = _list_notes(shares, f"black: {_FROZEN_WORD}, never moves" if still else "")
    ends = ("0: all lost", "1: all kept") if good else ("0: none", "1: all")
    bar = {0.0: ends[0], 0.25: "0.25", 0.5: "0.5", 0.75: "0.75", 1.0: ends[1]}
    map = _Map(
        title,
        shorten_names(shown),
        "; ".join([f"step{mean}\ncolour: {label}{meaning}", *notes]),
        width=8,
        bar=bar,
    )
    colours = SHARE_SCALE if good else SHARE_SCALE[::-1]
    map.draw_shares(shares, colours)
    map.draw_bar(bar, colours)
    for row in still:
        map.draw_frozen(row, 0, len(groups))
        map.write_word((len(groups) - 1) / 2, row, _FROZEN_WORD, "white")
    ticks = _spread_ticks(len(groups), 10)
    map.name_columns({tick: str(groups[tick][0]) for tick in ticks}, _SMALL)
    return finish_figure(map.figure)


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
    title = _make_title(title, len(shown), len(kept))
    if not recipes:
        return _draw_empty(title, 5.5)
    shares = _tabulate([kept[name].get(recipe, math.nan) for recipe in recipes] for name in shown)
    notes = _list_notes(shares, "black: never moves")
    notes = [note for note in notes if "grey" not in note]  # such a cell has a dash
    map = _Map(
        title,
        shorten_names(shown),
        "; ".join(["share of the progress kept: 1 all, 0 nothing", *notes]),
        width=max(5.5, 3 + _COLUMN * len(recipes)),
        has_heads=True,
    )
    map.draw_shares(shares, SHARE_SCALE)
    for row, name in enumerate(shown):
        for column, recipe in enumerate(recipes):
            if word := words.get(name, {}).get(recipe, ""):
                map.draw_frozen(row, column, 1)
                map.write_word(column, row, word, "white")
            else:
                share = float(shares[row, column])
                colour = find_text_colour(find_share_colour(share))
                map.write_word(column, row, format_kept(share) or "–", colour)
    map.name_columns(dict(enumerate(shorten_names(recipes, 14))), _HEAD)
    return finish_figure(map.figure)


# --- what a map shows


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


def _rank_score(score: float, low_is_bad: bool) -> float:
    if math.isnan(score):
        return math.inf
    return score if low_is_bad else -score


def _make_title(title: str, shown: int, all: int) -> str:
    return title if shown == all else f"{title}\nthe worst {shown} of {format_count(all, 'layer')}"


def _average_columns(
    values: Mapping[int, float], groups: Sequence[Sequence[int]]
) -> Sequence[float]:
    """Return means of a layer's figures, one for each group of steps: a row of a heat map.

    `values` has a figure by step. A step without one counts with the figure before it, up to the
    last step of `values`. A group without a figure has the mean NaN.
    """
    last, held, each = max(values, default=-1), math.nan, []
    for step in itertools.chain(*groups):
        held = values.get(step, held) if step <= last else math.nan
        each.append(held)
    width = len(groups[0])
    if width == 1:
        return [figure if math.isfinite(figure) else math.nan for figure in each]
    return [average_finite(each[start : start + width]) for start in range(0, len(each), width)]


def _tabulate(rows: Iterable[Sequence[float]]) -> Numbers:
    """Return the shares of each row as a matrix, float64 (rows, columns)."""
    import numpy as np

    return np.array([*rows], np.float64)


def _spread_ticks(count: int, most: int) -> list[int]:
    """Return evenly spaced integers from 0 to count − 1, at most `most` of them."""
    return [*range(0, count, math.ceil(count / most))]


def _list_notes(shares: Numbers, black: str) -> list[str]:
    """Return the meanings of the colours beside the scale that a map has, for its legend.

    Args:
        shares: The shares, (rows, columns).
        black: The meaning of black; empty if no cell is black.
    """
    limit = calibration().thresholds.overshoots
    over = f"purple: above {limit:g}, moves too far" if (shares > limit).any() else ""
    grey = "grey: no value" if any(map(math.isnan, shares.flat)) else ""
    return [note for note in (black, over, grey) if note]


# --- how it is drawn


class _Margins(NamedTuple):
    """The space around the cells of a map, in inches."""

    left: float
    right: float
    top: float
    bottom: float


class _Map:
    """A figure with a cell for each row and column, and texts around the cells.

    Args:
        title: The heading, of one line or two.
        names: The names of the rows.
        legend: The text below, in parts that are separated by "; ".
        width: The width of the figure in inches.
        bar: Labels of the bar of colours by share; empty for no bar.
        has_heads: True if the names of columns stand above the cells, as heads; otherwise they
            stand below, with ticks.

    Attributes:
        figure: The figure.
    """

    def __init__(
        self,
        title: str,
        names: Sequence[str],
        legend: str,
        *,
        width: float,
        bar: Mapping[float, str] | None = None,
        has_heads: bool = False,
    ) -> None:
        from altgrad.report.labels import measure_height, measure_width

        title = replace_unprintable_in_lines(title)
        legend = _wrap(legend, _LEGEND, width - 2 * _PAD)
        self._has_heads = has_heads
        self._margins = _find_margins(title, names, legend, [*(bar or {}).values()], has_heads)
        left, right, top, bottom = self._margins
        body = _ROW * max(len(names), 5 if bar else 3)
        height, inner = body + top + bottom, width - left - right
        self._size = width, height
        self.figure = make_figure(width, height)
        place = left / width, bottom / height, inner / width, body / height
        # Ticks take a third of the time of a map, and labels stand in their place.
        self._axes = self.figure.add_axes(place, xticks=[], yticks=[])
        self._axes.set_axis_off()
        self._write(title, width / 2, height - _PAD, _TITLE)
        # In the middle of the cells, or so far from it that the legend fits into the figure.
        most = width - _PAD - measure_width(legend, _LEGEND) / 2
        middle = max(width - most, min(left + inner / 2, most))
        self._write(legend, middle, measure_height(legend, _LEGEND) + _PAD, _LEGEND)
        beside: dict[str, Any] = {"ha": "right", "transform": self._axes.get_yaxis_transform()}
        for row, name in enumerate(names):
            self.figure.add_artist(_make_label(-_PAD / inner, row, name, _SMALL, **beside))

    def draw_shares(self, shares: Numbers, colours: Sequence[str]) -> None:
        """Draw shares as coloured cells; NaN is grey and hatched.

        Shares so far above 1 that a layer overshoots are purple, and not of the colour of 1.

        Args:
            shares: The shares, (rows, columns).
            colours: Those of shares that are evenly spaced from 0 to 1.
        """
        import numpy as np
        from matplotlib.patches import Rectangle

        # A kept_update_ratio can lie far outside of 0 and 1, where matplotlib's arithmetic
        # overflows.
        is_over, missing = shares > calibration().thresholds.overshoots, np.isnan(shares)
        axes = self._axes
        clamped, scale = np.where(is_over, 2.0, np.clip(shares, 0, 1)), _make_scale(colours)
        axes.imshow(clamped, vmin=0, vmax=1, cmap=scale, aspect="auto", interpolation="nearest")
        axes.images[0].set_zorder(2)  # above the hatched rectangle, which NaN leaves visible
        if missing.any():
            style: dict[str, Any] = {"facecolor": MISSING, "edgecolor": _GREY, "hatch": "////"}
            style |= {"lw": 0, "zorder": 1, "transform": axes.transAxes}
            axes.add_patch(Rectangle((0, 0), 1, 1, **style))

    def draw_bar(self, labels: Mapping[float, str], colours: Sequence[str]) -> None:
        """Draw the scale of colours at the right.

        Args:
            labels: Texts beside the bar, by share.
            colours: Those of shares that are evenly spaced from 0 to 1.
        """
        from matplotlib.image import BboxImage
        from matplotlib.patches import Rectangle
        from matplotlib.transforms import Bbox, TransformedBbox

        # An image in the figure itself: axes of its own take as long as all names.
        across, up = self._size
        left = (across - self._margins.right + _PAD) / across
        low, high = self._margins.bottom / up, 1 - self._margins.top / up
        right, whole = left + _BAR / across, self.figure.transFigure
        place = TransformedBbox(Bbox.from_extents(left, low, right, high), whole)
        image = BboxImage(place, cmap=_make_scale(colours), interpolation="nearest")
        image.set_clim(0, 1)
        image.set_data(_tabulate([1 - share / 255] for share in range(256)))
        self.figure.add_artist(image)
        edge: dict[str, Any] = {"fill": False, "lw": 0.8, "transform": whole}
        self.figure.add_artist(Rectangle((left, low), right - left, high - low, **edge))
        heights = [low + share * (high - low) for share in labels]
        self._mark([right] * len(labels), heights, "right", whole)
        for text, y in zip(labels.values(), heights, strict=True):
            x = right + (_PAD + 0.02) / across
            self.figure.add_artist(_make_label(x, y, text, _SMALL, transform=whole))

    def draw_frozen(self, row: int, first: int, count: int) -> None:
        """Paint cells of a row black.

        Args:
            row: The row.
            first: The first column.
            count: The number of cells.
        """
        from matplotlib.patches import Rectangle

        # A thin white edge keeps neighbouring rows apart.
        style: dict[str, Any] = {"facecolor": FROZEN, "edgecolor": "white", "lw": 0.5, "zorder": 3}
        self._axes.add_patch(Rectangle((first - 0.5, row - 0.5), count, 1, **style))

    def write_word(self, column: float, row: float, word: str, colour: str) -> None:
        """Write a word into a cell.

        Args:
            column: The column.
            row: The row.
            word: The word.
            colour: Its colour.
        """
        options: dict[str, Any] = {"ha": "center", "color": colour, "zorder": 4}
        self._axes.add_artist(_make_label(column, row, word, _SMALL, **options))

    def name_columns(self, names: Mapping[int, str], size: float) -> None:
        """Write the names of columns, above or below them.

        Args:
            names: The names by column.
            size: Size of the font in points.
        """
        from altgrad.report.labels import measure_height

        axes, height = self._axes, self._size[1] - self._margins.top - self._margins.bottom
        below = 1 + (measure_height("0", size) + _PAD / 2) / height
        place = below if self._has_heads else -_PAD / height
        if not self._has_heads:
            self._mark([*names], [0.0] * len(names), "down", axes.get_xaxis_transform())
        for column, name in names.items():
            options: dict[str, Any] = {"ha": "center", "va": "top"}
            options["transform"] = axes.get_xaxis_transform()
            self.figure.add_artist(_make_label(column, place, name, size, **options))

    def _mark(
        self, x: Sequence[float], y: Sequence[float], side: str, transform: Transform
    ) -> None:
        """Draw short lines in the place of ticks, in the coordinates of `transform`."""
        from matplotlib.lines import Line2D
        from matplotlib.markers import TICKDOWN, TICKRIGHT

        marker: Any = {"down": TICKDOWN, "right": TICKRIGHT}[side]
        style: dict[str, Any] = {"color": "black", "marker": marker, "markersize": 3.5}
        style |= {"linestyle": "none", "markeredgewidth": 0.8, "transform": transform}
        self.figure.add_artist(Line2D(x, y, **style))

    def _write(self, text: str, x: float, y: float, size: float) -> None:
        """Write a text with its middle and top at x and y, in inches from the lower left corner."""
        width, height = self._size
        place: dict[str, Any] = {"ha": "center", "va": "top", "transform": self.figure.transFigure}
        self.figure.add_artist(_make_label(x / width, y / height, text, size, **place))


def _find_margins(
    title: str, names: Sequence[str], legend: str, bar: Sequence[str], has_heads: bool
) -> _Margins:
    """Return as much space around the cells of a map as its texts need.

    Args:
        title: The heading.
        names: The names of the rows.
        legend: The text below.
        bar: Texts beside the bar of colours.
        has_heads: True if the names of columns stand above the cells.
    """
    from altgrad.report.labels import measure_height, measure_width

    line = measure_height("0", _HEAD) + _PAD
    return _Margins(
        max((measure_width(name, _SMALL) for name in names), default=0) + 2 * _PAD,
        max(measure_width(text, _SMALL) for text in bar) + _BAR + 3 * _PAD if bar else _PAD,
        measure_height(title, _TITLE) + 2 * _PAD + (line if has_heads else 0),
        measure_height(legend, _LEGEND) + _PAD + (_PAD if has_heads else line),
    )


def _make_scale(colours: Sequence[str]) -> Colormap:
    """Return the scale of shares from 0 to 1, with the colour of those that are too large."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("shares", [*colours]).with_extremes(over=OVER)


def _make_label(x: float, y: float, text: str, size: float, **options: Any) -> Label:
    from altgrad.report.labels import Label

    return Label(x, y, text, size, **options)


def _draw_empty(title: str, width: float) -> Figure:
    """Return a map without cells, which says that nothing has been observed yet."""
    figure = make_figure(width, 1.2)
    figure.suptitle(title, size=_TITLE)
    return finish_empty_figure(figure, _NOTHING)


def _wrap(text: str, size: float, width: float) -> str:
    """Break the lines of a text that are wider than `width` inches, after a "; "."""
    from altgrad.report.labels import measure_width

    lines: list[str] = []
    for line in text.split("\n"):
        own = ""
        for part in line.split("; "):
            longer = f"{own}; {part}" if own else part
            if own and measure_width(longer, size) > width:
                lines.append(f"{own};")
                longer = part
            own = longer
        lines.append(own)
    return "\n".join(lines)
