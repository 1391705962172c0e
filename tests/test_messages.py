"""How numbers and lists are put into words, and what checks of arguments say."""

import pytest

from altgrad._messages import check_int, check_type, few, percent


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0 %"),
        (1.0, "100 %"),
        (0.5, "50 %"),
        (0.999, ">99 %"),
        (0.001, "<1 %"),
        (0.994, "99 %"),
        (0.0051, "1 %"),
    ],
)
def test_100_percent_is_all_and_0_none(share: float, text: str) -> None:
    assert percent(share) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, ""), (1, "n0"), (3, "n0, n1, n2"), (4, "n0, n1, n2 and 1 more")],
)
def test_three_names_are_listed_and_others_counted(count: int, text: str) -> None:
    assert few([f"n{k}" for k in range(count)]) == text


def test_many_names_are_counted_with_separators() -> None:
    assert few(["a b, c"] * 2003, "; ") == "a b, c; a b, c; a b, c and 2,000 more"


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
