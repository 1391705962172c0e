"""`find_unchanged` agrees with exact fractions, for all numbers from 1 up to 2."""

from fractions import Fraction

import pytest

from altgrad.monitor.rounded_factors import find_unchanged


def count_moved(change: float, bits: int) -> float:
    """Return the share of numbers that 1 − change moves, by exact products rounded to even."""
    moved = 0
    for mantissa in range(2**bits):
        number = 1 + Fraction(mantissa, 2**bits)
        product = number * (1 - Fraction(change))
        spacing = Fraction(1, 2 ** (bits if product >= 1 else bits + 1))
        moved += round(product / spacing) * spacing != number
    return moved / 2**bits


CHANGES = (1e-6, 0.25, 0.499, 0.5, 0.501, 0.6, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0, 1.001, 1.2, 1.4)
"""Changes, as multiples of the upper bound 2**-(bits + 1)."""


@pytest.mark.parametrize("bits", [1, 2, 3, 7, 10])
def test_a_factor_leaves_all_or_some_or_no_numbers(bits: int) -> None:
    found = {}
    for multiple in CHANGES:
        change = multiple * 2.0 ** -(bits + 1)
        moved = count_moved(change, bits)
        extent = {0.0: "all", 1.0: None}.get(moved, "some")
        assert find_unchanged(change, bits) == extent, (multiple, moved)
        found[multiple] = extent
    assert {*found.values()} == {"all", "some", None}


@pytest.mark.parametrize("change", [0.0, -0.1])
def test_a_factor_of_1_or_more_loses_nothing(change: float) -> None:
    assert find_unchanged(change, 7) is None
