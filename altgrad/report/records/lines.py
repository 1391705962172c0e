"""From a `StepRecord` to its lines: templates hold the keys, and numbers are written at once."""

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

WITH_ERRORS = ("kept_update_ratio", "stall_frac", "never_moved_frac")
"""Metrics of a format whose standard errors are written."""
_NUMBER = "%.8g"


def lines_of(
    step: int,
    record: StepRecord,
    skipped: Mapping[str, int],
    weights: Histogram | None,
) -> str:
    """A line for each layer and then one for the model, in JSON."""
    lines = [(_text(name), _of_figures(figures)) for name, figures in record.layers.items()]
    lines.append(("null", _of_figures(record.model) + _of_model(record, skipped, weights)))
    return "".join(f'{{"step":{step},"layer":{layer},{line}}}\n' for layer, line in lines)


def written_numbers(numbers: Sequence[float]) -> list[str]:
    """Each as valid JSON, to 8 significant digits."""
    text = (_NUMBER + " ") * len(numbers) % tuple(numbers)
    if "n" in text:  # NaN or inf
        text = text.replace("nan", "null").replace("inf", '"inf"').replace('-"inf"', '"-inf"')
    return text.split()


def _of_figures(figures: Figures) -> str:
    numbers, is_sampled = figures.in_order(), figures.elements < figures.population
    if is_sampled:
        numbers = [*numbers, *figures.errors_in_order(WITH_ERRORS)]
    if math.isfinite(sum(numbers)):  # twice as fast, and nearly always
        return _template(figures.formats, _NUMBER, with_errors=is_sampled) % tuple(numbers)
    template = _template(figures.formats, "%s", with_errors=is_sampled)
    return template % tuple(written_numbers(numbers))


def _of_model(record: StepRecord, skipped: Mapping[str, int], weights: Histogram | None) -> str:
    model = record.model
    keys = ("ulps", *(f"steps/{format}" for format in model.formats))
    histograms = {key: model.histogram(key) for key in keys}
    if weights is not None:
        histograms["weights"] = weights
    own, training = written_numbers((record.own_seconds, record.training_seconds))
    counts = {str(reason): int(count) for reason, count in skipped.items()}
    return (
        f',"elements":{model.elements},"own_seconds":{own},"training_seconds":{training},'
        f'"skipped":{json.dumps(counts)},'
        f'"histograms":{{{",".join(_of_histogram(*each) for each in histograms.items())}}}'
    )


def _of_histogram(key: str, histogram: Histogram) -> str:
    counts = ",".join(written_numbers(histogram.counts))
    return f'{_text(key)}:{{"first":{histogram.first},"counts":[{counts}]}}'


@functools.lru_cache(maxsize=256)
def _template(formats: tuple[str, ...], place: str, *, with_errors: bool) -> str:
    template = f'"figures":{{{_pairs(figure_keys(formats), place)}}}'
    if with_errors:
        keys = [f"{metric}/{format}" for format in formats for metric in WITH_ERRORS]
        template += f',"errors":{{{_pairs(keys, place)}}}'
    return template


@functools.lru_cache(maxsize=8192)
def _text(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)


def _pairs(keys: Iterable[str], place: str) -> str:
    """With a place for each number; ``%%`` makes a ``%``."""
    return ",".join(f"{_text(key).replace('%', '%%')}:{place}" for key in keys)
