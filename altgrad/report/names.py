"""Names of layers as a picture can show them: short, printable and still told apart."""

from __future__ import annotations

from collections.abc import Sequence

_WIDTH = 44


def short_names(names: Sequence[str], width: int = _WIDTH) -> list[str]:
    """Names of at most `width` characters, longer ones cut in the middle.

    They are cut where as many as possible stay apart: what tells layers apart is at the end of some
    names (`…query.weight`) and in the middle of others (`encoder.layer.11.…`).
    """
    whole = [printable(name) for name in names]
    cuts = (width // 3, *range(width // 2, width - 6, 3), width // 6)
    each = ([_cut(name, head, width) for name in whole] for head in cuts)
    return max(each, key=lambda shortened: len(set(shortened)))


def printable(text: str) -> str:
    """With � for each character that cannot be printed, such as the end of a line."""
    return "".join(c if c.isprintable() else "�" for c in text)


def _cut(name: str, head: int, width: int) -> str:
    if len(name) <= width:
        return name
    return f"{name[:head]}…{name[len(name) - (width - head - 1) :]}"
