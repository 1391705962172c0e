"""Formatted numbers and lists, notices to the user, and errors of argument checks."""

import inspect
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

import altgrad
from altgrad._messages import (
    Notices,
    check_int,
    check_type,
    few,
    format_count,
    format_percent,
)


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0 %"),
        (1.0, "100 %"),
        (0.5, "50 %"),
        (0.999, ">99 %"),
        (0.001, "<1 %"),
        (0.994, "99 %"),
        (0.99499, "99 %"),
        (0.995, ">99 %"),  # the share of weights from which on a layer is frozen
        (0.0051, "1 %"),
        (float("nan"), "an unknown share"),
    ],
)
def test_100_percent_means_all_and_0_percent_none(share: float, text: str) -> None:
    assert format_percent(share) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, ""), (1, "n0"), (3, "n0, n1, n2"), (4, "n0, n1, n2 and 1 more")],
)
def test_three_names_are_listed_and_others_counted(count: int, text: str) -> None:
    assert few([f"n{k}" for k in range(count)]) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 layers"), (1, "1 layer"), (2, "2 layers"), (2000, "2,000 layers")]
)
def test_a_number_of_things_has_the_plural_that_fits(count: int, text: str) -> None:
    assert format_count(count, "layer") == text


def test_no_message_counts_with_a_fixed_plural() -> None:
    things = "layers|elements|steps|lines|files|formats|names|ranks|verdicts|parameters"
    fixed = re.compile(rf"\{{[^{{}}]*(?:len\(|:,)[^{{}}]*\}} (?:{things})\b")
    for path in Path(altgrad.__file__).parent.rglob("*.py"):
        assert not (found := fixed.findall(path.read_text(encoding="utf-8"))), (path, found)


def test_many_names_are_counted_with_separators() -> None:
    assert few(["a b, c"] * 2003, "; ") == "a b, c; a b, c; a b, c and 2,000 more"


def collect_warnings(give: Callable[[str], None], *notices: str) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for notice in notices:
            give(notice)
    assert {each.category for each in caught} <= {UserWarning}
    return [str(each.message) for each in caught]


def test_a_notice_is_a_warning_that_begins_with_its_owner() -> None:
    give = Notices("Owner").give
    assert collect_warnings(give, "sees a", "sees b") == ["Owner sees a", "Owner sees b"]
    assert collect_warnings(give, "sees a") == ["Owner sees a"]  # again


def test_a_notice_that_is_given_once_is_not_given_again() -> None:
    notices = Notices("Owner")
    given = collect_warnings(notices.give_once, "sees a", "sees b", "sees a")
    assert given == ["Owner sees a", "Owner sees b"]
    assert collect_warnings(notices.give, "sees c") == ["Owner sees c"]
    assert collect_warnings(notices.give_once, "sees b", "sees c", "sees d") == ["Owner sees d"]


def test_notices_of_one_object_do_not_silence_another() -> None:
    said = [collect_warnings(Notices("Owner").give_once, "sees a") for _ in range(2)]
    assert said == [["Owner sees a"]] * 2


def test_notices_go_to_tell_without_the_owner_instead_of_warnings() -> None:
    told: list[str] = []
    notices = Notices("Owner", told.append)
    assert collect_warnings(notices.give_once, "sees a", "sees b", "sees a") == []
    assert collect_warnings(notices.give, "sees a") == []
    assert told == ["sees a", "sees b", "sees a"]


def test_a_warning_is_placed_where_the_method_that_gives_it_was_called() -> None:
    notices = Notices("Owner")

    def call_from_owner() -> None:
        notices.give("sees a")

    line = inspect.currentframe().f_lineno + 2
    with pytest.warns(UserWarning, match="^Owner sees a$") as caught:
        call_from_owner()
    assert [(each.filename, each.lineno) for each in caught] == [(__file__, line)]


def test_a_notice_that_was_raised_counts_as_given() -> None:
    notices = Notices("Owner")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="Owner sees a"):
            notices.give_once("sees a")
        notices.give_once("sees a")


@pytest.mark.parametrize(
    ("value", "expected", "message"),
    [
        (True, int, r"steps=True: expected int, got bool"),
        ("3", int, r"steps='3': expected int, got str"),
        (1, bool, r"steps=1: expected bool, got int"),
        (None, str, r"steps=None: expected str, got NoneType"),
    ],
)
def test_a_wrong_type_is_named_with_its_value(value: object, expected: type, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        check_type("steps", value, expected)


def test_a_number_below_the_least_is_refused() -> None:
    check_int("steps", 1, 1)
    check_type("flag", value=True, expected=bool)
    with pytest.raises(ValueError, match="steps=0: expected 1 or more"):
        check_int("steps", 0, 1)


def test_equal_warnings_of_two_objects_are_both_shown() -> None:
    """By default, Python shows equal warnings of a line once in a process."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            Notices("Owner").give_once("sees a")
    assert len(caught) == 2
    assert {(each.filename == __file__ or "pytest" in each.filename) for each in caught} == {True}
