"""The picture of what was predicted against what happened."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from altgrad.report import Confirmation, agreement, svg
from tests.report.confirming import make_twin_run, share
from tests.report.pictures import read_texts

NAN = math.nan


def draw(ends: dict[str, tuple[float, float, float, float]]) -> Figure:
    """Draw layers with these figures: frozen_frac predicted and real, progress_kept likewise."""
    predicted = {name: share(each[0], each[2]) for name, each in ends.items()}
    real = {name: share(each[1], each[3]) for name, each in ends.items()}
    return agreement(Confirmation(make_twin_run(predicted, "true"), make_twin_run(real), "true"))


def find_points(figure: Figure, panel: int) -> dict[str, list[tuple[float, float]]]:
    """Return the points of a panel by the label of their group."""
    return {
        str(each.get_label()): [
            (float(x), float(y)) for x, y in np.ma.filled(each.get_offsets(), NAN)
        ]
        for each in figure.axes[panel].collections
    }


def test_each_layer_is_a_point_in_both_panels_and_frozen_ones_are_told_apart() -> None:
    figure = draw(
        {
            "moves": (0.25, 0.5, 0.75, 0.5),
            "other": (0.0, 0.125, 1.0, 0.875),
            "both": (1.0, 0.99, 0.0, 0.125),
            "early": (0.99, 0.5, 0.0, 0.5),
            "late": (0.5, 1.0, 0.5, 0.0),
        }
    )
    frozen, kept = (find_points(figure, panel) for panel in (0, 1))
    assert {label: sorted(points) for label, points in frozen.items()} == {
        "moves (2)": [(0.0, 0.125), (0.25, 0.5)],
        "frozen, as predicted (1)": [(1.0, 0.99)],
        "frozen in one of them alone (2)": [(0.5, 1.0), (0.99, 0.5)],
    }
    assert sorted(kept["moves (2)"]) == [(0.75, 0.5), (1.0, 0.875)]
    assert {"predicted by A", "real in B", *frozen} <= {*read_texts(figure)}
    assert all(axes.get_xlim() == axes.get_ylim() for axes in figure.axes)


def test_the_picture_says_what_is_compared_and_how_to_read_it() -> None:
    texts = read_texts(draw({"a": (0.25, 0.5, 0.75, 0.5), "b": (0.0, 0.0, 1.0, 1.0)}))
    assert "true: what run A predicted, and what really happened in run B" in texts
    assert "2 layers at step 0. On the line, the prediction came true." in texts
    assert {"Share of the weights that never moved\n(frozen_frac)", "predicted by A"} <= {*texts}
    assert "Progress of the layer, over that in float32\n(progress_kept)" in texts


def test_the_layers_that_differ_most_are_named() -> None:
    ends = {f"near{k}": (k / 10, k / 10 + 0.02, 0.5, 0.5) for k in range(8)}
    texts = read_texts(
        draw({**ends, "far[$x$]": (0.2, 0.9, 0.5, 0.5), "far.too": (0.9, 0.4, 1, 1)})
    )
    assert {"far[$x$]", "far.too"} <= {*texts}
    assert not any(text.startswith("near") for text in texts)


def test_figures_beyond_the_axes_are_drawn_at_the_edge_and_nan_is_left_out() -> None:
    figure = draw(
        {"wild": (0.5, 0.5, 1e300, -1e300), "none": (NAN, 0.5, NAN, 0.5), "a": (0, 0, 1, 1)}
    )
    (points,) = find_points(figure, 1).values()
    assert points[0] == (2.0, -0.5)
    assert sum(not any(map(math.isnan, each)) for each in points) == 2
    low, high = figure.axes[1].get_xlim()
    assert -1 < low < -0.5
    assert 2 < high < 3
    assert "wild" in read_texts(figure)


def test_a_picture_without_layers_says_why() -> None:
    runs = make_twin_run({"a": share(0, 1)}, "true", steps=[1]), make_twin_run({}, steps=[2])
    figure = agreement(Confirmation(*runs, "true"))
    assert "no layer has figures of both runs at the same step" in read_texts(figure)


def test_equal_pictures_are_equal_svg_with_text() -> None:
    one, other = (svg(draw({"a.<b>": (0.0, 1.0, 1.0, 0.0)}), "p") for _ in range(2))
    assert one == other
    assert "a.&lt;b&gt;" in one
