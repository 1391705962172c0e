"""Names of layers for pictures and tables: short, printable and still distinct."""

from __future__ import annotations

from collections.abc import Sequence

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
