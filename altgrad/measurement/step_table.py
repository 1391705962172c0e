"""`StepTable`: the sums of all layers in one step, and the figures that follow from them.

Each layer is a row, and the model is one row more: the sum of the layers, each weighted by its
number of elements. The model's figures for a format are over the layers that have the format. If
layers have different formats, the model has several rows therefore, one for each set of layers.

Read `metrics` and `standard_errors` first, which are applied to all rows at once; `figures` comes
next and reads single rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from altgrad.measurement.catalogue import (
    FORMAT_METRICS,
    LAYER_METRICS,
    STATED_ERRORS,
    figure_keys,
)
from altgrad.measurement.columns import (
    CLUSTERS,
    ELEMENTS,
    FORMAT_ESTIMATES,
    FORMAT_MAXIMA,
    FORMAT_SUMS,
    LAYER_ESTIMATES,
    MAXIMA,
    POPULATION,
    SUMS,
    max_count,
    sum_count,
)
from altgrad.measurement.histogram import OCTAVES
from altgrad.measurement.metrics import FORMULAS, quiet
from altgrad.measurement.numbers import Numbers
from altgrad.measurement.standard_errors import EstimateSums, estimate_sums, standard_errors

FormatRows = Mapping[str | None, int]
"""The row of a `StepTable` to read for each format; under None, for metrics without a format."""

_ESTIMATES = (*LAYER_ESTIMATES, *FORMAT_ESTIMATES)
_HISTOGRAMS = {"ulps": slice(0, 1), "weights": slice(1, 2), "steps": slice(2, None)}
"""The position of each histogram along axis 1 of `StepTable._octaves`; formats are side by side."""


class StepTable:
    """A table of the sums and maxima of layers in a step, with the figures that follow from them.

    A row is a layer or a model. Figures (values of metrics), their standard errors and histograms
    are computed once and for all rows, when one of them is first read.

    Args:
        formats: Names of the formats, in the order of their columns.
        vectors: Sums and maxima of each row, float64 (rows, columns) on the host, in the order of
            `altgrad.measurement.columns`.
        members: For each row of a model, the rows of the layers that form the model.

    Attributes:
        formats: The `formats` argument.
        vectors: The `vectors` argument.
        members: The `members` argument; empty by default.
        columns: Position of each key, ``metric`` or ``metric/format``, in the rows of `figures`.
    """

    def __init__(
        self,
        formats: Sequence[str],
        vectors: Numbers,
        members: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        self.formats = tuple(formats)
        self.vectors = vectors
        self.members = members or {}
        self.columns = _figure_columns(self.formats)
        self._places = _places(len(self.formats))
        self._evaluated: dict[str, Numbers] = {}  # of each metric that was read, in all rows
        self._errors: dict[str, Numbers] = {}

    @classmethod
    def with_model(
        cls, formats: Sequence[str], vectors: Numbers, judged: Sequence[Collection[str]]
    ) -> tuple[StepTable, FormatRows]:
        """Make a table of the sums of layers in a step, and of the model that they form.

        The model's figures for a format are over the layers that have figures for the format.

        Args:
            formats: Names of the formats, in the order of their columns.
            vectors: Sums and maxima of the layers, float64 (layers, columns) on the host.
            judged: For each layer, the names of the formats that it has figures for.

        Returns:
            The table, and its rows to read for the model: one for each format, and under None one
            for metrics without a format.
        """
        # One row for each distinct set of layers; most models have a single set.
        rows: dict[str | None, int] = {}
        members: dict[tuple[int, ...], int] = {}
        for format in (None, *formats):
            layers = tuple(k for k, own in enumerate(judged) if format is None or format in own)
            if layers:
                rows[format] = members.setdefault(layers, len(vectors) + len(members))
        merged = [_merged(vectors, layers, sum_count(len(formats))) for layers in members]
        by_row = {row: layers for layers, row in members.items()}
        return cls(formats, np.concatenate((vectors, *merged)), by_row), rows

    def sum(self, name: str) -> Numbers:
        """Return a sum over elements by name, float64 (rows, 1 or formats).

        A row is a layer or a model. SUMS and FORMAT_SUMS in `altgrad.measurement.columns` list the
        names.
        """
        return self.vectors[:, self._places[name]]

    def max(self, name: str) -> Numbers:
        """Return a maximum over elements by name, float64 (rows, 1 or formats).

        A row is a layer or a model. MAXIMA and FORMAT_MAXIMA in `altgrad.measurement.columns` list
        the names.
        """
        return self.vectors[:, self._places[f"max {name}"]]

    def histogram(self, name: str) -> Numbers:
        """Return the number of elements in each octave, from a power of two up to the next.

        Args:
            name: ``"ulps"``, ``"weights"`` or ``"steps"``, as `Figures.histogram` explains them.

        Returns:
            Counts, float64 (64, 1 or formats, rows), a row for each layer or model.
        """
        return self._octaves[:, _HISTOGRAMS[name]]

    def counts(self, key: str, row: int) -> list[float]:
        """Return the 64 counts of a histogram of one layer or model.

        Args:
            key: ``"ulps"``, ``"weights"`` or ``"steps/{format}"``.
            row: Row of the layer or model.
        """
        name, _, format = key.partition("/")
        place = self.formats.index(format) if format else 0
        counts: list[float] = self.histogram(name)[:, place, row].tolist()
        return counts

    def figure(self, key: str, row: int) -> float:
        """Return one figure, the value of a metric, of a layer or model; NaN if it has no value.

        Args:
            key: ``metric`` or ``metric/format``.
            row: Row of the layer or model.
        """
        value = self.read_column(key)[row].item()
        # math.nan itself: lists and tuples compare by identity first, so that equal figures compare
        # as equal also if they are NaN.
        return math.nan if math.isnan(value) else value

    def read_column(self, key: str) -> Numbers:
        """Return the figures of all layers and models by a key, float64 (rows).

        Args:
            key: ``metric`` or ``metric/format``.
        """
        metric, place = self._find_place(key)
        return self.evaluate(metric)[:, place]

    def evaluate(self, metric: str) -> Numbers:
        """Return a metric of all layers and models, float64 (rows, 1 or formats).

        A metric is computed when it is first read, for all rows and formats at once. A monitor may
        read a single one of a step, which takes a tenth of the time of all.
        """
        if metric not in self._evaluated:
            with quiet():
                self._evaluated[metric] = FORMULAS[metric](self)
        return self._evaluated[metric]

    @functools.cached_property
    def figures(self) -> Numbers:
        """The values of all metrics by row, a layer or model, in the order of `columns`."""
        layer_values = [self.evaluate(name) for name in LAYER_METRICS]
        return _by_key(layer_values, [self.evaluate(name) for name in FORMAT_METRICS])

    def error(self, key: str, row: int) -> float:
        """Return the standard error of a figure (value of a metric); NaN if its metric has none.

        Args:
            key: ``metric`` or ``metric/format``.
            row: Row of the layer or model.
        """
        return float(self.read_errors(key)[row])

    def read_errors(self, key: str) -> Numbers:
        """Return the standard errors of all layers and models by a key, float64 (rows).

        They are NaN for a metric without standard errors.

        Args:
            key: ``metric`` or ``metric/format``.
        """
        metric, place = self._find_place(key)
        if metric not in _ESTIMATES:
            return np.full(len(self.vectors), np.nan)
        return self.estimate_errors(metric)[:, place]

    def estimate_errors(self, metric: str) -> Numbers:
        """Return the standard errors of a metric in all rows, float64 (rows, 1 or formats).

        The errors of `STATED_ERRORS` are computed together, and those of all other metrics.

        Args:
            metric: Name of a metric that has standard errors.
        """
        if metric not in self._errors:
            is_stated = metric in STATED_ERRORS
            names = [name for name in _ESTIMATES if (name in STATED_ERRORS) is is_stated]
            self._errors |= zip(names, self._estimate_errors(names), strict=True)
        return self._errors[metric]

    def _estimate_errors(self, metrics: Sequence[str]) -> list[Numbers]:
        """Compute the standard errors of metrics, float64 (rows, 1 or formats) each."""
        widths = [1 if name in LAYER_METRICS else len(self.formats) for name in metrics]
        each = [
            estimate_sums(name, self, width) for name, width in zip(metrics, widths, strict=True)
        ]
        sums = EstimateSums(*(np.concatenate(part, axis=1) for part in zip(*each, strict=True)))
        counted = self.vectors[:, [POPULATION, ELEMENTS, CLUSTERS]]
        errors = standard_errors(sums, counted, self.members)
        return np.split(errors, np.cumsum(widths)[:-1], axis=1)

    def _find_place(self, key: str) -> tuple[str, int]:
        """Return the metric of a key, and the place of its format in the columns of the metric."""
        metric, _, format = key.partition("/")
        return metric, self.formats.index(format) if format else 0

    @functools.cached_property
    def counted(self) -> list[list[int]]:
        """The number of elements, and the number of measured elements, of each layer or model."""
        pairs = self.vectors[:, [POPULATION, ELEMENTS]].tolist()
        counted = [[round(population), round(elements)] for population, elements in pairs]
        # A model's sums are weighted to stand for all elements, so that both of its columns have
        # their number. The measured elements are counted in its layers.
        for row, layers in self.members.items():
            counted[row][1] = sum(counted[layer][1] for layer in layers)
        return counted

    def convert_row(self, formats: Sequence[str], row: int) -> Numbers:
        """Return the sums and maxima of a layer or model, arranged for other formats.

        Args:
            formats: Names of the formats of the result, in the order of their columns.
            row: Row of the layer or model.

        Returns:
            Sums and maxima, float64 (columns) in the order of `altgrad.measurement.columns`, with
            sums of 0 and maxima of −inf for formats that this table does not have.
        """
        vector: Numbers = self.vectors[row]
        if self.formats == tuple(formats):
            return vector
        middle = sum_count(len(self.formats))
        parts = [vector[: len(SUMS)], vector[middle : middle + len(MAXIMA)]]
        sums, maxima = parts[:1], parts[1:]
        for format in formats:
            if format in self.formats:
                position = self.formats.index(format)
                sums.append(vector[sum_count(position) : sum_count(position + 1)])
                first, stop = max_count(position), max_count(position + 1)
                maxima.append(vector[middle + first : middle + stop])
            else:
                sums.append(np.zeros(len(FORMAT_SUMS)))
                maxima.append(np.full(len(FORMAT_MAXIMA), -np.inf))
        return np.concatenate((*sums, *maxima))

    @functools.cached_property
    def _octaves(self) -> Numbers:
        """The histograms of layers and models, float64 (64, 2 + formats, rows), as in _HISTOGRAMS.

        A vector has the counts of 63 octaves. The count of the first octave is the number of
        elements in the histogram minus the sum of these.
        """
        formats, stop, rows = len(self.formats), sum_count(len(self.formats)), len(self.vectors)
        layers = self.vectors[:, len(SUMS) - 2 * (OCTAVES - 1) : len(SUMS)]
        layers = layers.reshape(rows, 2, OCTAVES - 1)
        steps = self.vectors[:, len(SUMS) : stop].reshape(rows, formats, len(FORMAT_SUMS))
        octaves = np.concatenate((layers, steps[:, :, 1 - OCTAVES :]), axis=1).transpose(2, 1, 0)
        counted = [self.sum(name) for name in ("moved", "nonzero_weights", "judged")]
        # Weighted counts are not whole numbers, and their rounding may leave a little less than 0.
        first = np.maximum(np.concatenate(counted, axis=1).T - octaves.sum(0), 0)
        return np.concatenate((first[None], octaves))


def _by_key(layer_values: Sequence[Numbers], format_values: Sequence[Numbers]) -> Numbers:
    """Join the values of metrics: those without a format, then those of each format in turn.

    Args:
        layer_values: Figures of each metric without a format, float64 (rows, 1) each.
        format_values: Figures of each metric of a format, float64 (rows, formats) each.

    Returns:
        Figures, float64 (rows, keys).
    """
    rows, formats = format_values[0].shape
    by_format = np.stack(format_values, axis=2).reshape(rows, formats * len(format_values))
    return np.concatenate((*layer_values, by_format), axis=1)


@functools.cache
def _places(formats: int) -> Mapping[str, slice]:
    """Return the slice of a layer's vector with each sum, by name; of maxima by ``"max NAME"``."""
    # Formats follow each other, so that one sum for all formats is a slice with a step:
    #   sums of the layer | a b c (format 0) | a b c (format 1)   ->   b is at [first + 1 :: 3]
    middle = sum_count(formats)
    places: dict[str, slice] = {}
    for prefix, start, stop, names, format_names in (
        ("", 0, middle, SUMS, FORMAT_SUMS),
        ("max ", middle, middle + max_count(formats), MAXIMA, FORMAT_MAXIMA),
    ):
        first, each = start + len(names), len(format_names)
        places |= {prefix + n: slice(start + k, start + k + 1) for k, n in enumerate(names)}
        places |= {prefix + n: slice(first + k, stop, each) for k, n in enumerate(format_names)}
    return places


@functools.lru_cache(maxsize=64)
def _figure_columns(formats: tuple[str, ...]) -> Mapping[str, int]:
    """Return the position of each key, ``metric`` or ``metric/format``, in `StepTable.figures`."""
    return {key: column for column, key in enumerate(figure_keys(formats))}


def _merged(vectors: Numbers, layers: Sequence[int], middle: int) -> Numbers:
    """Merge the sums and maxima of layers into those of the model that they form.

    Sums of a sampled layer are multiplied by its number of elements over that of its sample, so
    that they stand for the whole layer.

    Args:
        vectors: Sums and maxima of all layers, float64 (layers, columns).
        layers: Rows of the layers to merge.
        middle: Number of columns that are sums. Maxima follow.

    Returns:
        The merged vector, float64 (1, columns).
    """
    chosen = vectors if len(layers) == len(vectors) else vectors[[*layers]]
    weights = chosen[:, POPULATION] / np.maximum(chosen[:, ELEMENTS], 1)
    # A product and a sum, and no matrix product: on some processors that adds columns up in
    # different orders, and the difference of two equal columns would be 3e-16 instead of 0.
    sums = (weights[:, None] * chosen[:, :middle]).sum(0)
    # The weighted number of measured elements is the number of all; POPULATION itself was weighted.
    sums[POPULATION] = sums[ELEMENTS]
    return np.concatenate((sums, chosen[:, middle:].max(0)))[None]
