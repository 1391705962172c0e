"""Format numbers and lists, give notices, and raise errors of arguments, alike in all packages.

- `format_percent`, `format_count` and `few` format a share, a number of things and a list of names.
- `check_type` and `check_int` raise the errors of wrong arguments: argument=value, then the type or
  value expected.
- `Notices` passes texts of an object to its user, as warnings or to a function. `warn_anew` warns
  even if the process has shown the same warning before.

This file imports nothing of AltGrad; every package of AltGrad may import it.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Sequence

_MAX_NAMED = 3


class Notices:
    """A sender of notices, texts for the user, from one object: as warnings, or to a function.

    Args:
        owner: Name of the object's class. Each warning begins with this name.
        warn: Function that is called with each notice, without the owner's name. None gives a
            UserWarning.
    """

    def __init__(self, owner: str, warn: Callable[[str], object] | None = None) -> None:
        self._owner = owner
        self._warn = warn
        self._given: set[str] = set()

    def give(self, notice: str) -> None:
        """Call the `warn` function with a notice, or give a UserWarning if `warn` is None."""
        # Noted first: where warnings are errors, the notice counts as given all the same.
        self._given.add(notice)
        if self._warn is None:
            # 3: the caller of the owner's method, seen from here.
            warn_anew(f"{self._owner} {notice}", stacklevel=3)
        else:
            self._warn(notice)

    def give_once(self, notice: str) -> None:
        """Call the `warn` function or give a UserWarning, unless this notice was given before."""
        if notice not in self._given:
            self.give(notice)


def warn_anew(message: str, stacklevel: int) -> None:
    """Give a UserWarning, even if this process has given the same warning before.

    `warnings.warn`, in contrast, shows equal warnings from one line once in a process.

    Args:
        message: The text of the warning.
        stacklevel: The caller whose line the warning names, as in `warnings.warn`: 1 for the caller
            of this function.
    """
    frame = sys._getframe(1)  # noqa: SLF001 - as in the source of warnings.warn
    for _ in range(stacklevel - 1):
        frame = frame.f_back or frame
    warnings.warn_explicit(
        message,
        UserWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        registry={},  # the registry of the caller's module remembers earlier warnings
    )


def format_percent(share: float) -> str:
    """Return a share from 0 to 1 in whole %, where 100 % means all and 0 % means nothing.

    A share just below 1 is ``>99 %``, and one just above 0 is ``<1 %``. NaN is in words.
    """
    if math.isnan(share):
        return "an unknown share"
    whole = round(100 * share)
    if whole == 100 and share < 1:
        return ">99 %"
    if whole == 0 and share > 0:
        return "<1 %"
    return f"{whole} %"


def format_count(count: int, noun: str) -> str:
    """Return a number and its noun, such as ``1 layer`` or ``2,000 layers``.

    Args:
        count: The number, 0 or more.
        noun: The thing, in the singular. Its plural ends in ``s``.
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def few(names: Sequence[str], separator: str = ", ") -> str:
    """Return the first three names, and the number of further ones: ``a, b, c and 7 more``.

    Args:
        names: Any number of names.
        separator: Text between two names.
    """
    rest = len(names) - _MAX_NAMED
    return separator.join(names[:_MAX_NAMED]) + (f" and {rest:,} more" if rest > 0 else "")


def check_type(name: str, value: object, expected: type) -> None:
    """Raise an error unless an argument has the expected type.

    Args:
        name: Name of the argument.
        value: Value of the argument.
        expected: The type. A bool is not accepted as int, although Python derives bool from int.

    Raises:
        TypeError: The value has another type.
    """
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise TypeError(
            f"{name}={value!r}: expected {expected.__name__}, got {type(value).__name__}"
        )


def check_int(name: str, value: object, least: int) -> None:
    """Raise an error unless an argument is an int that is large enough.

    Args:
        name: Name of the argument.
        value: Value of the argument.
        least: The smallest value allowed.

    Raises:
        TypeError: The value is not an int.
        ValueError: The value is below `least`.
    """
    check_type(name, value, int)
    assert isinstance(value, int)
    if value < least:
        raise ValueError(f"{name}={value}: expected {least} or more")
