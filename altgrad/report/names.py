"""Names of layers for pictures and tables: short, printable and still distinct."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from altgrad._messages import format_count

_WIDTH = 44  # characters; leaves most of a picture 8 inches wide to its data


def shorten_names(names: Sequence[str], width: int = _WIDTH) -> list[str]:
    """Shorten names to a width, with ``…`` for the middle of a longer name.

    All names are cut at the same place, where most names remain distinct. Some layers differ at the
    end of their names (`…query.weight`), others in the middle (`encoder.layer.11.…`).

    Args:
        names: Names of layers or formats.
        width: Maximum number of characters, 8 or more.

    Returns:
        The short names, in the same order.
    """
    whole = [replace_unprintable(name) for name in names]
    cuts = (width // 3, *range(width // 2, width - 6, 3), width // 6)
    each = ([_cut(name, head, width) for name in whole] for head in cuts)
    return max(each, key=lambda shortened: len(set(shortened)))


def fold_names(names: Iterable[str]) -> list[str]:
    """Fold names that differ in numbers alone: ``blocks.*.norm.weight (12 layers)``.

    Args:
        names: Names of layers, whose parts are separated by dots.

    Returns:
        Patterns and names, in the order in which the names begin.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = ("*" if part.isdecimal() else part for part in name.split("."))
        groups.setdefault(".".join(parts), []).append(name)
    return [
        own[0] if len(own) == 1 else f"{pattern} ({format_count(len(own), 'layer')})"
        for pattern, own in groups.items()
    ]


def replace_unprintable(text: str) -> str:
    """Replace each unprintable character, such as a line feed, by �."""
    return "".join(c if c.isprintable() else "�" for c in text)


def replace_unprintable_in_lines(text: str) -> str:
    """Replace each unprintable character other than a line feed by �."""
    return "\n".join(map(replace_unprintable, text.split("\n")))


def _cut(name: str, head: int, width: int) -> str:
    if len(name) <= width:
        return name
    return f"{name[:head]}…{name[len(name) - (width - head - 1) :]}"
