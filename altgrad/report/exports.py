"""The verdicts for other programs: as JSON and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from altgrad.report.records.schema import number_as_json
from altgrad.report.run_report import RunReport
from altgrad.report.verdicts import RESTS_ON, Advice

_FIGURES = (
    "kept_update_ratio",
    "stall_frac",
    "never_moved_frac",
    "underflow_frac",
    "saturated_frac",
)


def as_json(report: RunReport) -> dict[str, Any]:
    """All that the report says, as values that JSON has: NaN is None, inf a word."""
    by_layer, suggestions = report.assessment.by_layer, report.assessment.suggestions
    return {
        "path": str(report.run.path),
        "created": report.run.created,
        "versions": dict(report.run.versions),
        "formats": report.formats,
        "steps": [*report.run.steps],
        "skipped": dict(report.skipped),
        "own_share": number_as_json(report.own_share),
        "summary": report.assessment.summary,
        "layers": {
            layer: {
                "smallest_that_stores_fine": suggestions.get(layer),
                "formats": {format: _of_advice(each) for format, each in advice.items()},
            }
            for layer, advice in by_layer.items()
        },
        "to_apply": report.to_apply,
        "notes": [*report.run.notes],
    }


def as_csv(report: RunReport) -> str:
    """A line for each layer and format; a number without a value is an empty cell."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    errors = [f"{metric}_error" for metric in RESTS_ON]
    writer.writerow(["layer", "format", "verdict", *_FIGURES, *errors, "reason", "evidence"])
    for advice in report.assessment.advice:
        figures = [number_as_json(advice.figures[metric]) for metric in _FIGURES]
        of_errors = [number_as_json(advice.errors[metric]) for metric in RESTS_ON]
        where = [advice.layer, advice.format, str(advice.verdict)]
        writer.writerow([*where, *figures, *of_errors, advice.reason, advice.evidence])
    return file.getvalue()


def _of_advice(advice: Advice) -> dict[str, Any]:
    return {
        "verdict": str(advice.verdict),
        "figures": _numbers(advice.figures),
        "errors": _numbers(advice.errors),
        "reason": advice.reason,
        "evidence": advice.evidence,
    }


def _numbers(values: Mapping[str, float]) -> dict[str, Any]:
    return {key: number_as_json(value) for key, value in values.items()}
