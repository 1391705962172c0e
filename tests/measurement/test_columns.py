"""The columns of a measurement: what a row holds, and in which order."""

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
    OCTAVES,
    POPULATION,
    ROW_SQUARES,
    ROW_SUMS,
    SUMS,
    WHAT_IF,
    max_count,
    sum_count,
)
from altgrad.measurement.measurer import Measurer
from altgrad.quantization.format_set import FormatSet


def test_names_of_sums_and_maxima_are_distinct() -> None:
    for names in ((*SUMS, *FORMAT_SUMS), (*MAXIMA, *FORMAT_MAXIMA)):
        assert len(set(names)) == len(names)


def test_of_no_sum_of_squares_is_there_another_sum_of_the_same_name() -> None:
    """They would be added up in one column."""
    for sums, squares in ((ROW_SUMS, ROW_SQUARES), (FORMAT_ROW_SUMS, FORMAT_ROW_SQUARES)):
        assert not {*sums} & {*squares}
        assert all("_sq" in name or "_4th" in name for name in squares)


def test_what_is_measured_and_what_it_stands_for_come_first() -> None:
    assert (SUMS[POPULATION], SUMS[ELEMENTS]) == ("population", "elements")


def test_octaves_come_last_and_the_first_of_them_is_left_out() -> None:
    numbers = range(1, 64)
    assert OCTAVES == 64
    assert SUMS[-63:] == tuple(f"ulps[{number}]" for number in numbers)
    assert FORMAT_SUMS[-63:] == tuple(f"steps[{number}]" for number in numbers)
    assert not any("[" in name for name in (*SUMS[:-63], *FORMAT_SUMS[:-63]))


def test_what_if_is_all_that_a_stalled_update_would_be_missing_from() -> None:
    assert {*WHAT_IF} == {
        *("visible", "effective", "ever_effective", "kept", "kept_update_cubed"),
        *("stochastic_move", "stochastic_variance", "kept_sq", "lost_sq"),
    }


def test_sums_that_were_judged_are_those_of_the_parameter() -> None:
    """Each is a column of every format, and repeats one of the parameter that has no format."""
    assert {*JUDGED} <= {*FORMAT_SUMS}
    assert {*JUDGED.values()} <= {*ROW_SUMS, *ROW_SQUARES}
    assert not {*JUDGED} & {*FORMAT_ROW_SUMS, *FORMAT_ROW_SQUARES}


@pytest.mark.parametrize("names", [(), ("bf16",), ("bf16", "e4m3fn", "nvfp4")], ids=len)
def test_a_row_has_a_number_for_each_name(names: tuple[str, ...]) -> None:
    row = Measurer(FormatSet(names)).measure_tensor(torch.ones(5), torch.full((5,), 1.5))
    n = len(names)
    assert sum_count(n) == len((*SUMS, *FORMAT_SUMS * n))
    assert max_count(n) == len((*MAXIMA, *FORMAT_MAXIMA * n))
    assert len(row) == sum_count(n) + max_count(n)
    assert (row[POPULATION], row[ELEMENTS]) == (5, 5)
    of_last = dict(zip(FORMAT_SUMS, row[sum_count(n - 1) : sum_count(n)].tolist(), strict=False))
    assert not names or of_last["judged"] == 5
