"""Format a `StepRecord`, the figures of one measured step, as JSON lines of a run file.

A run file repeats the same keys in every line. Cached templates hold the keys, and one formatting
operation inserts all numbers of a line.

Read `format_lines` first; `schema` describes the header, and `writing` writes the lines to disk.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from altgrad.measurement.catalogue import figure_keys
from altgrad.measurement.histogram import Histogram

if TYPE_CHECKING:
    from altgrad.measurement.figures import Figures
    from altgrad.measurement.step_record import StepRecord

WITH_ERRORS = (
    *("kept_update_ratio", "stall_frac", "never_moved_frac"),
    *("underflow_frac", "saturated_frac"),
)
"""Metrics of a number format whose standard errors go into the run file."""
TWIN_METRICS_WITH_ERRORS = ("progress_kept", "window_progress_kept", "frozen_frac", "still_frac")
"""Metrics of twins whose standard errors go into the run file.

A twin is a sample of each layer that is trained as a recipe for storing weights says.
"""
_NUMBER = "%.8g"  # 8 significant digits halve the size of a file with all 17 of a float64


def format_lines(
    step: int,
    record: StepRecord,
    skipped: Mapping[str, int],
    weights: Histogram | None,
) -> str:
    """Return the JSON lines of one measured step: a line per layer, then the line of the model.

    Args:
        step: Number of the step.
        record: Figures of the step, of each layer and of the model.
        skipped: Number of steps so far that moved no weight, by reason.
        weights: Histogram of log2(abs(weight)) over the model; None writes no histogram of weights.

    Returns:
        The lines, each of which ends with a line feed.
    """
    lines = [(_quote(name), _format_figures(figures)) for name, figures in record.layers.items()]
    model_fields = _format_model_fields(record, skipped, weights)
    lines.append(("null", _format_figures(record.model) + model_fields))
    return "".join(f'{{"step":{step},"layer":{layer},{line}}}\n' for layer, line in lines)


def format_numbers(numbers: Sequence[float]) -> list[str]:
    """Return each number as valid JSON with 8 significant digits.

    NaN becomes ``null``, inf ``"inf"`` and −inf ``"-inf"``.
    """
    text = (_NUMBER + " ") * len(numbers) % tuple(numbers)
    if "n" in text:  # NaN or inf; no finite number has an "n"
        text = text.replace("nan", "null").replace("inf", '"inf"').replace('-"inf"', '"-inf"')
    return text.split()


def _format_figures(figures: Figures) -> str:
    numbers, is_sampled = figures.in_order(), figures.elements < figures.population
    twins = figures.twin_keys
    if twins:
        numbers = [*numbers, *figures.twins_in_order()]
    if is_sampled:
        numbers = [*numbers, *figures.errors_in_order(WITH_ERRORS)]
    if twins:
        errors = figures.twins.errors_in_order(TWIN_METRICS_WITH_ERRORS)
        numbers = [*numbers, *errors, figures.moved_elements]
    is_finite = math.isfinite(sum(numbers))  # these take half the time
    template = _make_template(
        figures.formats, twins, _NUMBER if is_finite else "%s", with_errors=is_sampled
    )
    return template % tuple(numbers if is_finite else format_numbers(numbers))


def _format_model_fields(
    record: StepRecord, skipped: Mapping[str, int], weights: Histogram | None
) -> str:
    model = record.model
    keys = ("ulps", *(f"steps/{format}" for format in model.formats))
    histograms = {key: model.histogram(key) for key in keys}
    if weights is not None:
        histograms["weights"] = weights
    own, training = format_numbers((record.own_seconds, record.training_seconds))
    counts = {str(reason): int(count) for reason, count in skipped.items()}
    return (
        f',"elements":{model.elements},"own_seconds":{own},"training_seconds":{training},'
        f'"skipped":{json.dumps(counts)},'
        f'"histograms":{{{",".join(_format_histogram(*each) for each in histograms.items())}}}'
    )


def _format_histogram(key: str, histogram: Histogram) -> str:
    counts = ",".join(format_numbers(histogram.counts))
    return f'{_quote(key)}:{{"first":{histogram.first},"counts":[{counts}]}}'


@functools.lru_cache(maxsize=256)
def _make_template(
    formats: tuple[str, ...], twins: tuple[str, ...], placeholder: str, *, with_errors: bool
) -> str:
    """Return JSON of figures and standard errors by key, with a placeholder for each number.

    Args:
        formats: Names of the number formats.
        twins: Keys ``metric/recipe`` of figures of twins, samples trained as a recipe says.
        placeholder: The placeholder, such as ``%.8g``, for Python's ``%`` operator.
        with_errors: If True, figures of formats have standard errors, too; twins always do.
    """
    template = f'"figures":{{{_format_pairs((*figure_keys(formats), *twins), placeholder)}}}'
    keys = [f"{metric}/{format}" for format in formats for metric in WITH_ERRORS]
    keys = [*(keys if with_errors else ()), *_choose_with_errors(twins)]
    if with_errors or keys:
        template += f',"errors":{{{_format_pairs(keys, placeholder)}}}'
    return template + (f',"moved_elements":{placeholder}' if twins else "")


@functools.lru_cache(maxsize=256)
def _choose_with_errors(twins: tuple[str, ...]) -> tuple[str, ...]:
    """Return those of the keys ``metric/recipe`` whose standard errors go into the run file."""
    return tuple(key for key in twins if key.partition("/")[0] in TWIN_METRICS_WITH_ERRORS)


@functools.lru_cache(maxsize=8192)  # names of layers recur in every step
def _quote(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)


def _format_pairs(keys: Iterable[str], placeholder: str) -> str:
    """Return JSON pairs ``"key":placeholder``, as a template for Python's ``%`` operator."""
    return ",".join(f"{_quote(key).replace('%', '%%')}:{placeholder}" for key in keys)
