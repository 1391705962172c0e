"""The pictures show the right numbers, for any name and any number of layers."""

import math
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from altgrad import Histogram
from altgrad.report import heat_map, kept_map, png, ranges, steps_histogram, svg
from altgrad.report.colours import FROZEN, MISSING
from altgrad.report.judging.calibration import calibration
from tests.report.pictures import FORMATS, STEPS, draw_all, read_pixels, read_texts

NAN = math.nan


def shown(figure: Figure) -> np.ndarray:
    return np.ma.filled(figure.axes[0].images[0].get_array(), NAN)


def rows(figure: Figure) -> list[str]:
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


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
    assert painted == [MISSING, FROZEN]  # behind all cells, and that of the layer a
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


# --- distributions


def test_updates_below_half_a_spacing_are_counted_and_coloured() -> None:
    figure = steps_histogram(STEPS)
    bars = figure.axes[0].patches
    assert [(bar.get_x(), bar.get_height()) for bar in bars] == [(-3, 1), (-2, 3), (-1, 2), (0, 2)]
    colours = [to_hex(bar.get_facecolor()) for bar in bars]
    assert colours == ["#d55e00", "#d55e00", "#0072b2", "#0072b2"]
    assert [text.get_text() for text in figure.axes[0].texts] == [
        "50 % too small to move a weight",
        "50 % large enough",
    ]
    assert figure.axes[1].texts[0].get_text().startswith("100 %")
    assert {"bf16", "e4m3fn"} <= {*read_texts(figure)}
    assert [line.get_xdata()[0] for line in figure.axes[0].lines] == [-1]


@pytest.mark.parametrize(("count", "text"), [(1e6, ">99 %"), (1e-6, "<1 %")])
def test_100_and_0_percent_are_shown_only_if_exact(count: float, text: str) -> None:
    figure = steps_histogram({"bf16": Histogram(-2, [count, 1])})
    assert figure.axes[0].texts[0].get_text().startswith(text)


def test_octaves_with_hardly_any_updates_are_left_out_at_the_ends() -> None:
    figure = steps_histogram({"bf16": Histogram(-32, [1] + [0] * 30 + [1e6] * 2 + [0] * 31)})
    low, high = figure.axes[-1].get_xlim()
    assert -5 < low < -4
    assert 3 < high < 4


def test_the_bar_of_a_format_spans_its_numbers() -> None:
    figure = ranges(Histogram(-6, [1, 2, 1]), FORMATS)  # the largest weight is in octave -4
    bars = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in figure.axes[1].patches]
    bf16, e4m3fn, e0m7, mxfp4 = (bars[2 * k : 2 * k + 2] for k in range(4))
    assert bf16[0] == pytest.approx((-133, -126))
    assert bf16[1] == pytest.approx((-126, 128), abs=0.01)
    # 448 = 1.75 · 2^8 stands at 1.75 · 2^-4; the smallest number, 2^-9, is 17 octaves below 2^8.
    assert e4m3fn[0] == pytest.approx((-21, -18))
    assert e4m3fn[1] == pytest.approx((-18, -4 + math.log2(1.75)))
    assert e0m7[0] == pytest.approx((-10, -3), abs=0.02)
    assert e0m7[1][0] == pytest.approx(e0m7[1][1])  # e0m7 has subnormal numbers only
    assert mxfp4[1] == pytest.approx((-6, -4 + math.log2(1.5)))
    labels = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert labels == ["bf16", "e4m3fn *", "e0m7 *", "mxfp4 *"]
    assert {"← 2⁻¹³³", "2¹²⁸ →"} <= {*read_texts(figure)}


# --- any name and any size


@pytest.mark.parametrize(
    "name",
    ["a_$x_b$_{c}", "<script>alert(1)</script>", "$", r"\frac{1}{2}", 'x id="y"', "层", "a\nb\x00"],
)
def test_names_are_shown_literally(name: str) -> None:
    printable = name.replace("\n", "�").replace("\x00", "�")
    for key, figure in draw_all([name]).items():
        if key != "ranges":
            assert printable in read_texts(figure), key
            read = [text for text in figure.findobj(Text) if text.get_text() == printable]
            assert not any(text.get_parse_math() for text in read)
            element = ET.fromstring(svg(figure, "p"))
            assert printable in ["".join(e.itertext()) for e in element.iter()], key


@pytest.mark.parametrize("count", [1, 60, 61, 2000])
def test_pictures_of_any_number_of_layers_have_a_bounded_size(count: int) -> None:
    for figure in draw_all([f"layer.{k}" for k in range(count)]).values():
        image = read_pixels(figure)
        assert 100 < image.shape[0] < 1500
        assert 500 < image.shape[1] < 1300


def test_a_picture_without_data_shows_a_sentence() -> None:
    nothing = [
        heat_map({}, title=""),
        heat_map({"a": {}}, title=""),
        kept_map({}, {}, title=""),
        steps_histogram({}),
        ranges(Histogram(-3, [0, 0]), FORMATS),
        ranges(Histogram(-3, []), []),
    ]
    for figure in nothing:
        assert any("observed yet" in text for text in read_texts(figure))


def test_a_step_without_a_finite_update_is_not_taken_for_no_step() -> None:
    texts = read_texts(steps_histogram({"bf16": Histogram(-3, [0, 0])}))
    assert "no finite update in this step" in texts


def test_a_picture_of_nan_alone_is_drawn() -> None:
    png(heat_map({"a": {0: NAN}, "b": {0: NAN}}, title=""))
    png(kept_map({"a": {"bf16": NAN}}, {}, title=""))


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


def test_a_long_name_of_a_format_is_shortened_beside_its_range() -> None:
    long = replace(FORMATS[0], name="f" * 5000)
    texts = read_texts(ranges(Histogram(-6, [1, 2, 1]), [long]))
    assert max(map(len, texts)) < 200
