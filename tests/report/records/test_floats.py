"""Figures by key, which rows with equal keys store together."""

import math

import pytest

from altgrad.report.records.floats import FloatsByKey, FloatTable
from altgrad.report.records.kinds import FieldError, Figure

SHARES = FloatTable(lambda key: Figure(0, 1) if key.startswith("share") else Figure())


def test_floats_by_key_are_a_mapping() -> None:
    floats = FloatsByKey({"a": 1, "b": 0}, [0.5, 2])
    assert dict(floats) == {"a": 2.0, "b": 0.5}
    assert (len(floats), floats.get("c"), repr(floats)) == (2, None, "{'a': 2.0, 'b': 0.5}")
    with pytest.raises(KeyError):
        floats["c"]


def test_figures_are_parsed_by_the_kind_of_their_key() -> None:
    floats = SHARES.parse({"share": 0.25, "rms": 7, "shared": None, "db": "-inf"})
    assert dict(floats) == pytest.approx(
        {"share": 0.25, "rms": 7.0, "shared": math.nan, "db": -math.inf}, nan_ok=True
    )


@pytest.mark.parametrize("bad", [-0.1, 1.5, math.inf, "inf", 2, True, "", [], {}], ids=repr)
def test_a_figure_out_of_bounds_is_an_error_with_its_key(bad: object) -> None:
    for _ in range(2):  # the second row has keys that are known already
        with pytest.raises(FieldError, match=r"^\['share/bf16'\]: expected a number"):
            SHARES.parse({"rms": 3.0, "share/bf16": bad})


def test_figures_that_are_no_object_are_an_error() -> None:
    for value in (None, [0.5], "figures", 3):
        with pytest.raises(FieldError, match="expected an object"):
            SHARES.parse(value)


def test_a_renamed_figure_has_the_bounds_and_the_name_of_today() -> None:
    renamed = FloatTable(lambda _: Figure(0, 1), {"old": "new"})
    assert dict(renamed.parse({"old": 0.5, "b": 1.0})) == {"new": 0.5, "b": 1.0}
    assert dict(renamed.parse({"new": 0.5, "old": 0.5})) == {"new": 0.5}
