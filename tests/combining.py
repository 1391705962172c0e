"""Combinations of values as cases of a test, of which a few are in the quick suite."""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def combine(*columns: Iterable[Any]) -> list[Any]:
    """Return all combinations; as few as have each value once or more are in the quick suite.

    The quick ones go through all columns at once, a shorter column again from its start.
    """
    columns = tuple([*column] for column in columns)
    quick = {
        tuple(row % len(column) for column in columns) for row in range(max(map(len, columns)))
    }
    return [
        pytest.param(
            *(column[place] for column, place in zip(columns, places, strict=True)),
            marks=() if places in quick else pytest.mark.slow,
        )
        for places in itertools.product(*(range(len(column)) for column in columns))
    ]
