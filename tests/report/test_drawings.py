"""The pictures show the right numbers, for any name and any number of layers."""

import math
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text

from altgrad import Histogram
from altgrad.report import heat_map, kept_map, png, ranges, steps_histogram, svg
from tests.report.pictures import FORMATS, STEPS, draw_all, read_pixels, read_texts

NAN = math.nan


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


def test_a_long_name_of_a_format_is_shortened_beside_its_range() -> None:
    long = replace(FORMATS[0], name="f" * 5000)
    texts = read_texts(ranges(Histogram(-6, [1, 2, 1]), [long]))
    assert max(map(len, texts)) < 200
