"""Runs whose verdicts are known: weights of 1 that a step of 0.001 moves, or one of 0.25; and runs
made of plain numbers.
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


def written_run(
    folder: Path,
    frozen: Sequence[str] = ("gain", SCRIPT),
    fine: Sequence[str] = ("matrix", MARKUP),
    *,
    steps: int = 3,
    formats: Sequence[str] = FORMATS,
) -> Path:
    """A run file: the gains stall in all formats with up to 8 bits of significand."""
    parameters = {name: nn.Parameter(torch.ones(8)) for name in (*frozen, *fine)}
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    monitor = UpdateMonitor([*parameters.items()], formats=formats, scaling=None, strict=True)
    with RunFile.create(folder, monitor.run_header()) as file, monitor.attach(optimizer):
        for step in range(steps):
            for name, parameter in parameters.items():
                size = 1e-3 if name in frozen else 0.25
                parameter.grad = torch.full((8,), size if step % 2 else -size)
            optimizer.step()
            weights = monitor.weight_octaves()
            file.append(10 * step, monitor.latest, skipped={"inf": step}, weights=weights)
    return file.path


def empty_run(folder: Path) -> Path:
    """Killed before its first observed step."""
    return written_run(folder, steps=0)


# Made of plain numbers


def figures(format: str = "bf16", **values: float) -> dict[str, float]:
    """What a verdict rests on: of a layer that is stored fine, but for these values."""
    fine = {
        "kept_update_ratio": 1.0,
        "stall_frac": 0.0,
        "never_moved_frac": 0.0,
        "underflow_frac": 0.0,
        "saturated_frac": 0.0,
    }
    return {f"{metric}/{format}": value for metric, value in {**fine, **values}.items()}


def rows_of(kept: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """One step, in which each layer keeps so much of its update in each format."""
    of_layers = {
        layer: [figures(format, kept_update_ratio=share) for format, share in by_format.items()]
        for layer, by_format in kept.items()
    }
    return [
        Row(0, layer, {key: value for each in found for key, value in each.items()}, {})
        for layer, found in of_layers.items()
    ]


def run_of(rows: Iterable[Row], formats: Sequence[str] = FORMATS, **more: Any) -> Run:
    """A run of these rows, as if it had been read."""
    rows = [*rows]
    names = dict.fromkeys(row.layer for row in rows if row.layer is not None)
    about: dict[str, Any] = {
        "path": Path("log", "altgrad.jsonl"),
        "formats": {each.name: FormatInfo.of(each, "tensor") for each in get_formats(formats)},
        "scaling": "tensor",
        "layers": {name: LayerInfo((8,), "float32", 8, tuple(formats)) for name in names},
        "rows": rows,
        "notes": [],
        "predecessors": [],
        "versions": {},
        "created": "",
    }
    return Run(**(about | more))
