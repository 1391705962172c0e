"""Show figures, the values of metrics, as a table of HTML in a notebook.

`write_table` makes the tables of `Figures`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape


def write_table(figures: Mapping[str, float]) -> str:
    """Return figures as a table of HTML, with a line for each metric.

    Args:
        figures: Figures by key: ``metric``, ``metric/format`` or ``metric/recipe``. Each format or
            recipe is a column, and figures without one are a column of their own.

    Returns:
        The table, with numbers of four digits; NaN is ``nan``. Empty without figures.
    """
    rows: dict[str, dict[str, float]] = {}
    for key, figure in figures.items():
        metric, _, name = key.partition("/")
        rows.setdefault(metric, {})[name] = figure
    names = dict.fromkeys(name for own in rows.values() for name in own)
    heading = _write_row("th", "metric", names)
    body = "".join(
        _write_row("td", metric, (f"{own[n]:.4g}" if n in own else "" for n in names))
        for metric, own in rows.items()
    )
    return f"<table><thead>{heading}</thead><tbody>{body}</tbody></table>" if rows else ""


def _write_row(tag: str, first: str, others: Iterable[str]) -> str:
    cells = "".join(f"<{tag}>{escape(each)}</{tag}>" for each in others)
    return f"<tr><th>{escape(first)}</th>{cells}</tr>"
