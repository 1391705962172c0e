"""The verdicts on a run and its layers as JSON (`as_json`) and as CSV (`as_csv`).

`confirmation_as_json` and `confirmation_as_csv` convert what one run predicted, and what happened;
`comparison_as_json` and `comparison_as_csv` the verdicts of two runs. docs/json.md lists the keys:
whoever renames or removes one, or changes what it means, raises `JSON_SCHEMA`.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from typing import Any

from altgrad.report.answers import write_storage
from altgrad.report.comparison import Comparison
from altgrad.report.confirmation import MEANING, Confirmation, ConfirmedLayer
from altgrad.report.judging.tallies import STEP_METRICS, TWIN_METRICS
from altgrad.report.judging.verdicts import Advice, Assessment, Verdict
from altgrad.report.memory_table import memory_as_json
from altgrad.report.next_lines import list_next_lines
from altgrad.report.records.kinds import number_as_json
from altgrad.report.records.rows import Row, is_twin_key
from altgrad.report.records.run import Run
from altgrad.report.records.schema import info_as_json
from altgrad.report.records.verdict_lines import runs_as_json
from altgrad.report.run_report import RunReport

JSON_SCHEMA = 1
"""Version of the keys of the JSON: the value of ``"schema"``. New keys do not change it."""

_METRICS = (*TWIN_METRICS, *STEP_METRICS)
"""Metrics on which verdicts rest: those of twins (stored samples), then those of single steps."""
_LAYER_SHARES = ("unmoved_frac", "nonfinite_frac")
"""Metrics of the layer itself, the same for all recipes: the mean and the largest share."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
"""First characters of cells that a spreadsheet reads as formulas; Excel knows full-width signs."""


def as_json(report: RunReport) -> dict[str, Any]:
    """Return the whole report as JSON values: NaN as None, inf as ``"inf"``.

    Args:
        report: The report of a run.

    Returns:
        The run, its summary and notes. Under ``runs`` the verdict on the run by recipe, ``now``
        for what the run itself loses. By recipe the number of layers with each verdict, and by
        layer and recipe the verdict with its figures. Under ``next_lines`` the lines of Python to
        train with, and why, and under ``memory`` what each recipe takes. The recipes that the run
        tried on samples (twins), and their last figures.
    """
    by_layer, suggestions = report.by_layer, report.assessment.suggestions
    return {
        **begin_json("report"),
        "path": str(report.run.path),
        "created": report.run.created,
        "versions": dict(report.run.versions),
        "formats": report.formats,
        "steps": [*report.run.steps],
        "skipped": dict(report.skipped),
        "own_share": number_as_json(report.own_share),
        "visible_frac": _convert_numbers(report.visible),
        "answer": report.answer,
        "stored": write_storage(report.run, report.assessment.runs, report.visible),
        "runs": runs_as_json(report.assessment.runs),
        "summary": report.assessment.summary,
        "counts": count_verdicts(report.assessment),
        "layers": {
            layer: {
                "smallest_that_stores_fine": suggestions.get(layer),
                "unmoved_frac": number_as_json(report.unmoved.get(layer, math.nan)),
                "nonfinite_frac": report.nonfinite.get(layer, 0.0),
                "recipes": {name: _convert_advice(each) for name, each in advice.items()},
            }
            for layer, advice in by_layer.items()
        },
        "to_apply": report.to_apply,
        "memory": memory_as_json(report.run),
        "next_lines": [line._asdict() for line in list_next_lines(report)],
        "notes": report.notes,
        **_convert_twins(report.run),
    }


def count_verdicts(assessment: Assessment) -> dict[str, dict[str, int]]:
    """Count the layers with each verdict.

    Args:
        assessment: Verdicts on a run and its layers.

    Returns:
        By name of the recipe, and then of each `Verdict`, the number of layers, which may be 0.
    """
    counts = {recipe: dict.fromkeys(Verdict.__members__, 0) for recipe in assessment.runs}
    for advice in assessment.advice:
        counts[advice.recipe][advice.verdict.name] += 1
    return counts


def as_csv(report: RunReport) -> str:
    """Return the verdicts as CSV, one line for each layer and recipe; NaN is an empty cell.

    A *recipe* says how weights and optimizer states are stored.

    A text that a spreadsheet would read as a formula, such as a layer named ``=cmd|…``, has an
    apostrophe before it. A text that begins with an apostrophe has a second one, so that
    ``text.removeprefix("'")`` gives every text back.
    """
    errors = [f"{metric}_{what}" for metric in _METRICS for what in ("error", "low", "high")]
    rows: list[list[Any]] = [
        ["layer", "recipe", "verdict", *_METRICS, *_LAYER_SHARES, *errors, "reason", "evidence"]
    ]
    for advice in report.assessment.advice:
        figures = [number_as_json(advice.figures.get(metric, math.nan)) for metric in _METRICS]
        ends = [
            number_as_json(number)
            for metric in _METRICS
            for number in (
                (advice.errors[metric], *advice.interval(metric))
                if metric in advice.errors
                else (math.nan, math.nan, math.nan)
            )
        ]
        shares = [
            report.unmoved.get(advice.layer, math.nan),
            report.nonfinite.get(advice.layer, 0.0),
        ]
        where = [_disarm(advice.layer), _disarm(advice.recipe), advice.verdict.short]
        why = [_disarm(advice.reason), _disarm(advice.evidence)]
        rows.append([*where, *figures, *map(number_as_json, shares), *ends, *why])
    return "".join(map(_format_line, rows))


def confirmation_as_json(confirmation: Confirmation) -> dict[str, Any]:
    """Return what one run predicted beside what happened in another, as JSON values: NaN as None.

    Args:
        confirmation: The prediction, and the run in which it came true or not.

    Returns:
        The files of both runs, the recipe, mean differences, numbers of frozen layers, notes, and
        for the model and each layer the step and by metric the figures and their difference.
    """
    model = confirmation.model
    return {
        **begin_json("confirmation"),
        "predicting": str(confirmation.predicting.path),
        "real": str(confirmation.real.path),
        "recipe": confirmation.recipe,
        "mean_differences": _convert_numbers(confirmation.mean_errors),
        "frozen": confirmation.frozen._asdict(),
        "summary": " ".join(confirmation.summary),
        "meaning": MEANING,
        "notes": confirmation.notes,
        "model": None if model is None else _convert_confirmed(model),
        "layers": {str(each.name): _convert_confirmed(each) for each in confirmation.layers},
    }


def confirmation_as_csv(confirmation: Confirmation) -> str:
    """Return what one run predicted beside what happened, as CSV, one line for each layer.

    A number without a value is an empty cell. Texts are those of `as_csv`: none is read as a
    formula.
    """
    parts = ("predicted", "real", "difference")
    columns = [f"{metric}_{part}" for metric in confirmation.metrics for part in parts]
    rows: list[list[Any]] = [["layer", "step", *columns]]
    for layer in confirmation.layers:
        figures = [number_as_json(figure) for pair in layer.pairs.values() for figure in pair]
        rows.append([_disarm(str(layer.name)), layer.step, *figures])
    return "".join(map(_format_line, rows))


def comparison_as_json(comparison: Comparison) -> dict[str, Any]:
    """Return the figures and the verdicts of two runs side by side, as JSON values: NaN as None.

    Args:
        comparison: The comparison of two runs, of which none predicted the other.

    Returns:
        The files of both runs, means of the model's figures, the last common figures of twins, and
        by layer and recipe both verdicts, with True if they differ. The first layers differ most.
    """
    twins = comparison.twins
    layers: dict[str, dict[str, Any]] = {}
    for first, second in comparison.changes:
        layers.setdefault(first.layer, {})[first.recipe] = {
            "a": _convert_side(first),
            "b": _convert_side(second),
            "differs": first.verdict is not second.verdict,
        }
    return {
        **begin_json("comparison"),
        "a": str(comparison.runs[0].run.path),
        "b": str(comparison.runs[1].run.path),
        "summary": comparison.summary,
        "compared": len(comparison.changes),
        "differing": sum(a.verdict is not b.verdict for a, b in comparison.changes),
        "means": _convert_figures(comparison.model_means),
        "twins": twins and {"step": twins.step, "figures": _convert_figures(twins.rows)},
        "layers": layers,
        "notes": comparison.notes,
    }


def comparison_as_csv(comparison: Comparison) -> str:
    """Return the verdicts of two runs as CSV, one line for each layer and recipe in both.

    A *recipe* says how weights and optimizer states are stored.

    Lines whose verdicts differ come first. A number without a value is an empty cell, and texts are
    those of `as_csv`.
    """
    sides = [f"{what}_{side}" for side in "ab" for what in ("verdict", "kept")]
    rows: list[list[Any]] = [["layer", "recipe", *sides, "differs"]]
    for first, second in comparison.changes:
        cells = [[each.verdict.short, number_as_json(each.kept)] for each in (first, second)]
        differs = first.verdict is not second.verdict
        rows.append([_disarm(first.layer), _disarm(first.recipe), *cells[0], *cells[1], differs])
    return "".join(map(_format_line, rows))


def begin_json(kind: str) -> dict[str, Any]:
    """Return the first keys of each JSON: the version of its keys, and what it is about."""
    return {"schema": JSON_SCHEMA, "kind": kind}


def _convert_side(advice: Advice) -> dict[str, Any]:
    return {"verdict": advice.verdict.name, "kept": number_as_json(advice.kept)}


def _convert_figures(rows: Iterable[tuple[str, float, float]]) -> dict[str, Any]:
    return {
        key: _convert_numbers({"a": in_a, "b": in_b, "difference": in_b - in_a})
        for key, in_a, in_b in rows
    }


def _convert_confirmed(layer: ConfirmedLayer) -> dict[str, Any]:
    pairs = {metric: _convert_numbers(pair._asdict()) for metric, pair in layer.pairs.items()}
    return {"step": layer.step, "figures": pairs}


def _format_line(cells: Iterable[object]) -> str:
    line = io.StringIO(newline="")
    # The writer quotes only those ends of lines that it writes itself, until Python 3.12.
    csv.writer(line, lineterminator="\r\n").writerow(cells)
    return line.getvalue().removesuffix("\r\n") + "\n"


def _disarm(text: str) -> str:
    """Return a text as a cell that every spreadsheet reads as text."""
    return "'" + text if text.startswith((*_FORMULA, "'")) else text


def _convert_advice(advice: Advice) -> dict[str, Any]:
    return {
        "verdict": advice.verdict.name,
        "kept": number_as_json(advice.kept),
        "figures": _convert_numbers(advice.figures),
        "errors": _convert_numbers(advice.errors),
        "intervals": {
            metric: [*map(number_as_json, advice.interval(metric))] for metric in advice.errors
        },
        "reason": advice.reason,
        "evidence": advice.evidence,
    }


def _convert_twins(run: Run) -> dict[str, Any]:
    """Return what a run found out about recipes for storing weights, as JSON values.

    Under ``recipes`` are the recipes, and under ``twins`` the last figures of the samples on which
    the run tried them, of the model and of each layer.
    """
    last = run.last_rows([key for key in run.figure_keys if is_twin_key(key)])
    return {
        "recipes": {name: info_as_json(each) for name, each in run.recipes.items()},
        "twins": {
            "model": _convert_twin_row(last[None]) if None in last else {},
            "layers": {
                layer: _convert_twin_row(row) for layer, row in last.items() if layer is not None
            },
        },
    }


def _convert_twin_row(row: Row) -> dict[str, Any]:
    """Return step, figures and confidence intervals of twins by recipe, as JSON values.

    A twin is a sample that is trained as a recipe says; `row` has its figures in one step.
    """
    return {
        recipe: {
            "step": row.step,
            "figures": _convert_numbers(figures),
            "intervals": {
                metric: [*map(number_as_json, row.interval(key))]
                for metric in figures
                if (key := f"{metric}/{recipe}") in row.errors
            },
        }
        for recipe, figures in row.twins.items()
    }


def _convert_numbers(values: Mapping[str, float]) -> dict[str, Any]:
    return {key: number_as_json(value) for key, value in values.items()}
