"""Format a `StepRecord`, the figures of one measured step, as a line of a run file.

A line has the step and the counts of the model as JSON text. Packed numbers follow: the figures and
standard errors of all layers and of the model, and the histograms. `columns` says which is which.

Read `tabulate` and `format_step` first; `schema` describes the header, and `writing` writes the
lines to disk.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from altgrad.measurement.catalogue import STATED_ERRORS, STATED_TWIN_ERRORS, figure_keys
from altgrad.measurement.histogram import Histogram
from altgrad.measurement.numbers import Numbers
from altgrad.report.records.columns import Bins, Columns
from altgrad.report.records.kinds import number_as_json
from altgrad.report.records.packing import PACKED, pack_numbers

if TYPE_CHECKING:
    from altgrad.measurement.figures import Figures
    from altgrad.measurement.step_record import StepRecord


class StepNumbers(NamedTuple):
    """The numbers of an observed step, and what they are.

    Attributes:
        columns: The meaning of each number.
        numbers: The numbers, float64 (count).
        is_absent: True where a layer lacks a number that others have, bool (count).
    """

    columns: Columns
    numbers: Numbers
    is_absent: np.typing.NDArray[np.bool_]


class _Layout(NamedTuple):
    """The settings that decide which numbers a layer or the model has.

    Attributes:
        formats: Names of the judged formats.
        twins: Keys of the figures of twins, samples that are trained as a recipe says.
        is_sampled: True if figures of formats have standard errors, too.
    """

    formats: tuple[str, ...]
    twins: tuple[str, ...]
    is_sampled: bool

    @property
    def figures(self) -> tuple[str, ...]:
        """The keys of the figures."""
        return (*figure_keys(self.formats), *self.twins)

    @property
    def errors(self) -> tuple[str, ...]:
        """The keys of the standard errors: those of formats, then those of twins."""
        formats = self.formats if self.is_sampled else ()
        return (
            *(f"{metric}/{format}" for format in formats for metric in STATED_ERRORS),
            *(key for key in self.twins if key.partition("/")[0] in STATED_TWIN_ERRORS),
        )


def tabulate(record: StepRecord, weights: Histogram | None) -> StepNumbers:
    """Return all numbers of a step in a row, with what they are.

    Args:
        record: Figures of the step, of each layer and of the model.
        weights: Histogram of log2(abs(weight)) over the model; None for none.
    """
    rows = [*record.layers.values(), record.model]
    layouts = [_find_layout(each) for each in rows]
    histograms = _list_histograms(record.model, weights)
    columns = _make_columns(
        (*record.layers, None),
        tuple(dict.fromkeys([layouts[-1], *layouts])),
        tuple((key, Bins(each.first, len(each.counts))) for key, each in histograms.items()),
    )
    matrix = np.full((columns.width, len(rows)), np.nan)
    is_absent = np.ones(matrix.shape, np.bool_)
    for layout in dict.fromkeys(layouts):
        own = [row for row, each in enumerate(layouts) if each == layout]
        places = np.ix_(_find_places(columns, layout), own)
        matrix[places] = np.array([_list_numbers(rows[row], layout) for row in own]).T
        is_absent[places] = False
    counts = [count for each in histograms.values() for count in each.counts]
    return StepNumbers(
        columns,
        np.concatenate([matrix.ravel(), np.array(counts, np.float64)]),
        np.concatenate([is_absent.ravel(), np.zeros(len(counts), np.bool_)]),
    )


def format_step(
    step: int, record: StepRecord, skipped: Mapping[str, int], columns: int, numbers: StepNumbers
) -> bytes:
    """Return the line of one measured step.

    Args:
        step: Number of the step.
        record: Figures of the step, of each layer and of the model.
        skipped: Number of steps so far that moved no weight, by reason.
        columns: The number under which the columns are declared.
        numbers: The numbers of the step, as `tabulate` returns them.

    Returns:
        The line, which ends with a line feed.
    """
    packed = pack_numbers(numbers.numbers, numbers.is_absent)
    text = {
        "step": step,
        "elements": record.model.elements,
        "own_seconds": _shorten(record.own_seconds),
        "training_seconds": _shorten(record.training_seconds),
        "skipped": {str(reason): int(count) for reason, count in skipped.items()},
        "columns": columns,
        "crc32": zlib.crc32(packed),
    }
    return json.dumps(text).encode() + PACKED + packed + b"\n"


def _shorten(seconds: float) -> float | str | None:
    """Return a time with 8 significant digits, as a JSON value."""
    return number_as_json(float(f"{seconds:.8g}"))


def _find_layout(figures: Figures) -> _Layout:
    return _Layout(figures.formats, figures.twin_keys, figures.elements < figures.population)


def _list_histograms(model: Figures, weights: Histogram | None) -> dict[str, Histogram]:
    """Return the histograms of the model that go into the run file, by key."""
    keys = ("ulps", *(f"steps/{format}" for format in model.formats))
    own = {key: model.histogram(key) for key in keys}
    return own if weights is None else {**own, "weights": weights}


def _list_numbers(figures: Figures, layout: _Layout) -> list[float]:
    """Return figures, standard errors and the number of moved elements of a layer or the model."""
    numbers = [*figures.in_order()]
    if layout.twins:
        numbers += figures.twins_in_order()
    if layout.is_sampled:
        numbers += figures.errors_in_order(STATED_ERRORS)
    if layout.twins:
        numbers += figures.twins.errors_in_order(STATED_TWIN_ERRORS)
        numbers.append(figures.moved_elements)
    return numbers


@functools.lru_cache(maxsize=64)
def _make_columns(
    layers: tuple[str | None, ...],
    layouts: tuple[_Layout, ...],
    histograms: tuple[tuple[str, Bins], ...],
) -> Columns:
    """Return the columns of a step, with each figure and error that any of its layers has."""
    return Columns(
        layers,
        tuple(dict.fromkeys(key for layout in layouts for key in layout.figures)),
        tuple(dict.fromkeys(key for layout in layouts for key in layout.errors)),
        any(layout.twins for layout in layouts),
        dict(histograms),
    )


@functools.lru_cache(maxsize=256)
def _find_places(columns: Columns, layout: _Layout) -> Sequence[int]:
    """Return the columns of the numbers that `_list_numbers` returns, in the same order."""
    places = [columns.figure_places[key] for key in layout.figures]
    places += [columns.error_places[key] for key in layout.errors]
    return [*places, columns.width - 1] if layout.twins else places
