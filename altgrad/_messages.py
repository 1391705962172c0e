"""How numbers and long lists are put into words, and errors of arguments."""

from __future__ import annotations

from collections.abc import Sequence

_MOST_NAMED = 3


def percent(share: float) -> str:
    """Whole percent, rounded so that 100 % means all and 0 % none."""
    whole = round(100 * share)
    if whole == 100 and share < 1:
        return ">99 %"
    if whole == 0 and share > 0:
        return "<1 %"
    return f"{whole} %"


def few(names: Sequence[str], separator: str = ", ") -> str:
    """Return the first three names, and how many more there are."""
    rest = len(names) - _MOST_NAMED
    return separator.join(names[:_MOST_NAMED]) + (f" and {rest:,} more" if rest > 0 else "")


def check_type(name: str, value: object, expected: type) -> None:
    """TypeError unless the value has this type; a bool is no int."""
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise TypeError(
            f"{name}={value!r}: expected {expected.__name__}, got {type(value).__name__}"
        )


def check_int(name: str, value: object, least: int) -> None:
    """TypeError or ValueError unless the value is an int of at least this."""
    check_type(name, value, int)
    assert isinstance(value, int)
    if value < least:
        raise ValueError(f"{name}={value}: expected {least} or more")
