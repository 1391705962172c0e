"""`Label`: pixels as matplotlib draws the text itself, each text drawn once; text in an SVG."""

import io
from unittest import mock

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from altgrad.report import heat_map
from altgrad.report.canvas import draw_pixels, in_default_style
from altgrad.report.labels import Label, draw_coverage, measure_height, measure_width

TEXTS = ["blocks.0.fc2.weight", "H", "gjpqy", "–", "0.99", "two\nlines of it", " "]


@in_default_style
def draw(kind: type[Text], text: str, size: float, **options: str) -> np.ndarray:
    """Return how dark each pixel of a text in the middle of a figure is, 0 to 255."""
    figure = Figure(figsize=(3, 1), dpi=110)
    canvas = FigureCanvasAgg(figure)
    if kind is Label:
        figure.add_artist(Label(0.5, 0.5, text, size, transform=figure.transFigure, **options))
    else:
        figure.text(0.5, 0.5, text, size=size, **{"va": "center_baseline"} | options)
    canvas.draw()
    return 255 - np.asarray(canvas.buffer_rgba())[..., 0].astype(int)


def find_box(dark: np.ndarray) -> list[int]:
    """Return the first and last row, and the first and last column, with dark pixels."""
    rows, columns = (np.flatnonzero(dark.max(axis) > 60) for axis in (1, 0))
    return [rows[0], rows[-1], columns[0], columns[-1]] if len(rows) else []


@pytest.mark.parametrize("size", [7, 9])
@pytest.mark.parametrize("ha", ["left", "center", "right"])
@pytest.mark.parametrize("text", TEXTS)
def test_a_label_looks_as_the_text_does(text: str, ha: str, size: float) -> None:
    va = "top" if "\n" in text else "center_baseline"
    label, plain = (draw(kind, text, size, ha=ha, va=va) for kind in (Label, Text))
    assert np.allclose(find_box(label), find_box(plain), atol=2)
    # As much ink, wherever a letter is rounded to a pixel.
    assert label.sum() == pytest.approx(plain.sum(), rel=0.1, abs=1)


def test_the_colour_is_that_of_the_label() -> None:
    figure = Figure(figsize=(1, 1), dpi=110)
    canvas = FigureCanvasAgg(figure)
    figure.add_artist(Label(0.5, 0.5, "■", 20, color="#cc79a7", transform=figure.transFigure))
    canvas.draw()
    assert (0xCC, 0x79, 0xA7) in {tuple(p) for p in np.asarray(canvas.buffer_rgba())[55, :, :3]}


def test_a_text_is_measured_by_its_widest_line_and_all_lines() -> None:
    wide, narrow = measure_width("wwww", 7), measure_width("i", 7)
    assert wide > 4 * narrow > 0
    assert measure_width("i\nwwww\ni", 7) == wide
    assert measure_height("i\nwwww\ni", 7) == pytest.approx(3 * measure_height("i", 7))
    assert measure_width("", 7) == 0
    pixels = find_box(draw(Text, "wwww", 7, ha="center"))
    assert wide * 110 == pytest.approx(pixels[3] - pixels[2] + 1, abs=2)


def test_the_maps_of_a_look_draw_each_name_once() -> None:
    draw_coverage.cache_clear()
    values = {f"blocks.{k}.weight": {0: k / 60} for k in range(60)}
    drawn: list[str] = []

    def draw_text(text: Text, _: object) -> None:
        drawn.append(text.get_text())

    with mock.patch.object(Text, "draw", draw_text):
        for format in ("bf16", "e5m2", "fp16", "e4m3fn"):
            draw_pixels(heat_map(values, title=format))
    assert not any(drawn)  # no text is drawn letter by letter
    sizes = 2  # 7 and 8 points of the same texts, at most
    assert draw_coverage.cache_info().misses <= sizes * (60 + 4 + 20)


def test_an_svg_has_the_text_itself() -> None:
    figure = Figure(figsize=(2, 1))
    figure.add_artist(Label(0.5, 0.5, "gain.weight", 7, transform=figure.transFigure))
    file = io.StringIO()
    with mock.patch.dict("matplotlib.rcParams", {"svg.fonttype": "none"}):
        figure.savefig(file, format="svg")
    assert ">gain.weight</text>" in file.getvalue()
