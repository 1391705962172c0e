"""The dry run: what the rules mean for the layers, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from altgrad.observation.rules import LayerSampling, SamplingRule

_HEADER = ("layer", "rule", "observed", "elements", "formats")
_GAP = "  "
# Columns whose cells may be shortened, and down to which width: names go last.
_SHRINKING = (((1, 4), 12), ((0, 1, 4), 8))


def describe_layers(
    resolved: Mapping[str, LayerSampling], rules: Sequence[SamplingRule], *, width: int = 80
) -> str:
    """Return a table of the layers and how each is observed, then the rules without a layer.

    Names, patterns and formats that do not fit lose their middle to ``…``.

    Args:
        resolved: As `resolve_layers` returned it.
        rules: The rules that it was given.
        width: Characters in a line; fewer than the headings need are exceeded.

    Returns:
        A line for the headings, one for each layer, and one for each rule whose every match went
        to an earlier rule; no newline at the end.
    """
    cells = [_HEADER, *map(_row, resolved.values())]
    widths = _widths(cells, width)
    lines = [
        _GAP.join(_shorten(cell, size).ljust(size) for cell, size in zip(row, widths, strict=True))
        for row in cells
    ]
    lines += [
        _without_layers(rule, number, width)
        for number, rule in enumerate(rules, start=1)
        if rule in rules[: number - 1] or all(layer.rule != rule for layer in resolved.values())
    ]
    return "\n".join(line.rstrip() for line in lines)


def _row(layer: LayerSampling) -> tuple[str, ...]:
    rule = "(default)" if layer.rule is None else layer.rule.layers
    if not layer.enabled:
        return layer.name, rule, "no", "-", "-"
    every = "every step" if layer.every_n_steps == 1 else f"every {layer.every_n_steps:,}"
    elements = "all" if layer.max_elements is None else f"{layer.max_elements:,}"
    return layer.name, rule, every, elements, ", ".join(layer.formats) or "-"


def _widths(rows: Sequence[Sequence[str]], width: int) -> list[int]:
    """Return the width of each column; in a line that is too long the widest shrinks first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    excess = sum(widths) + len(_GAP) * (len(widths) - 1) - width
    for columns, least in _SHRINKING:
        while excess > 0 and max(widths[column] for column in columns) > least:
            widths[max(columns, key=widths.__getitem__)] -= 1
            excess -= 1
    return widths


def _shorten(text: str, size: int) -> str:
    """Replace the middle of a text by one … if it is longer than size, which is at least 1."""
    if len(text) <= size:
        return text
    tail = (size - 1) // 2
    return f"{text[: size - 1 - tail]}…{text[len(text) - tail :]}"


def _without_layers(rule: SamplingRule, number: int, width: int) -> str:
    begin, end = f"rule {number} (", ") gets no layer: earlier rules match first"
    return begin + _shorten(rule.layers, max(width - len(begin + end), 1)) + end
