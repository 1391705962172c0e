"""Checkers of JSON values, one class for each kind: whole numbers, texts, lists, tables, …

Each checker has bounds, and the method `parse`, which returns the checked value or raises
`FieldError`. The interface of all checkers is `Kind`.

The module `fields` comes next: it declares the kind of each field of a run file.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from altgrad.quantization.formats import Scaling

_MOST_SHOWN = 80  # characters of a value or a key in an error
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_WORDS: Mapping[object, float] = {None: math.nan, "inf": math.inf, "-inf": -math.inf}


class FieldError(ValueError):
    """An error about an invalid value, with the place of the value and what was expected.

    Args:
        expected: The values that are allowed.
        got: The invalid value.
        path: Keys that lead to the value, from the outermost to the innermost.
    """

    def __init__(self, expected: str, got: object, path: Sequence[object] = ()) -> None:
        where = "".join(f"[{shorten(key)}]" for key in path)
        problem = f"expected {expected}, got {shorten(got)}"
        super().__init__(f"{where}: {problem}" if where else problem)
        self._expected = expected
        self._got = got
        self._path = path

    def move_below(self, key: object) -> FieldError:
        """Return a new error with `key`, of the enclosing object or list, before its path."""
        return FieldError(self._expected, self._got, (key, *self._path))


class Kind(Protocol[T_co]):
    """The interface (Protocol) of a checker of JSON values, such as `Text` for texts."""

    def parse(self, value: object) -> T_co:
        """Return a value that was read from JSON, or raise FieldError if the value is invalid."""


class Whole(NamedTuple):
    """A checker of JSON values, whose `parse` accepts whole numbers within bounds.

    Attributes:
        least: Smallest number that is allowed.
        most: Largest number that is allowed.
    """

    least: int
    most: int

    def parse(self, value: object) -> int:
        """Return the checked number.

        Raises:
            FieldError: The value is no whole number, or out of bounds.
        """
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if is_whole and self.least <= value <= self.most:  # type: ignore[operator]
            return value  # type: ignore[return-value]
        raise FieldError(f"a whole number from {self.least} to {self.most}", value)


class Real(NamedTuple):
    """A checker of JSON values, whose `parse` accepts finite numbers within bounds.

    Attributes:
        least: Smallest number that is allowed.
        most: Largest number that is allowed.
    """

    least: float
    most: float

    def parse(self, value: object) -> float:
        """Return the checked number.

        Raises:
            FieldError: The value is no number, not finite, or out of bounds.
        """
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and self.least <= value <= self.most:  # type: ignore[operator]
            return float(value)  # type: ignore[arg-type]
        raise FieldError(f"a number from {self.least:g} to {self.most:g}", value)


class Figure(NamedTuple):
    """A checker of JSON values, whose `parse` accepts numbers within bounds, also NaN and inf.

    JSON lacks these: null stands for NaN, ``"inf"`` for inf and ``"-inf"`` for −inf.

    Attributes:
        least: Smallest number that is allowed; NaN is always allowed.
        most: Largest number that is allowed.
    """

    least: float = -math.inf
    most: float = math.inf

    def parse(self, value: object) -> float:
        """Return the checked number.

        Raises:
            FieldError: The value stands for no number, or is out of bounds.
        """
        number = value if type(value) is float else _find_number(value)
        if number < self.least or number > self.most:  # NaN is neither
            raise FieldError(f"a number from {self.least:g} to {self.most:g}, or null", value)
        return number


class Text(NamedTuple):
    """A checker of JSON values, whose `parse` accepts texts of limited length.

    Attributes:
        most: Largest number of characters.
    """

    most: int = 10_000

    def parse(self, value: object) -> str:
        """Return the text.

        Raises:
            FieldError: The value is no text, or too long.
        """
        if isinstance(value, str) and len(value) <= self.most:
            return str(value)
        raise FieldError(f"a text of at most {self.most} characters", value)


class Choice(NamedTuple):
    """A checker of JSON values, whose `parse` accepts only the texts in `options`.

    Attributes:
        options: The texts that are allowed.
    """

    options: tuple[str, ...]

    def parse(self, value: object) -> str:
        """Return the value, if it is one of the allowed texts.

        Raises:
            FieldError: It is not.
        """
        if isinstance(value, str) and value in self.options:
            return value
        raise FieldError(" or ".join(f'"{each}"' for each in self.options), value)


class Flag(NamedTuple):
    """A checker of JSON values, whose `parse` accepts true and false."""

    def parse(self, value: object) -> bool:
        """Return the value, True or False.

        Raises:
            FieldError: The value is neither true nor false.
        """
        if isinstance(value, bool):
            return value
        raise FieldError("true or false", value)


class Nullable(NamedTuple, Generic[T]):
    """A checker of JSON values, whose `parse` accepts null, and what another checker accepts.

    Attributes:
        kind: The other checker.
    """

    kind: Kind[T]

    def parse(self, value: object) -> T | None:
        """Return the value as the other checker parses it; None for null."""
        return None if value is None else self.kind.parse(value)


class Checked(NamedTuple, Generic[T]):
    """A checker of JSON values, whose `parse` calls another checker and then the function `check`.

    The function compares parts of the value with each other, such as the smallest and the largest
    number of a format.

    Attributes:
        kind: The other checker.
        check: Function that takes the parsed value, and raises FieldError if its parts contradict
            each other.
    """

    kind: Kind[T]
    check: Callable[[T], object]

    def parse(self, value: object) -> T:
        """Return the value as `kind` parses it, if the function `check` raises no error."""
        parsed = self.kind.parse(value)
        self.check(parsed)
        return parsed


class Items(NamedTuple, Generic[T]):
    """A checker of JSON values, whose `parse` accepts lists with items of one kind.

    Attributes:
        kind: Checker of each item.
        least: Smallest number of items.
        most: Largest number of items.
    """

    kind: Kind[T]
    least: int
    most: int

    def parse(self, value: object) -> tuple[T, ...]:
        """Check a JSON list.

        Returns:
            The items as `kind` parses them.

        Raises:
            FieldError: The value is no list, too short or too long, or an item is invalid.
        """
        if not isinstance(value, (list, tuple)) or not self.least <= len(value) <= self.most:
            raise FieldError(f"a list with {self.least} to {self.most} items", value)
        return tuple(parse_below(place, self.kind, each) for place, each in enumerate(value))


class Table(NamedTuple, Generic[T]):
    """A checker of JSON values, whose `parse` accepts objects with any keys and one kind of value.

    Attributes:
        kind: Checker of each value.
        most: Largest number of keys.
    """

    kind: Kind[T]
    most: int

    def parse(self, value: object) -> dict[str, T]:
        """Check a JSON object.

        Returns:
            The checked values, by key.

        Raises:
            FieldError: The value is no JSON object, has too many keys, or a value is invalid.
        """
        values = check_object(value)
        if len(values) > self.most:
            raise FieldError(f"at most {self.most} keys", value)
        text = Text()
        return {
            parse_below(key, text, key): parse_below(key, self.kind, each)
            for key, each in values.items()
        }


class Fields(NamedTuple):
    """A checker of JSON values, whose `parse` accepts objects with known keys.

    Unknown keys are left out of the result.

    Attributes:
        required: Checkers of the values that must be there, by key.
        optional: By key, the checker of a value that may be missing, and the default for it.
    """

    required: Mapping[str, Kind[Any]]
    optional: Mapping[str, tuple[Kind[Any], Any]] = {}

    def parse(self, value: object) -> dict[str, Any]:
        """Check a JSON object.

        Returns:
            The checked values, by key.

        Raises:
            FieldError: The value is no JSON object, lacks a key, or a value is invalid.
        """
        values = check_object(value)
        if missing := [key for key in self.required if key not in values]:
            raise FieldError(f"the key {missing[0]!r}", value)
        parsed = {key: parse_below(key, kind, values[key]) for key, kind in self.required.items()}
        for key, (kind, default) in self.optional.items():
            parsed[key] = parse_below(key, kind, values[key]) if key in values else default
        return parsed


class GridScaling(NamedTuple):
    """A checker of JSON values, whose `parse` accepts a scaling: which weights share one scale.

    The values are null, ``"tensor"``, ``"channel"`` and ``["block", size]``, as in
    `altgrad.measure`.
    """

    def parse(self, value: object) -> Scaling | None:
        """Return the scaling; a list ``["block", size]`` becomes a tuple.

        Raises:
            FieldError: The value is none of the four kinds of scaling.
        """
        if value in (None, "tensor", "channel"):
            return value
        if isinstance(value, (list, tuple)) and len(value) == 2 and value[0] == "block":
            return "block", parse_below(1, Whole(1, 2**63 - 1), value[1])
        raise FieldError('null, "tensor", "channel" or ["block", size]', value)


def check_object(value: object) -> Mapping[str, object]:
    """Return a value that was read from JSON; raise an error unless it is a JSON object.

    Raises:
        FieldError: The value is no mapping, or a key is no text.
    """
    if not isinstance(value, Mapping):
        raise FieldError("an object", value)
    for key in value:
        if not isinstance(key, str):
            raise FieldError("a text as key", key)
    return value


def shorten(value: object) -> str:
    """Return the repr of a value, cut to about 80 characters for an error's sentence."""
    text = _SHORT.repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"


def number_as_json(value: float) -> float | str | None:
    """Return a number as a JSON value: NaN as None, inf as ``"inf"``, −inf as ``"-inf"``."""
    if math.isfinite(value):
        return value
    return None if math.isnan(value) else str(value)


def _find_number(value: object) -> float:
    """Return the float for which a JSON value stands; None, ``"inf"`` and ``"-inf"`` are valid.

    Values are those that `number_as_json` returns, so that None gives NaN.

    Raises:
        FieldError: The value stands for no number, or for none that float64 can hold.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise FieldError("a number that float64 can hold", value) from None
    if value is None or isinstance(value, str):
        number = _WORDS.get(value)
        if number is not None:
            return number
    raise FieldError("a number, null, 'inf' or '-inf'", value)


def parse_below(key: object, kind: Kind[T], value: object) -> T:
    """Check a value that lies in an object or a list, so that an error says where.

    Args:
        key: Key or index of the value in its object or list, which an error gets in its path.
        kind: Checker of the value.
        value: The value, as JSON has it.

    Returns:
        The checked value.

    Raises:
        FieldError: The value is invalid.
    """
    try:
        return kind.parse(value)
    except FieldError as error:
        raise error.move_below(key) from None
