"""Names of layers for pictures and tables: short, printable and still distinct."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from altgrad._messages import format_count

_WIDTH = 44  # characters; leaves most of a picture 8 inches wide to its data


def shorten_names(
    names: Sequence[str], width: int = _WIDTH, among: Iterable[str] | None = None
) -> list[str]:
    """Shorten names to a width, with ``…`` for the middle of a longer name.

    All names are cut at the same place, where most names remain distinct. Some layers differ at the
    end of their names (`…query.weight`), others in the middle (`encoder.layer.11.…`).

    Args:
        names: Names of layers or formats.
        width: Maximum number of characters, 8 or more.
        among: All names, of which `names` are some, and from which these are to be distinct. None
            if `names` are all.

    Returns:
        The short names, in the same order.
    """
    every = [*map(replace_unprintable, names if among is None else among)]
    cuts = (width // 3, *range(width // 2, width - 6, 3), width // 6)
    best = max(cuts, key=lambda head: len({_cut(name, head, width) for name in every}))
    return [_cut(replace_unprintable(name), best, width) for name in names]


def fold_names(names: Iterable[str], others: Iterable[str] = ()) -> list[str]:
    """Fold names that differ in numbers alone: ``blocks.*.norm.weight (12 layers)``.

    Args:
        names: Names of layers, whose parts are separated by dots.
        others: Names of other layers. Names are not folded into a pattern that one of these has,
            too, as ``*.weight`` would be a pattern of all layers of an ``nn.Sequential``.

    Returns:
        Patterns and names, in the order in which the names begin.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_find_pattern(name), []).append(name)
    unclear = {*map(_find_pattern, others)}
    folded: list[str] = []
    for pattern, own in groups.items():
        if len(own) == 1 or pattern in unclear:
            folded += own
        else:
            folded.append(f"{pattern} ({format_count(len(own), 'layer')})")
    return folded


def _find_pattern(name: str) -> str:
    """Return a name with ``*`` in place of each part that is a number."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


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
