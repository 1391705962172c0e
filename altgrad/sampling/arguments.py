"""What the functions here accept, with errors that say what to do."""

from __future__ import annotations


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
