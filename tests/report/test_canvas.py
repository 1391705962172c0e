"""PNG and SVG are repeatable, fit into a page, and have matplotlib's default style."""

import io
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from altgrad.report import png, svg
from altgrad.report.canvas import (
    draw_pixels,
    finish_empty_figure,
    finish_figure,
    in_default_style,
    new_figure,
    new_panels,
)
from altgrad.report.maps import heat_map
from tests.report.pictures import draw_all


def test_equal_pictures_give_equal_svg() -> None:
    first, second = ([svg(f, "p") for f in draw_all(["a"]).values()] for _ in range(2))
    assert first == second


def test_ids_of_several_svg_in_a_page_are_distinct() -> None:
    pictures = draw_all(["a", "b"])
    elements = [svg(figure, f"p{k}") for k, figure in enumerate(pictures.values())]
    ids: list[str] = []
    for element in elements:
        assert element.startswith("<svg")
        assert "<metadata" not in element
        assert "http" not in re.sub(
            r'xmlns(:\w+)?="[^"]*"', "", element
        )  # the page needs no network
        own = re.findall(r'\bid="([^"]*)"', element)
        used = re.findall(r'href="#([^"]*)"', element) + re.findall(r"url\(#([^)]*)\)", element)
        assert used
        assert {*used} <= {*own}
        ids += own
    assert len(ids) == len({*ids})


def test_text_in_an_svg_is_text() -> None:
    element = ET.fromstring(svg(draw_all(["blocks.0.norm"])["heat"], "p"))
    found = {text.text for text in element.iter("{http://www.w3.org/2000/svg}text")}
    assert {"title blocks.0.norm", "blocks.0.norm"} <= found


@pytest.mark.parametrize("prefix", ["", "1a", "a b", 'a"', "ä"])
def test_an_invalid_prefix_is_an_error(prefix: str) -> None:
    with pytest.raises(ValueError, match="expected a letter"):
        svg(draw_all(["a"])["heat"], prefix)


def test_the_users_style_is_neither_used_nor_changed() -> None:
    plain = [png(figure) for figure in draw_all(["a"]).values()]
    own = {"axes.facecolor": "red", "text.usetex": True, "font.size": 30, "savefig.dpi": 20}
    with mpl.rc_context(own):
        before = dict(mpl.rcParams)
        styled = [png(figure) for figure in draw_all(["a"]).values()]
        assert dict(mpl.rcParams) == before
    assert styled == plain


def test_pyplot_is_not_imported() -> None:
    script = (
        "import sys; from altgrad.report import *; assert 'matplotlib' not in sys.modules; "
        "figure = heat_map({'a': {0: 0.5}}, title=''); png(figure); svg(figure, 'p'); "
        "print('matplotlib.pyplot' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_a_new_figure_has_the_given_size_and_proportions() -> None:
    figure, axes = new_figure(5, 2.5, [1, 3])
    for dpi in (40, 110):
        assert Image.open(io.BytesIO(png(figure, dpi))).size == (5 * dpi, int(2.5 * dpi))
    top, below = (each.get_position() for each in axes)
    assert below.height == pytest.approx(3 * top.height, rel=0.01)
    axes[1].set_xlim(2, 3)
    assert axes[0].get_xlim() == (2, 3)


def test_pixels_are_those_of_the_png() -> None:
    drawn = draw_pixels(heat_map({"a": {0: 0.5, 1: 1.0}}, title="map"))
    encoded = Image.open(io.BytesIO(png(heat_map({"a": {0: 0.5, 1: 1.0}}, title="map"))))
    assert (drawn == np.asarray(encoded.convert("RGB"))).all()


def test_a_finished_figure_shows_its_texts_literally() -> None:
    figure, [axes] = new_figure(3, 2)
    text = axes.text(0, 0, "$x_1$\nb\x00\tc")
    assert text.get_parse_math()
    finish_figure(figure)
    assert not text.get_parse_math()
    assert text.get_text() == "$x_1$\nb��c"  # line feeds stay


def test_an_empty_figure_shows_the_reason() -> None:
    figure, axes = new_figure(3, 2, [1, 1])
    finish_empty_figure(figure, "nothing yet")
    assert not any(each.axison for each in axes)
    assert [text.get_text() for text in figure.texts] == ["nothing yet"]


def test_a_failing_drawing_restores_the_users_style() -> None:
    @in_default_style
    def draw() -> None:
        assert mpl.rcParams["font.size"] == mpl.rcParamsDefault["font.size"] == 10
        raise ZeroDivisionError

    with mpl.rc_context({"font.size": 30}):
        with pytest.raises(ZeroDivisionError):
            draw()
        assert mpl.rcParams["font.size"] == 30


def test_panels_stand_side_by_side_with_axes_of_their_own() -> None:
    figure, panels = new_panels(6, 3, 3)
    panels[0].set_xlim(0, 5)
    png(figure)
    assert [axes.get_xlim()[1] for axes in panels] == [5, 1, 1]
    places = [axes.get_position() for axes in panels]
    assert [round(place.y0, 3) for place in places] == [round(places[0].y0, 3)] * 3
    assert places[0].x1 < places[1].x0 < places[1].x1 < places[2].x0
