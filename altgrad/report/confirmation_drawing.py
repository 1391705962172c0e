"""`agreement`: draw what one run predicted against what really happened, a point for each layer.

Read `canvas` and `confirmation` first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from altgrad._messages import format_count
from altgrad.report.canvas import (
    finish_empty_figure,
    finish_figure,
    in_default_style,
    new_panels,
)
from altgrad.report.confirmation import FROZEN, Confirmation, ConfirmedLayer
from altgrad.report.matching import SHARES
from altgrad.report.names import shorten_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TITLES: Mapping[str, str] = {
    "frozen_frac": "Share of the weights that never moved\n(frozen_frac)",
    "progress_kept": "Progress of the layer, over that in float32\n(progress_kept)",
}
_NEAR, _FAR = -0.5, 2.0
"""Largest range of an axis; a point outside of it is drawn at the edge."""

_LEAST_NAMED = 0.08
"""Difference from which on a layer may have its name beside its point."""

_MOST_NAMED = 3
_CHARACTER = 0.019  # width of a character, as a share of a panel
_NAME_WIDTH = 24  # characters of a name beside a point


class _Group(NamedTuple):
    """Layers that are drawn alike.

    Attributes:
        label: What they have in common, for the legend.
        colour: Colour of their points.
        marker: Shape of their points, as matplotlib names it.
        layers: The layers.
    """

    label: str
    colour: str
    marker: str
    layers: Sequence[ConfirmedLayer]


@in_default_style
def agreement(confirmation: Confirmation) -> Figure:
    """Draw predicted against real figures of the layers: those on the diagonal came true.

    One panel has the share of weights that never moved, the other the progress that is kept. Points
    of frozen layers, of which 0.99 of the weights never moved, are marked.

    Args:
        confirmation: What one run predicted, and the run in which it came true or not.

    Returns:
        The figure.
    """
    figure, panels = new_panels(8, 4.7, len(SHARES))
    layers = confirmation.layers
    if not layers:
        return finish_empty_figure(figure, "no layer has figures of both runs at the same step")
    groups = _group_layers(layers)
    for axes, metric in zip(panels, SHARES, strict=True):
        _draw_panel(axes, metric, groups)
        _name_worst(axes, metric, layers)
    handles, labels = panels[0].get_legend_handles_labels()
    count, step = format_count(len(layers), "layer"), max(layer.step for layer in layers)
    figure.legend(
        handles,
        labels,
        title=f"{count} at step {step:,}. On the line, the prediction came true.",
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=8,
        title_fontsize=8,
    )
    figure.suptitle(
        f"{confirmation.recipe}: what run A predicted, and what really happened in run B",
        size=10,
        weight="bold",
    )
    return finish_figure(figure)


def _group_layers(layers: Sequence[ConfirmedLayer]) -> list[_Group]:
    """Return layers that moved, that are frozen as predicted, and that are frozen in one alone."""
    counts: list[list[ConfirmedLayer]] = [[], [], []]
    for layer in layers:
        pair = layer.pairs["frozen_frac"]
        # None of the two is frozen, one is, or both are; NaN is not.
        counts[(pair.predicted >= FROZEN) + (pair.real >= FROZEN)].append(layer)
    moved, one, both = counts
    # Blue, orange and black of Okabe and Ito: https://jfly.uni-koeln.de/color/
    groups = [
        _Group("moves", "#0072b2", "o", moved),
        _Group("frozen, as predicted", "#d55e00", "D", both),
        _Group("frozen in one of them alone", "#000000", "X", one),
    ]
    return [group for group in groups if group.layers]


def _draw_panel(axes: Axes, metric: str, groups: Sequence[_Group]) -> None:
    """Draw the figures of one metric, with the diagonal on which predicted and real are equal."""
    pairs = [layer.pairs[metric] for group in groups for layer in group.layers]
    known = [figure for pair in pairs for figure in pair[:2] if math.isfinite(figure)]
    low = max(min(known, default=0.0), _NEAR) if min(known, default=0.0) < 0 else 0.0
    high = min(max(known, default=1.0), _FAR) if max(known, default=1.0) > 1 else 1.0
    margin = 0.05 * (high - low)
    axes.plot([low, high], [low, high], color="#999999", lw=0.8, zorder=1)
    for group in groups:
        points = [layer.pairs[metric] for layer in group.layers]
        style: dict[str, Any] = {"color": group.colour, "marker": group.marker, "s": 28}
        axes.scatter(
            [min(max(point.predicted, low), high) for point in points],
            [min(max(point.real, low), high) for point in points],
            label=f"{group.label} ({len(points):,})",
            alpha=0.7,
            lw=0,
            zorder=3,
            clip_on=False,
            **style,
        )
    axes.set_xlim(low - margin, high + margin)
    axes.set_ylim(low - margin, high + margin)
    axes.set_aspect("equal")
    axes.set_title(_TITLES[metric], size=9)
    axes.set_xlabel("predicted by A", size=8)
    axes.set_ylabel("real in B", size=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _name_worst(axes: Axes, metric: str, layers: Sequence[ConfirmedLayer]) -> None:
    """Write the names of up to three layers that differ most beside their points."""
    far = [each for each in layers if each.pairs[metric].difference >= _LEAST_NAMED]
    worst = sorted(far, key=lambda each: -each.pairs[metric].difference)[:_MOST_NAMED]
    names = shorten_names([str(layer.name) for layer in worst], _NAME_WIDTH)
    (low, high), taken = axes.get_xlim(), list[float]()
    for name, layer in zip(names, worst, strict=True):
        x, y = (min(max(figure, low), high) for figure in layer.pairs[metric][:2])
        if any(abs(y - other) < 0.05 * (high - low) for other in taken):
            continue  # the names would lie on each other
        taken.append(y)
        # Away from the diagonal, and into the panel.
        is_below, span = y < x, high - low
        needed = _CHARACTER * len(name) * span
        is_left = high - x > needed if is_below else x - low < needed
        place: dict[str, Any] = {
            "ha": "left" if is_left else "right",
            "va": "top" if is_below else "bottom",
            "xytext": (4 if is_left else -4, -3 if is_below else 3),
        }
        axes.annotate(name, (x, y), textcoords="offset points", size=7, color="#333333", **place)
