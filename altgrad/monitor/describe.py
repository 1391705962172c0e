"""Write a dry run: a table of the layers and how each would be observed.

`UpdateMonitor.describe` returns this text.

Read `layer_settings` first, which resolves the rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from altgrad.observation.rules import LayerSampling, SamplingRule

_HEADER = ("layer", "rule", "observed", "elements", "formats")
_GAP = "  "
# Positions of columns whose cells may be shortened, and their minimum width in characters. Rules
# and formats are shortened first, names last.
_SHRINKING = (((1, 4), 12), ((0, 1, 4), 8))


def describe_layers(
    resolved: Mapping[str, LayerSampling], rules: Sequence[SamplingRule], *, width: int = 80
) -> str:
    """Return a table of the layers and how each is observed, then the rules without a layer.

    If names, patterns or formats do not fit, ``…`` replaces their middle.

    Args:
        resolved: Settings of each layer by name, from `resolve_layers`.
        rules: The rules that were passed to `resolve_layers`.
        width: Maximum number of characters in a line. Lines are longer if it is below the width of
            the headings.

    Returns:
        A line of headings, a line for each layer, and a line for each rule whose layers all match
        an earlier rule. The last line has no newline.
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
    """Return a layer's cells in the table: name, rule, interval, elements and formats as texts."""
    rule = "(default)" if layer.rule is None else layer.rule.layers
    if not layer.enabled:
        return layer.name, rule, "no", "-", "-"
    every = "every step" if layer.every_n_steps == 1 else f"every {layer.every_n_steps:,}"
    elements = "all" if layer.max_elements is None else f"{layer.max_elements:,}"
    return layer.name, rule, every, elements, ", ".join(layer.formats) or "-"


def _widths(rows: Sequence[Sequence[str]], width: int) -> list[int]:
    """Return widths of columns, in characters, with which a table fits a total width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    excess = sum(widths) + len(_GAP) * (len(widths) - 1) - width
    for columns, least in _SHRINKING:
        while excess > 0 and max(widths[column] for column in columns) > least:
            widths[max(columns, key=widths.__getitem__)] -= 1
            excess -= 1
    return widths


def _shorten(text: str, size: int) -> str:
    """Replace the middle of a text by … if the text is longer than `size`, which is at least 1."""
    if len(text) <= size:
        return text
    tail = (size - 1) // 2
    return f"{text[: size - 1 - tail]}…{text[len(text) - tail :]}"


def _without_layers(rule: SamplingRule, number: int, width: int) -> str:
    """Return a line that says that no layer uses a rule, as earlier rules match its layers."""
    begin, end = f"rule {number} (", ") gets no layer: earlier rules match first"
    return begin + _shorten(rule.layers, max(width - len(begin + end), 1)) + end
