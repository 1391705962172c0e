"""Make runs with known verdicts, from real optimizer steps and from plain numbers.

In the real runs all weights are 1. Updates of 0.001 stall in bf16 and e5m2; updates of 0.25 do not.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from altgrad import UpdateMonitor
from altgrad.quantization import get_formats
from altgrad.report import FormatInfo, LayerInfo, Row, Run, RunFile

SCRIPT, MARKUP = "<script>alert('x')</script>", "[red]layers[/].0|*b*.weight"
FORMATS = ("bf16", "e5m2")


def write_run(
    folder: Path,
    frozen: Sequence[str] = ("gain", SCRIPT),
    fine: Sequence[str] = ("matrix", MARKUP),
    *,
    steps: int = 3,
    formats: Sequence[str] = FORMATS,
    recipes: Sequence[str] | None = None,
) -> Path:
    """Write a run file; the frozen layers stall in every format with at most 8 significant bits.

    Each format has a twin of its name, if `recipes` names no others.
    """
    parameters = {name: nn.Parameter(torch.ones(8)) for name in (*frozen, *fine)}
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    recipes = formats if recipes is None else recipes
    named = [*parameters.items()]
    monitor = UpdateMonitor(named, formats=formats, recipes=recipes, scaling=None, strict=True)
    with RunFile.create(folder, monitor.run_header()) as file, monitor.attach(optimizer):
        for step in range(steps):
            for name, parameter in parameters.items():
                size = 1e-3 if name in frozen else 0.25
                parameter.grad = torch.full((8,), size if step % 2 else -size)
            optimizer.step()
            weights = monitor.latest.model.histogram("weights")
            file.append(10 * step, monitor.latest, skipped={"inf": step}, weights=weights)
    return file.path


def write_empty_run(folder: Path) -> Path:
    """Write the file of a run that was killed before its first observed step."""
    return write_run(folder, steps=0)


# --- plain numbers


def figures(format: str = "bf16", **values: float) -> dict[str, float]:
    """Make the figures of a layer that is stored fine, with these figures changed."""
    fine = {
        "kept_update_ratio": 1.0,
        "stall_frac": 0.0,
        "never_moved_frac": 0.0,
        "underflow_frac": 0.0,
        "saturated_frac": 0.0,
    }
    return {f"{metric}/{format}": value for metric, value in {**fine, **values}.items()}


def make_rows(kept: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """Make the rows of one step from kept_update_ratio by layer and format."""
    figures_by_layer = {
        layer: [figures(format, kept_update_ratio=share) for format, share in by_format.items()]
        for layer, by_format in kept.items()
    }
    return [
        Row(0, layer, {key: value for each in found for key, value in each.items()}, {})
        for layer, found in figures_by_layer.items()
    ]


def make_run(rows: Iterable[Row], formats: Sequence[str] = FORMATS, **more: Any) -> Run:
    """Make the run that reading these rows from a file would give."""
    rows = [*rows]
    names = dict.fromkeys(row.layer for row in rows if row.layer is not None)
    about: dict[str, Any] = {
        "path": Path("log", "altgrad.jsonl"),
        "formats": {
            each.name: FormatInfo.from_format(each, "tensor") for each in get_formats(formats)
        },
        "scaling": "tensor",
        "layers": {name: LayerInfo((8,), "float32", 8, tuple(formats)) for name in names},
        "rows": rows,
        "notes": [],
        "predecessors": [],
        "versions": {},
        "created": "",
    }
    return Run(**(about | more))
