"""Write run files of schema 2, with a line of JSON for each layer: the oracle of today's files."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from altgrad import Histogram, StepRecord
from altgrad.report import Header

WITH_ERRORS = ("kept_update_ratio", "stall_frac", "never_moved_frac", "underflow_frac")
WITH_ERRORS += ("saturated_frac",)
TWINS_WITH_ERRORS = ("progress_kept", "window_progress_kept", "frozen_frac", "still_frac")


def write_schema_2(
    folder: Path,
    header: Header,
    records: list[StepRecord],
    weights: Mapping[int, Histogram] | None = None,
    **about: Any,
) -> Path:
    """Write a file as AltGrad wrote it before schema 3, with the steps 0, 1, 2, …."""
    lines = [header.as_json() | {"altgrad": 2} | about]
    for step, record in enumerate(records):
        lines += list_lines(step, record, (weights or {}).get(step), {"inf": step})
    folder.mkdir(exist_ok=True)
    path = folder / "altgrad.jsonl"
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


def list_lines(
    step: int, record: StepRecord, weights: Histogram | None, skipped: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Return the lines of a step: of each layer, then of the model."""
    lines = [_make_line(step, name, record.layers[name]) for name in record.layers]
    model = record.model
    keys = ("ulps", *(f"steps/{format}" for format in model.formats))
    histograms = {key: model.histogram(key) for key in keys}
    if weights is not None:
        histograms["weights"] = weights
    return [
        *lines,
        _make_line(step, None, model)
        | {
            "elements": model.elements,
            "own_seconds": _shorten(record.own_seconds),
            "training_seconds": _shorten(record.training_seconds),
            "skipped": dict(skipped),
            "histograms": {
                key: {"first": each.first, "counts": [*map(_shorten, each.counts)]}
                for key, each in histograms.items()
            },
        },
    ]


def _make_line(step: int, layer: str | None, figures: Any) -> dict[str, Any]:
    line = {"step": step, "layer": layer, "figures": {k: _shorten(v) for k, v in figures.items()}}
    is_sampled = figures.elements < figures.population
    keys = [f"{m}/{f}" for f in figures.formats for m in WITH_ERRORS if is_sampled]
    keys += [f"{m}/{r}" for r in figures.recipes for m in TWINS_WITH_ERRORS]
    if keys:
        line["errors"] = {key: _shorten(figures.standard_error(key)) for key in keys}
    if figures.recipes:
        line["moved_elements"] = _shorten(figures.moved_elements)
    return line


def _shorten(number: float) -> float | str | None:
    if math.isfinite(number):
        return float(f"{number:.8g}")
    return None if math.isnan(number) else str(number)
