"""`Columns`: what a line declares comes back, and what contradicts itself is refused."""

import copy
import json
from typing import Any

import numpy as np
import pytest

from altgrad.report.records.columns import Bins, Columns
from altgrad.report.records.kinds import FieldError

COLUMNS = Columns(
    ("a.<b>", "重み", None),
    ("update_rms", "stall_frac/bf16"),
    ("stall_frac/bf16",),
    moved_elements=True,
    histograms={"ulps": Bins(0, 64), "weights": Bins(-48, 32)},
)


def test_declared_columns_are_read_back() -> None:
    line = COLUMNS.as_line(7)
    assert line.endswith(b"\n")
    number, found = Columns.from_json(json.loads(line))
    assert number == 7
    assert vars(found) == {name: getattr(COLUMNS, name) for name in vars(found)}


def test_places_follow_from_the_order() -> None:
    assert (COLUMNS.width, COLUMNS.cells, COLUMNS.count) == (4, 12, 12 + 64 + 32)
    assert COLUMNS.figure_places == {"update_rms": 0, "stall_frac/bf16": 1}
    assert COLUMNS.error_places == {"stall_frac/bf16": 2}
    assert COLUMNS.rows == {"a.<b>": 0, "重み": 1, None: 2}


def test_shares_errors_and_counts_have_bounds() -> None:
    least, most = COLUMNS.bounds
    assert least.tolist() == [-np.inf, 0, 0, 0]
    assert most.tolist() == pytest.approx([np.inf, 1, np.inf, 1e30])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("number", bad) for bad in (-1, 1.0, None, "0")),
        *(("layers", bad) for bad in (None, "a", [1], ["a", "a"], [None, None])),
        *(("figures", bad) for bad in (None, [None], ["a", "a"], {"a": 1}, ["x" * 20_000])),
        *(("errors", bad) for bad in (None, [2], ["a", "a"])),
        *(("moved_elements", bad) for bad in (None, 1, "true")),
        *(("histograms", bad) for bad in (None, [], {"a": {"first": 0}}, {"a": None})),
        ("histograms", {"a": {"first": 0, "bins": 10**6}}),
    ],
)
def test_a_bad_value_is_one_sentence_that_names_it(key: str, value: Any) -> None:
    line = copy.deepcopy(json.loads(COLUMNS.as_line(0)))
    line["columns"][key] = value
    with pytest.raises(FieldError, match=rf"\['columns'\].*\['{key}'\].*: expected "):
        Columns.from_json(line)


def test_a_step_that_does_not_fit_into_memory_is_refused() -> None:
    line = json.loads(COLUMNS.as_line(0))
    line["columns"]["layers"] = [str(layer) for layer in range(30_000)]
    line["columns"]["figures"] = [str(key) for key in range(30_000)]
    with pytest.raises(FieldError, match="expected a whole number from 0 to 134217728"):
        Columns.from_json(line)
