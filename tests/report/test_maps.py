"""Maps show the right shares and names, in colours that say what is lost, frozen or missing."""

import math

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from altgrad.report import heat_map, kept_map, png
from altgrad.report.colours import FROZEN
from altgrad.report.judging.calibration import calibration
from altgrad.report.labels import Label
from tests.report.pictures import read_pixels, read_texts

NAN = math.nan


def shown(figure: Figure) -> np.ndarray:
    return np.ma.filled(figure.axes[0].images[0].get_array(), NAN)


def rows(figure: Figure) -> list[str]:
    """Return the names beside the rows of a map, which end where the cells begin."""
    labels = [each for each in figure.artists if isinstance(each, Text)]
    return [each.get_text() for each in labels if each.get_horizontalalignment() == "right"]


# --- heat map


def test_a_heat_map_has_a_row_per_layer_and_a_column_per_step() -> None:
    figure = heat_map({"b": {9: 0.5, 4: 0.25}, "a": {4: 1.0, 9: 0.0}}, title="in bf16")
    np.testing.assert_array_equal(shown(figure), [[0.25, 0.5], [1.0, 0.0]])
    assert rows(figure) == ["b", "a"]
    assert {"in bf16", "4", "9"} <= {*read_texts(figure)}


def test_a_layer_that_is_observed_less_often_keeps_its_last_value_in_between() -> None:
    values = {"often": dict.fromkeys(range(5), 1.0), "rarely": {1: 0.5, 3: 0.25}}
    np.testing.assert_array_equal(shown(heat_map(values, title=""))[1], [NAN, 0.5, 0.5, 0.25, NAN])


def test_a_nan_is_not_replaced_by_the_value_before_it() -> None:
    figure = heat_map({"a": {0: 0.5, 1: NAN, 2: 0.5}}, title="")
    np.testing.assert_array_equal(shown(figure), [[0.5, NAN, 0.5]])
    assert any("grey: no value" in text for text in read_texts(figure))
    assert not any("grey" in text for text in read_texts(heat_map({"a": {0: 0.5}}, title="")))


def test_a_nan_is_grey_in_the_pixels() -> None:
    image = read_pixels(heat_map({"a": {0: NAN, 1: 1.0}}, title=""))
    left, right = (image[len(image) // 3, image.shape[1] * k // 10] for k in (2, 7))
    assert left[0] == left[1] == left[2]
    assert right[0] > 2 * right[1]  # dark brown


def test_neighbouring_steps_are_averaged_if_there_are_more_than_columns() -> None:
    figure = heat_map({"a": {step: step / 1000 for step in range(1000)}}, title="")
    (row,) = shown(figure)
    assert len(row) == 200
    np.testing.assert_allclose(row, (np.arange(0, 1000, 5) + 2) / 1000)
    assert any("a column is the mean of 5" in text for text in read_texts(figure))


@pytest.mark.parametrize(("label", "worst"), [("stall_frac", 1.0), ("kept_update_ratio", 0.0)])
def test_of_2000_layers_the_worst_60_are_shown_in_their_order(label: str, worst: float) -> None:
    chosen = [*range(7, 2000, 34)]  # 59
    values = {f"layer.{k}": {0: worst if k in chosen else 0.5} for k in range(2000)}
    values["nothing"] = {0: NAN}
    values["layer.100"] = {0: abs(worst - 0.25)}
    figure = heat_map(values, title="in bf16", label=label)
    assert rows(figure) == [f"layer.{k}" for k in sorted([*chosen, 100])]
    assert "in bf16\nthe worst 60 of 2,001 layers" in read_texts(figure)


@pytest.mark.parametrize("label", ["stall_frac", "kept_update_ratio"])
def test_dark_is_bad(label: str) -> None:
    figure = heat_map({"a": {0: 0.0}, "b": {0: 1.0}}, title="", label=label)
    image = figure.axes[0].images[0]
    zero, one = (sum(image.cmap(image.norm(x))[:3]) for x in (0.0, 1.0))
    assert (one < zero) == (label == "stall_frac")


def test_a_frozen_layer_is_a_black_row_and_differs_from_one_that_is_merely_dark() -> None:
    values = {"dark": {0: 1.0, 9: 1.0}, "gain": {0: 1.0, 9: 1.0}}
    figure = heat_map(values, title="", frozen={"gain"})
    assert [text.get_text() for text in figure.axes[0].texts] == ["frozen"]
    assert any("black: frozen, never moves" in text for text in read_texts(figure))
    assert not any("black" in text for text in read_texts(heat_map(values, title="")))
    image = read_pixels(figure)
    dark, black = (tuple(image[round(len(image) * k), image.shape[1] // 4]) for k in (0.22, 0.55))
    assert (dark, black) == ((0x7F, 0x27, 0x04), (0x1C, 0x1C, 0x1C))


def test_a_cell_with_a_word_is_black_in_the_kept_map() -> None:
    figure = kept_map({"a": {"bf16": 0.0}, "b": {"bf16": 0.0}}, {"a": {"bf16": "stuck"}}, title="")
    painted = [to_hex(each.get_facecolor()) for each in figure.axes[0].patches]
    assert painted == [FROZEN]
    assert [text.get_color() for text in figure.axes[0].texts] == ["white", "#ffffff"]


# --- kept map


def test_the_kept_map_shows_each_share_and_words_in_place_of_some() -> None:
    kept = {"norm": {"bf16": 0.0, "e5m2": 0.128}, "head": {"bf16": 0.5}}
    figure = kept_map(kept, {"norm": {"bf16": "frozen"}}, title="step 3")
    np.testing.assert_array_equal(shown(figure), [[0.0, 0.128], [0.5, NAN]])
    cells = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    assert cells == {(0, 0): "frozen", (1, 0): "0.13", (0, 1): "0.50", (1, 1): "–"}


def test_the_kept_map_of_2000_layers_shows_those_that_keep_least_now() -> None:
    kept = {f"l{k}": {"now": 1 - k / 2000, "e5m2": k / 2000} for k in range(2000)}
    assert rows(kept_map(kept, {}, title="t")) == [f"l{k}" for k in range(1940, 2000)]


def test_the_kept_map_of_2000_layers_shows_the_60_with_the_least_ratio() -> None:
    figure = kept_map({f"l{k}": {"bf16": 1 - k / 2000} for k in range(2000)}, {}, title="t")
    assert rows(figure) == [f"l{k}" for k in range(1940, 2000)]
    assert "t\nthe worst 60 of 2,000 layers" in read_texts(figure)


# --- figures far out of range


OVER = "#cc79a7"


def find_colour(figure: Figure, share: float) -> str:
    """Return the colour in which the first picture of a figure draws a number."""
    image = figure.axes[0].images[0]
    return to_hex(image.get_cmap()(image.norm(share)))


@pytest.mark.parametrize("draw", ["kept_map", "heat_map"])
def test_a_layer_that_overshoots_has_a_colour_of_its_own_and_a_legend(draw: str) -> None:
    over = calibration().thresholds.overshoots

    def make(**kept: float) -> Figure:
        if draw == "kept_map":
            return kept_map({n: {"bf16": k} for n, k in kept.items()}, {}, title="")
        return heat_map({n: {0: k} for n, k in kept.items()}, title="", label="kept_update_ratio")

    figure = make(far=1.5, near=over, whole=1.0, half=0.5)
    far, near, whole, half = (find_colour(figure, share) for (share,) in shown(figure))
    assert far == OVER
    assert near == whole != OVER
    assert half not in (whole, OVER)
    assert any(f"purple: above {over:g}" in text for text in read_texts(figure))
    assert not any("purple" in text for text in read_texts(make(near=over, half=0.5)))


def test_layers_that_stand_still_are_among_the_60_of_a_map() -> None:
    kept = {f"back{k}": {"bf16": -0.5} for k in range(100)} | {"gain": {"bf16": 0.25}}
    assert "gain" in rows(kept_map(kept, {"gain": {"bf16": "stuck"}}, title=""))
    assert "gain" not in rows(kept_map(kept, {}, title=""))
    low = {name: {"now": each["bf16"], "e5m2": 0.0} for name, each in kept.items()}
    assert "gain" not in rows(kept_map(low, {"gain": {"e5m2": "frozen"}}, title=""))
    assert "gain" in rows(kept_map(low, {"gain": {"now": "frozen"}}, title=""))


def test_a_kept_update_ratio_out_of_range_is_drawn_in_the_colours_of_the_ends() -> None:
    kept = {"a": {"bf16": 1e308, "e5m2": 1e308}, "b": {"bf16": -1e308, "e5m2": math.inf}}
    figure = kept_map(kept, {}, title="")
    colours = [[find_colour(figure, share) for share in row] for row in shown(figure)]
    lowest = find_colour(figure, 0.0)
    assert colours == [[OVER, OVER], [lowest, OVER]]
    png(figure)


# --- its layout


@pytest.mark.parametrize("draw", ["heat_map", "kept_map"])
@pytest.mark.parametrize("count", [1, 60])
def test_all_texts_lie_in_the_figure_and_none_on_the_cells(draw: str, count: int) -> None:
    """Bounds of texts are those of matplotlib itself, which measures them letter by letter."""
    names = [f"model.encoder.layers.{k}.attention.projection.weight" for k in range(count)]
    if draw == "heat_map":
        values = {n: {0: 1.5, 100_000: 0.5, 200_000: NAN} for n in names}
        figure = heat_map(values, title="kept", label="kept_update_ratio", frozen=names[:1])
    else:
        recipes = ("bf16", "e4m3fn-kahan")
        figure = kept_map({n: dict.fromkeys(recipes, 1.5) for n in names}, {}, title="kept")
    figure.set_dpi(110)
    cells = figure.axes[0].get_window_extent()
    outside = [each for each in figure.artists if isinstance(each, Label)]
    assert len(outside) >= count + 4  # title, legend, names of rows and columns
    for label in outside:
        box = label.get_window_extent(figure.canvas.get_renderer())
        assert figure.bbox.padded(2).containsx(box.x0), label.get_text()
        assert figure.bbox.padded(2).containsx(box.x1), label.get_text()
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, label.get_text()
        assert min(cells.x1, box.x1) - max(cells.x0, box.x0) < 2 or (
            min(cells.y1, box.y1) - max(cells.y0, box.y0) < 2
        ), label.get_text()


def test_a_long_legend_is_broken_between_its_parts() -> None:
    values = {"a": {0: 1.5, 9: NAN}, "b": {0: 0.0, 9: 0.0}}
    figure = heat_map(values, title="", label=5 * "a_long_name_", frozen={"b"})
    (legend,) = [text for text in read_texts(figure) if "colour:" in text]
    first, *others = legend.split("\n")
    assert (first, len(others)) == ("step", 2)
    assert others[0].endswith(";")
    assert not others[1].startswith(" ")
