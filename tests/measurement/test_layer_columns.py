"""`gather_columns`: mappings of layers become columns, of layers with equal keys."""

import math

import pytest

from altgrad.measurement.layer_columns import LayerRow, gather_columns

NAN = math.nan
ROWS = [
    LayerRow("a", {"ulp_mean": 1.0, "stall_frac/bf16": 0.5}, {"stall_frac/bf16": 0.1}),
    LayerRow("b", {"ulp_mean": 2.0, "stall_frac/bf16": NAN}, {"stall_frac/bf16": NAN}),
    LayerRow("c", {"ulp_mean": 3.0, "stall_frac/bf16": 0.75}, {}),
    LayerRow("d", {"ulp_mean": 4.0}, {}),
]


def test_layers_with_equal_keys_are_columns_together() -> None:
    groups = gather_columns(ROWS)
    assert [each.layers for each in groups] == [["a", "b"], ["c"], ["d"]]
    first, second, third = groups
    assert dict(first.figures) == {
        "ulp_mean": [1.0, 2.0],
        "stall_frac/bf16": pytest.approx([0.5, NAN], nan_ok=True),
    }
    assert dict(first.errors) == {"stall_frac/bf16": pytest.approx([0.1, NAN], nan_ok=True)}
    assert (second.errors, len(second.figures)) == ({}, 2)
    assert [*third.figures] == ["ulp_mean"]
    assert "stall_frac/bf16" not in third.figures
    assert [row for each in groups for row in each.rows] == ROWS


def test_names_are_those_of_the_formats_of_a_metric() -> None:
    first, _, third = gather_columns(ROWS)
    assert first.list_names("stall_frac") == ["bf16"]
    assert first.list_names("stall") == third.list_names("stall_frac") == []


def test_no_layers_are_no_columns() -> None:
    assert gather_columns([]) == []
