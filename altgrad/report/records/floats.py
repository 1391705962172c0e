"""`FloatsByKey`: the numbers of one line of a run file by key, in little memory.

Lines with equal keys share one table of the keys. `FloatTable` parses the figures of a line from
JSON, and checks the bounds of each figure.

The module `fields` comes next.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from altgrad.report.records.kinds import Figure, check_object, parse_below

_MOST_LAYOUTS = 256  # layouts that are remembered; a run has a few


class FloatsByKey(Mapping[str, float]):
    """A read-only mapping from keys to floats, in little memory: the numbers of a run file's line.

    Args:
        positions: Index into `numbers`, by key. Lines with equal keys share one such object.
        numbers: The values, which are stored as 8-byte floats.
    """

    __slots__ = ("_numbers", "_positions")

    def __init__(self, positions: Mapping[str, int], numbers: Sequence[float]) -> None:
        self._positions = positions
        self._numbers = array("d", numbers)  # a quarter of the memory of a list of floats

    def __getitem__(self, key: str) -> float:
        return self._numbers[self._positions[key]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._positions)

    def __len__(self) -> int:
        return len(self._positions)

    def __repr__(self) -> str:
        return repr(dict(self))


class _Layout(NamedTuple):
    """The places of numbers in the lines of a run file that have the same keys.

    Attributes:
        positions: For each key the place of its number among all numbers of the line.
        bounded: Place and limits of each number that must lie between limits, such as 0 and 1.
    """

    positions: Mapping[str, int]
    bounded: Sequence[tuple[int, Figure]]  # positions of numbers that have bounds


class FloatTable:
    """A checker of JSON values, whose `parse` accepts objects with numbers, also NaN and inf.

    Args:
        find_kind: Function that takes a key, and returns the checker of the number under it.
        renamed: Today's keys, by the keys in older files. If two keys get the same name, the later
            key counts.
    """

    def __init__(
        self, find_kind: Callable[[str], Figure], renamed: Mapping[str, str] | None = None
    ) -> None:
        self._find_kind = find_kind
        self._renamed = renamed or {}
        # Keys repeat from row to row. The cache belongs to the object, as the callback does.
        self._find_layout = functools.lru_cache(_MOST_LAYOUTS)(self._make_layout)

    def parse(self, value: object) -> FloatsByKey:
        """Check a JSON object of numbers, such as ``{"update_rms": 0.1, "ulp_mean": null}``.

        Returns:
            The numbers by today's keys; null becomes NaN.

        Raises:
            FieldError: The value is no JSON object, or a number is invalid.
        """
        numbers = check_object(value)
        layout = self._find_layout(tuple(numbers))
        # Most values are floats already, and need no call.
        floats = [
            each if type(each) is float else parse_below(key, self._find_kind(key), each)
            for key, each in numbers.items()
        ]
        for position, kind in layout.bounded:
            if not (kind.least <= floats[position] <= kind.most):  # out of bounds, or NaN
                parse_below([*numbers][position], kind, floats[position])
        return FloatsByKey(layout.positions, floats)

    def _make_layout(self, keys: tuple[str, ...]) -> _Layout:
        kinds = map(self._find_kind, keys)
        return _Layout(
            {self._renamed.get(key, key): position for position, key in enumerate(keys)},
            [(position, kind) for position, kind in enumerate(kinds) if kind != Figure()],
        )
