"""PNG and SVG: the same each time, to be put into a page, in a style that is no user's."""

import io
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import matplotlib as mpl
import pytest
from PIL import Image

from altgrad.report import png, svg
from altgrad.report.canvas import finished, finished_empty, in_default_style, new_figure
from tests.report.pictures import every_picture


def test_the_same_picture_is_the_same_svg() -> None:
    first, second = ([svg(f, "p") for f in every_picture(["a"]).values()] for _ in range(2))
    assert first == second


def test_an_svg_can_be_put_into_a_page_beside_others() -> None:
    pictures = every_picture(["a", "b"])
    elements = [svg(figure, f"p{k}") for k, figure in enumerate(pictures.values())]
    ids: list[str] = []
    for element in elements:
        assert element.startswith("<svg")
        assert "<metadata" not in element
        assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", element)  # nothing is fetched
        own = re.findall(r'\bid="([^"]*)"', element)
        used = re.findall(r'href="#([^"]*)"', element) + re.findall(r"url\(#([^)]*)\)", element)
        assert used
        assert {*used} <= {*own}
        ids += own
    assert len(ids) == len({*ids})


def test_text_in_an_svg_is_text() -> None:
    element = ET.fromstring(svg(every_picture(["blocks.0.norm"])["heat"], "p"))
    found = {text.text for text in element.iter("{http://www.w3.org/2000/svg}text")}
    assert {"of blocks.0.norm", "blocks.0.norm"} <= found


@pytest.mark.parametrize("prefix", ["", "1a", "a b", 'a"', "ä"])
def test_a_prefix_that_is_no_id(prefix: str) -> None:
    with pytest.raises(ValueError, match="expected a letter"):
        svg(every_picture(["a"])["heat"], prefix)


def test_the_style_of_users_is_neither_used_nor_changed() -> None:
    plain = [png(figure) for figure in every_picture(["a"]).values()]
    own = {"axes.facecolor": "red", "text.usetex": True, "font.size": 30, "savefig.dpi": 20}
    with mpl.rc_context(own):
        before = dict(mpl.rcParams)
        styled = [png(figure) for figure in every_picture(["a"]).values()]
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


def test_a_figure_has_so_many_inches_and_axes_in_these_proportions() -> None:
    figure, axes = new_figure(5, 2.5, [1, 3])
    for dpi in (40, 110):
        assert Image.open(io.BytesIO(png(figure, dpi))).size == (5 * dpi, int(2.5 * dpi))
    top, below = (each.get_position() for each in axes)
    assert below.height == pytest.approx(3 * top.height, rel=0.01)
    axes[1].set_xlim(2, 3)
    assert axes[0].get_xlim() == (2, 3)


def test_no_text_of_a_finished_figure_is_a_formula_or_unprintable() -> None:
    figure, [axes] = new_figure(3, 2)
    text = axes.text(0, 0, "$x_1$\nb\x00\tc")
    assert text.get_parse_math()
    finished(figure)
    assert not text.get_parse_math()
    assert text.get_text() == "$x_1$\nb��c"  # lines stay lines


def test_instead_of_nothing_a_figure_says_why() -> None:
    figure, axes = new_figure(3, 2, [1, 1])
    finished_empty(figure, "nothing yet")
    assert not any(each.axison for each in axes)
    assert [text.get_text() for text in figure.texts] == ["nothing yet"]


def test_after_a_drawing_that_fails_the_style_is_the_users_again() -> None:
    @in_default_style
    def draw() -> None:
        assert mpl.rcParams["font.size"] == mpl.rcParamsDefault["font.size"] == 10
        raise ZeroDivisionError

    with mpl.rc_context({"font.size": 30}):
        with pytest.raises(ZeroDivisionError):
            draw()
        assert mpl.rcParams["font.size"] == 30
