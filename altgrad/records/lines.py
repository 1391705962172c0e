"""From a `StepRecord` to its lines: templates hold the keys, and numbers are written at once."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from altgrad.figures import Figures, Histogram, keys_of
from altgrad.step_record import StepRecord

WITH_ERRORS = ("kept_update_ratio", "stall_frac", "never_moved_frac")
"""Metrics of a format whose standard errors are written."""


class _Line(NamedTuple):
    """What follows the name of the layer, with a ``%s`` in the place of each number."""

    layer: str | None
    template: str
    numbers: list[float]


def lines_of(
    step: int,
    record: StepRecord,
    skipped: Mapping[str, int],
    weights: Histogram | None,
) -> str:
    """A line for each layer and then one for the model, in JSON."""
    lines = [_figures(name, figures) for name, figures in record.layers.items()]
    lines.append(_of_model(record, skipped, weights))
    written = iter(written_numbers([number for line in lines for number in line.numbers]))
    return "".join(
        f'{{"step":{step},"layer":{_text(layer)},'
        f"{template % tuple(itertools.islice(written, len(numbers)))}}}\n"
        for layer, template, numbers in lines
    )


def written_numbers(numbers: Sequence[float]) -> list[str]:
    """Each as valid JSON, to 8 significant digits."""
    text = _number_template(len(numbers)) % tuple(numbers)
    if "n" in text:  # NaN or inf
        text = text.replace("nan", "null").replace("inf", '"inf"').replace('-"inf"', '"-inf"')
    return text.split()


def _figures(layer: str | None, figures: Figures) -> _Line:
    formats, numbers = figures.formats, [*figures.values()]
    is_sampled = figures.elements < figures.population
    if is_sampled:
        numbers += [figures.standard_error(key) for key in _keys_with_errors(formats)]
    return _Line(layer, _figures_template(formats, with_errors=is_sampled), numbers)


def _of_model(record: StepRecord, skipped: Mapping[str, int], weights: Histogram | None) -> _Line:
    model = record.model
    _, template, numbers = _figures(None, model)
    keys = ("ulps", *(f"steps/{format}" for format in model.formats))
    histograms = {key: model.histogram(key) for key in keys}
    if weights is not None:
        histograms["weights"] = weights
    seconds = record.own_seconds, record.training_seconds
    counts = {str(reason): int(count) for reason, count in skipped.items()}
    rest = (
        f',"elements":{model.elements},"own_seconds":%s,"training_seconds":%s,'
        f'"skipped":{_escaped(json.dumps(counts))},"histograms":{{'
    )
    rest += ",".join(
        f'{_escaped(_text(key))}:{{"first":{each.first},"counts":[{_places(len(each.counts))}]}}'
        for key, each in histograms.items()
    )
    counted = [count for each in histograms.values() for count in each.counts]
    return _Line(None, f"{template}{rest}}}", [*numbers, *seconds, *counted])


@functools.lru_cache(maxsize=64)
def _figures_template(formats: tuple[str, ...], *, with_errors: bool) -> str:
    template = f'"figures":{{{_pairs(keys_of(formats))}}}'
    if with_errors:
        template += f',"errors":{{{_pairs(_keys_with_errors(formats))}}}'
    return template


@functools.lru_cache(maxsize=64)
def _keys_with_errors(formats: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{metric}/{format}" for metric in WITH_ERRORS for format in formats)


@functools.lru_cache(maxsize=8)
def _number_template(count: int) -> str:
    return "%.8g " * count


@functools.lru_cache(maxsize=8192)
def _text(name: str | None) -> str:
    return json.dumps(name, ensure_ascii=False)


def _pairs(keys: Iterable[str]) -> str:
    return ",".join(f"{_escaped(_text(key))}:%s" for key in keys)


def _places(count: int) -> str:
    return ",".join(["%s"] * count)


def _escaped(text: str) -> str:
    """Of which ``%`` makes itself again."""
    return text.replace("%", "%%")
