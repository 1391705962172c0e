"""How numbers and long lists are put into words."""

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


def few(names: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    rest = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")
