"""Kinds of JSON values: what each takes, and the errors of what it refuses."""

import json
import math
from typing import Any

import pytest

from altgrad.report.records.kinds import (
    Checked,
    FieldError,
    Fields,
    Figure,
    Flag,
    GridScaling,
    Items,
    Kind,
    Nullable,
    Real,
    Table,
    Text,
    Whole,
    check_object,
    number_as_json,
    parse_below,
)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (Whole(1, 5), [1, 5], [0, 6, True, 2.0, 1.5, "1", None, [1], 10**400, -(10**400)]),
        (Real(0.0, 1e30), [0.0, 0, 7, 1e30], [-1e-9, 1e31, math.nan, math.inf, True, "inf", None]),
        (Figure(0, 1), [0.0, 0.5, 1.0], [-1e-9, 1.1, math.inf, "inf", True, [], 10**400]),
        (Text(), ["", "a\x00\ud800", "a" * 10_000], [None, 1, b"a", ["a"], "a" * 10_001]),
        (Flag(), [True, False], [0, 1, None, "true"]),
        (Nullable(Text()), [None, "a"], [0, False]),
        (GridScaling(), [None, "tensor", "channel"], ["block", "", 0, False, [], {}, ["block", 1]]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_kind_takes_values_within_its_bounds_only(
    kind: Kind[Any], good: list[Any], bad: list[Any]
) -> None:
    assert [kind.parse(value) for value in good] == good
    for value in bad:
        if value == ["block", 1]:
            assert kind.parse(value) == ("block", 1)
            continue
        with pytest.raises(FieldError, match=r"expected .*, got "):
            kind.parse(value)


@pytest.mark.parametrize("pair", [["block", 0], ["block", True], ["rows", 3], ["block"], ["x"] * 2])
def test_a_pair_that_is_no_scaling_is_an_error(pair: list[Any]) -> None:
    with pytest.raises(FieldError, match="expected"):
        GridScaling().parse(pair)


def test_figures_survive_json() -> None:
    numbers = [0.5, -3.0, 0.0, math.inf, -math.inf, math.nan]
    as_json = [number_as_json(each) for each in numbers]
    assert as_json == [0.5, -3.0, 0.0, "inf", "-inf", None]
    back = [Figure().parse(each) for each in json.loads(json.dumps(as_json))]
    assert back == pytest.approx(numbers, abs=0, rel=0, nan_ok=True)
    assert [Figure().parse(each) for each in (3, 2**60)] == [3.0, 2.0**60]
    assert all(type(Figure().parse(each)) is float for each in (3, 0.5, None))
    assert math.isnan(Figure(0, 1).parse(None))  # a share without a value


@pytest.mark.parametrize("value", [True, "nan", "Infinity", "1", "", [1.0], {}], ids=repr)
def test_a_value_that_is_no_number_is_no_figure(value: Any) -> None:
    with pytest.raises(FieldError, match="expected a number"):
        Figure().parse(value)


def test_lists_and_objects_check_each_of_their_values() -> None:
    shape = Items(Whole(0, 9), 1, 3)
    assert shape.parse([1, 2]) == shape.parse((1, 2)) == (1, 2)
    table = Table(Flag(), 2)
    assert table.parse({"a": True, "b": False}) == {"a": True, "b": False}
    fields = Fields({"a": Flag()}, {"b": (Text(), "none")})
    assert fields.parse({"a": True, "more": 1}) == {"a": True, "b": "none"}
    assert fields.parse({"b": "", "a": True}) == {"a": True, "b": ""}
    cases: list[tuple[Kind[Any], Any]] = [
        *((shape, value) for value in ([], [1] * 4, [1, True], "12", {}, None)),
        *((table, value) for value in ({"a": 1}, {"a": True, 3: True}, [], None)),
        (table, dict.fromkeys("abc", True)),
        *((fields, value) for value in ({}, {"b": ""}, {"a": 1}, {"a": True, "b": None}, [], "a")),
    ]
    for kind, value in cases:
        with pytest.raises(FieldError):
            kind.parse(value)
    with pytest.raises(FieldError, match="expected an object, got 3"):
        check_object(3)


def test_parts_of_a_value_must_fit_each_other() -> None:
    def check(pair: tuple[int, ...]) -> None:
        parse_below("sum", Whole(0, 5), sum(pair))

    kind = Checked(Items(Whole(0, 9), 2, 2), check)
    assert kind.parse([2, 3]) == (2, 3)
    with pytest.raises(FieldError, match=r"^\['sum'\]: expected a whole number from 0 to 5, got 6"):
        kind.parse([3, 3])


def test_an_error_says_where_the_value_is_in_a_short_printable_line() -> None:
    kind = Fields({"layers": Table(Items(Whole(1, 5), 0, 9), 9)})
    with pytest.raises(FieldError) as caught:
        kind.parse({"layers": {"\x1b[31m": [2, 7]}})
    assert str(caught.value) == (
        r"['layers']['\x1b[31m'][1]: expected a whole number from 1 to 5, got 7"
    )
    with pytest.raises(FieldError) as caught:
        kind.parse({"layers": {"a" * 10**6: "\n" * 10**6}})
    assert len(str(caught.value)) < 200
    with pytest.raises(FieldError) as caught:
        kind.parse({"layers": [{"a" * 99: [[["b" * 99] * 9] * 9] * 9}] * 9})
    assert len(str(caught.value)) < 200
    with pytest.raises(FieldError) as caught:
        Table(Text(), 9).parse({"a" * 10**6: ""})
    assert str(caught.value).isprintable()
