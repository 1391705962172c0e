"""Colours: one scale that colour-blind readers and grey print can read, and one per verdict."""

import itertools
import math

import pytest
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb

from altgrad.report import Verdict
from altgrad.report.cells import COLOURS
from altgrad.report.colours import (
    CELLS,
    FROZEN,
    KEPT,
    LOST,
    MISSING,
    OVER,
    SHARE_SCALE,
    STYLES,
    find_share_colour,
    find_text_colour,
    measure_luminance,
)

# What people see who lack red or green cones: Machado, Oliveira and Fernandes, 2009, table 1,
# for a severity of 1.0, on linear RGB.
BLIND = {
    "protan": ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
    "deutan": ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
}


def simulate(colour: str, kind: str) -> list[float]:
    """Return the linear RGB of a colour as a colour-blind reader sees it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    rows = BLIND[kind]
    return [
        min(max(sum(m * c for m, c in zip(row, linear, strict=True)), 0), 1) ** (1 / 2.2)
        for row in rows
    ]


def test_the_scale_becomes_lighter_from_lost_to_kept() -> None:
    shades = [measure_luminance(find_share_colour(k / 100)) for k in range(101)]
    assert all(low < high for low, high in itertools.pairwise(shades))
    assert shades[0] < 0.07
    assert shades[-1] > 0.75
    assert measure_luminance(FROZEN) < shades[0] / 2


def test_the_luminance_is_that_of_the_standard() -> None:
    assert measure_luminance("#000000") == 0
    assert measure_luminance("#ffffff") == pytest.approx(1)
    assert measure_luminance("#ff0000") == pytest.approx(0.2126)


def test_a_table_has_the_colours_of_the_pictures() -> None:
    scale = LinearSegmentedColormap.from_list("scale", SHARE_SCALE, N=100_001)
    for share in (0.0, 0.03, 0.2, 0.5, 0.99, 1.0):
        drawn = to_rgb(to_hex(scale(share)))
        assert to_rgb(find_share_colour(share)) == pytest.approx(drawn, abs=1.01 / 255)


def test_shares_out_of_range_and_missing_ones_have_colours_of_their_own() -> None:
    assert find_share_colour(-3.0) == SHARE_SCALE[0]
    assert find_share_colour(1.05) == SHARE_SCALE[-1]
    assert (find_share_colour(2.0), find_share_colour(math.inf)) == (OVER, OVER)
    assert find_share_colour(math.nan) == MISSING


@pytest.mark.parametrize("background", [*CELLS.values(), *SHARE_SCALE])
def test_text_has_enough_contrast_on_every_colour(background: str) -> None:
    light, dark = sorted(
        (measure_luminance(each) for each in (background, find_text_colour(background))),
        reverse=True,
    )
    assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG 2.1, 1.4.3


@pytest.mark.parametrize("kind", BLIND)
def test_colour_blind_readers_can_tell_the_colours_apart(kind: str) -> None:
    for shown_together in ((*SHARE_SCALE, FROZEN, OVER), (LOST, KEPT)):
        seen = {each: simulate(each, kind) for each in shown_together}
        for a, b in itertools.combinations(seen, 2):
            assert math.dist(seen[a], seen[b]) > 0.1, (a, b)


def test_every_verdict_has_a_colour_in_tables_and_terminals() -> None:
    assert {*CELLS} == {*STYLES} == {*Verdict}
    assert COLOURS is STYLES
    assert CELLS[Verdict.FROZEN] == FROZEN
    assert len({CELLS[each] for each in (Verdict.FROZEN, Verdict.NEEDS_REMEDY)}) == 2
