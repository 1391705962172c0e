"""`find_unchanged`: which numbers of a format a factor just below 1 leaves as they are.

Numbers of a format with M mantissa bits are 2**-M of their power of two apart. A product is rounded
to the nearest of them, so that a change of less than half of this spacing is lost::

    change · number     0         2**-(M + 2)          2**-(M + 1)
    numbers that stay   |   all   |        some        |   none
    in bf16, M = 7                2**-9 = 0.00195      2**-8 = 0.0039
    in fp16, M = 10               2**-12 = 0.00024     2**-11 = 0.0005

The first number to move is a power of two: below it, the spacing is half of that above it.

This file stands alone. `optimizer_factors` comes next, and finds such factors in optimizers.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

Extent: TypeAlias = Literal["all", "some"]
"""How many numbers of a format stay as they are."""


def find_unchanged(change: float, mantissa_bits: int) -> Extent | None:
    """Return how many numbers stay as they are when they are multiplied by 1 − change.

    The products are rounded to the nearest number of the format, ties to even. Subnormal numbers,
    which are further apart, are not counted.

    Args:
        change: The relative change, such as 0.001 for a factor of 0.999.
        mantissa_bits: Bits of the mantissa without the leading one: 7 for bf16, 10 for fp16.

    Returns:
        ``"all"``, ``"some"``, or None if all numbers move, or if `change` is 0 or less.
    """
    spacing = 2.0**-mantissa_bits  # from 1 up to 2
    if change <= 0:
        return None
    if change <= spacing / 4:
        return "all"
    # The last number to move is the one after a power of two.
    return "some" if change * (1 + spacing) < spacing / 2 else None
