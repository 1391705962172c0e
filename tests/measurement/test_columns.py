"""The columns of a measurement: names and order."""

import pytest
import torch

from altgrad.measurement.columns import (
    ELEMENTS,
    FORMAT_MAXIMA,
    FORMAT_ROW_SQUARES,
    FORMAT_ROW_SUMS,
    FORMAT_SUMS,
    JUDGED,
    MAXIMA,
    POPULATION,
    ROW_SQUARES,
    ROW_SUMS,
    SUMS,
    WHAT_IF,
    max_count,
    sum_count,
)
from altgrad.measurement.histogram import OCTAVES
from altgrad.measurement.measurer import Measurer
from altgrad.quantization.format_set import FormatSet


def test_names_of_sums_and_maxima_are_distinct() -> None:
    for names in ((*SUMS, *FORMAT_SUMS), (*MAXIMA, *FORMAT_MAXIMA)):
        assert len(set(names)) == len(names)


def test_sums_and_sums_of_squares_have_different_names() -> None:
    """Two sums with one name would be added up in one column."""
    for sums, squares in ((ROW_SUMS, ROW_SQUARES), (FORMAT_ROW_SUMS, FORMAT_ROW_SQUARES)):
        assert not {*sums} & {*squares}
        assert all("_sq" in name or "_4th" in name for name in squares)


def test_population_and_elements_come_first() -> None:
    assert (SUMS[POPULATION], SUMS[ELEMENTS]) == ("population", "elements")


def test_octaves_come_last_without_the_first_one() -> None:
    numbers = range(1, 64)
    assert OCTAVES == 64
    of_layer = [f"{name}[{number}]" for name in ("ulps", "weights") for number in numbers]
    assert [*SUMS[-126:]] == of_layer
    assert FORMAT_SUMS[-63:] == tuple(f"steps[{number}]" for number in numbers)
    assert not any("[" in name for name in (*SUMS[:-126], *FORMAT_SUMS[:-63]))


def test_what_if_sums_are_those_over_updates() -> None:
    assert {*WHAT_IF} == {
        *("visible", "effective", "ever_effective", "kept", "kept_update_cubed"),
        *("stochastic_move", "stochastic_variance", "kept_sq", "lost_sq"),
    }


def test_judged_sums_repeat_sums_of_the_layer() -> None:
    """Each column of JUDGED belongs to formats, and repeats a column of the layer."""
    assert {*JUDGED} <= {*FORMAT_SUMS}
    assert {*JUDGED.values()} <= {*ROW_SUMS, *ROW_SQUARES}
    assert not {*JUDGED} & {*FORMAT_ROW_SUMS, *FORMAT_ROW_SQUARES}


@pytest.mark.parametrize("names", [(), ("bf16",), ("bf16", "e4m3fn", "nvfp4")], ids=len)
def test_a_vector_has_a_column_for_each_name(names: tuple[str, ...]) -> None:
    row = Measurer(FormatSet(names)).measure_tensor(torch.ones(5), torch.full((5,), 1.5))
    n = len(names)
    assert sum_count(n) == len((*SUMS, *FORMAT_SUMS * n))
    assert max_count(n) == len((*MAXIMA, *FORMAT_MAXIMA * n))
    assert len(row) == sum_count(n) + max_count(n)
    assert (row[POPULATION], row[ELEMENTS]) == (5, 5)
    last_names = dict(zip(FORMAT_SUMS, row[sum_count(n - 1) : sum_count(n)].tolist(), strict=False))
    assert not names or last_names["judged"] == 5
