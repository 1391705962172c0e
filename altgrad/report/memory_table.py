"""Show the memory that each recipe takes: as a table in the terminal, and as JSON.

A *recipe* says how weights and optimizer states are stored.

Read `memory` first, which computes the bytes, and `printing`; `terminal` and `exports` come next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from altgrad._messages import format_count
from altgrad.report.memory import (
    UNKNOWN,
    Bytes,
    Memory,
    format_bytes,
    format_saved,
    measure_memory,
)
from altgrad.report.names import shorten_names
from altgrad.report.printing import (
    GAP,
    add_column,
    make_table,
    measure_columns,
    print_text,
    style_text,
)
from altgrad.report.records.kinds import number_as_json

if TYPE_CHECKING:
    from rich.console import Console

    from altgrad.report.records.run import Run
    from altgrad.report.run_report import RunReport

_PARTS = {
    "weights": "weights",
    "states": "states",
    "compensation": "rounding errors",
    "master": "master copy",
}
"""Headings of the parts of `Bytes`."""
_LEAST_WIDTH = 10  # characters of a recipe's name
NOTE = (
    "Bytes per weight and bytes in all, of weights and optimizer states alone, from the layers' "
    "real shapes; scales of formats count, 1 MB is 10^6 bytes. A simulation by WeightStorage or "
    "StoreAs still takes the memory of float32."
)
"""A sentence on the numbers of the table."""


def print_memory(report: RunReport, console: Console) -> None:
    """Print a table of the memory that each recipe takes, and what it saves against float32.

    Args:
        report: Report of the run.
        console: Console to print on.
    """
    found = measure_memory(report.run.layers, report.run.recipes)
    if not found:
        return
    print_text(console, write_memory(report.run, found), "bold")
    if not is_known(found):
        return
    headings, rows = tabulate_memory(found)
    columns = [*zip(headings, *rows, strict=True)]
    width = max(console.width - GAP - measure_columns(columns[1:]), _LEAST_WIDTH)
    names = shorten_names([row[0] for row in rows], width)
    table = make_table(headings[:1])
    for heading in headings[1:]:
        add_column(table, style_text(heading), "right")
    for name, row in zip(names, rows, strict=True):
        table.add_row(style_text(name), *map(style_text, row[1:]))
    console.print(table)
    print_text(console, NOTE, "dim")
    console.print()


def is_known(found: Mapping[str, Memory]) -> bool:
    """Return True if the memory of a run in float32, with which recipes compare, is known."""
    return any(not math.isnan(each.fp32) for each in found.values())


def write_memory(run: Run, found: Mapping[str, Memory]) -> str:
    """Return a sentence on the memory that a run takes in float32, or why it is unknown.

    Args:
        run: The run.
        found: Its memory by recipe, one at least.
    """
    memory = next(iter(found.values()))
    weights, layers = memory.parameters, memory.layers
    what = f"{format_count(weights, 'weight')} in {format_count(layers, 'layer')}"
    rest = len(run.layers) - layers
    others = f" Not counted: {format_count(rest, 'layer')} without a step." if rest else ""
    if math.isnan(memory.fp32):
        return (
            f"Memory: {what}. The optimizer states are unknown: the run file was written by an "
            "older AltGrad, or not by watch, PrecisionMonitor or PrecisionCallback."
        )
    whole = format_bytes(memory.fp32)
    return f"Memory: {what} take {whole} in float32 with the run's optimizer.{others}"


def tabulate_memory(found: Mapping[str, Memory]) -> tuple[list[str], list[list[str]]]:
    """Return the table of the memory by recipe; parts that all recipes lack have no column.

    Args:
        found: The memory by recipe.

    Returns:
        The headings, and a row for each recipe.
    """
    each = [*found.values()]
    parts = [name for name in Bytes._fields if any(getattr(m.bytes, name) for m in each)]
    headings = ["recipe", *(_PARTS[name] for name in parts), "bytes/weight", "in all", "saves"]
    rows = [
        [
            memory.recipe,
            *(_format_number(getattr(memory.per_parameter, name)) for name in parts),
            _format_number(memory.per_parameter.total),
            format_bytes(memory.bytes.total),
            format_saved(memory.saved_share),
        ]
        for memory in each
    ]
    return headings, rows


def memory_as_json(run: Run) -> dict[str, Any]:
    """Return the memory of a run by recipe as JSON values, NaN as None.

    Returns:
        Under ``fp32_bytes`` and ``parameters`` those of the observed layers. Under ``recipes``, by
        name, the bytes of each part, in all and saved, and bytes for each weight.
    """
    found = measure_memory(run.layers, run.recipes)
    first = next(iter(found.values()), None)
    return {
        "parameters": first.parameters if first else None,
        "fp32_bytes": number_as_json(first.fp32) if first else None,
        "recipes": {name: _convert(memory) for name, memory in found.items()},
    }


def _convert(memory: Memory) -> dict[str, Any]:
    per_parameter = memory.per_parameter
    return {
        "bytes": _convert_bytes(memory.bytes),
        "bytes_per_parameter": _convert_bytes(per_parameter),
        "saved_bytes": number_as_json(memory.saved),
        "saved_share": number_as_json(memory.saved_share),
    }


def _convert_bytes(parts: Bytes) -> dict[str, Any]:
    numbers: Sequence[tuple[str, float]] = [*parts._asdict().items(), ("total", parts.total)]
    return {name: number_as_json(float(size)) for name, size in numbers}


def _format_number(number: float) -> str:
    return UNKNOWN if math.isnan(number) else f"{number:.2f}"
