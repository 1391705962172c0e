"""How numbers are put into words."""

from __future__ import annotations


def percent(share: float) -> str:
    """Whole percent, rounded so that 100 % means all and 0 % none."""
    whole = round(100 * share)
    if whole == 100 and share < 1:
        return ">99 %"
    if whole == 0 and share > 0:
        return "<1 %"
    return f"{whole} %"
