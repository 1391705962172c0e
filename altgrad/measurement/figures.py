"""`Figures`: the metrics of a layer or a model as plain numbers, computed when they are read.

Read `step_table` first, which computes the figures of all layers at once, and `twin_figures`.
`step_record` comes next: it holds the figures of each layer, and of the model.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from torch import Tensor

from altgrad.measurement.catalogue import FORMAT_METRICS, LAYER_METRICS, figure_keys, get_metric
from altgrad.measurement.histogram import FIRST_STEPS_OCTAVE, FIRST_WEIGHTS_OCTAVE, Histogram
from altgrad.measurement.intervals import find_interval
from altgrad.measurement.numbers import Numbers
from altgrad.measurement.step_table import FormatRows, StepTable, error_columns
from altgrad.measurement.twin_figures import NO_TWINS, TwinFigures, merge_twins

_FIRST_OCTAVES = {"weights": FIRST_WEIGHTS_OCTAVE, "ulps": 0, "steps": FIRST_STEPS_OCTAVE}


class Figures(Mapping[str, float]):
    """A mapping of figures by key: ``metric``, ``metric/format``, and ``metric/recipe`` of twins.

    A figure is NaN if it has no value. `altgrad.measurement.catalogue` lists all metrics.

    Args:
        table: The table of a step.
        rows: The row of the table for each format, and for the layer or model itself under None.
        twins: The figures of twins.
    """

    def __init__(self, table: StepTable, rows: FormatRows, twins: TwinFigures = NO_TWINS) -> None:
        self._table = table
        self._rows = rows
        self._twins = twins
        self._formats = tuple(name for name in rows if name is not None)

    @property
    def formats(self) -> tuple[str, ...]:
        """The names of the formats."""
        return self._formats

    @property
    def recipes(self) -> tuple[str, ...]:
        """The names of the recipes whose twins were measured; empty without twins."""
        return self._twins.recipes

    @property
    def twins(self) -> TwinFigures:
        """The figures of twins alone."""
        return self._twins

    @property
    def twin_keys(self) -> tuple[str, ...]:
        """The keys of the figures of twins in their order: ``metric/recipe``."""
        return self._twins.keys_in_order

    @property
    def moved_elements(self) -> float:
        """The number of elements in the sample of twins that fp32 has moved; NaN without twins."""
        return self._twins.moved_elements

    @property
    def population(self) -> int:
        """The number of elements of the whole layer or model, measured or not."""
        return self._table.counted[self._rows[None]][0]

    @property
    def elements(self) -> int:
        """The number of elements that were measured: all, or the sample."""
        return self._table.counted[self._rows[None]][1]

    def __getitem__(self, key: str) -> float:
        """Return one figure.

        Args:
            key: ``metric``, ``metric/format`` or ``metric/recipe``.

        Raises:
            KeyError: The metric, the format or the recipe is unknown; the message lists those that
                are known.
        """
        row = self._find_row(key)
        return self._twins[key] if row is None else self._table.figure(key, row)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the keys: those of the layer, of each format, and of each recipe."""
        return iter((*figure_keys(self.formats), *self.twin_keys))

    def __len__(self) -> int:
        """Return the number of keys."""
        return len(LAYER_METRICS) + len(self.formats) * len(FORMAT_METRICS) + len(self._twins)

    def standard_error(self, key: str) -> float:
        """Return the standard error of a figure that a sample estimates.

        Shares, kept_update_ratio and most metrics of twins have a standard error. It is half
        of the width of `interval` over 1.96, and 0 if all elements were measured. A sample cannot
        see an outlier outside of the sample; neither can its standard error.

        Args:
            key: ``metric``, ``metric/format`` or ``metric/recipe``.

        Returns:
            The standard error, in the unit of the figure. NaN for other metrics. NaN for
            kept_update_ratio if fewer than 100 elements of the sample moved, or fewer than 15 carry
            the energy of the update (elements / energy_concentration). The same holds for the
            ratios of twins that are weighed by energy. If blocks were drawn, NaN if fewer than 5
            clusters of blocks carry the ratio.

        Raises:
            KeyError: The metric, the format or the recipe is unknown.

        References:
            Cochran, Sampling Techniques (1977), chapters 2, 5, 6 and 9: a ratio estimated from a
            (stratified) sample of elements or clusters without replacement.
        """
        row = self._find_row(key)
        return self._twins.standard_error(key) if row is None else self._table.error(key, row)

    def interval(self, key: str) -> tuple[float, float]:
        """Return the interval of 95 % around a figure that a sample estimates.

        About 95 of 100 samples have an interval that contains the figure of all elements. That of
        a share is Wilson's, and has a width at 0 and 1, too.

        Args:
            key: ``metric``, ``metric/format`` or ``metric/recipe``.

        Returns:
            The lower and the upper end. Both equal the figure if all elements were measured, and
            are NaN where `standard_error` is.

        Raises:
            KeyError: The metric, the format or the recipe is unknown.
        """
        return find_interval(key.partition("/")[0], self[key], self.standard_error(key))

    def in_order(self) -> Sequence[float]:
        """Return the figures without those of twins, in the order of keys, faster than singly."""
        # Usually, a row of the table has the same formats, and is the result as it stands.
        figures, rows = self._table.figures, self._rows
        if self._formats == self._table.formats and len({*rows.values()}) == 1:
            return figures[rows[None]]
        numbers = figures[rows[None]][: len(LAYER_METRICS)]
        for format in self._formats:
            start = len(LAYER_METRICS) + self._table.formats.index(format) * len(FORMAT_METRICS)
            numbers += figures[rows[format]][start : start + len(FORMAT_METRICS)]
        return numbers

    def twins_in_order(self) -> Sequence[float]:
        """Return all figures of twins in the order of `twin_keys`, faster than one by one."""
        return self._twins.in_order()

    def errors_in_order(self, metrics: tuple[str, ...]) -> Sequence[float]:
        """Return the standard errors of some metrics, for one format after the other.

        Args:
            metrics: Names of metrics of a format that have a standard error.

        Returns:
            For each format the standard error of each metric.
        """
        errors, rows = self._table.errors, self._rows
        places = _error_places(self._table.formats, self._formats, metrics)
        return [errors[rows[format]][column] for format, column in places]

    def histogram(self, key: str) -> Histogram:
        """Return a histogram by octaves.

        Args:
            key: ``"weights"``, ``"ulps"`` or ``"steps/{format}"``. The first is of abs(weight)
                before the step, over the weights other than 0. The others are of abs(update), over
                the elements that moved, in units of a spacing: for ``"ulps"`` that of the weights'
                dtype, for ``"steps/{format}"`` that of the format. A weight on the grid stalls if
                its update is below half of the format's spacing: an octave below −1.

        Raises:
            KeyError: The histogram or the format is unknown; the message lists those that are
                known.
        """
        name, _, format = key.partition("/")
        expected = ("weights", "ulps", *(f"steps/{each}" for each in self.formats))
        if key not in expected:
            raise KeyError(f"{key!r}: expected one of {expected}")
        row = self._rows[format or None]
        return Histogram(_FIRST_OCTAVES[name], tuple(self._table.counts(key, row)))

    def layer_vectors(self, formats: Sequence[str]) -> list[tuple[Numbers, tuple[str, ...]]]:
        """Return the sums and maxima of each layer, from which the figures are computed.

        Args:
            formats: Names of the formats that the vectors shall have.

        Returns:
            For each layer its vector, float64 (columns) in the order of
            `altgrad.measurement.columns`, and the names of the formats that it is judged for.
        """
        members, rows = self._table.members, self._rows
        return [
            (
                self._table.convert_row(formats, row),
                tuple(f for f in self.formats if row in members.get(rows[f], (rows[f],))),
            )
            for row in members.get(rows[None], (rows[None],))
        ]

    def _find_row(self, key: str) -> int | None:
        """Find the row of the table that holds the figure of a key; None for one of twins."""
        name, _, format = key.partition("/")
        # The catalogue is asked for the message of an error alone: a run reads many figures.
        row = self._rows.get(format or None)
        if row is not None and key in self._table.columns:
            return row
        if key in self._twins:
            return None
        try:
            get_metric(name)
        except ValueError as error:
            raise KeyError(str(error)) from None
        if name in FORMAT_METRICS:
            expected = f"metric/format, with a format of {self.formats}"
        else:
            expected = "metric" if name in LAYER_METRICS else self._twins.describe_keys(name)
        raise KeyError(f"{key!r}: expected {expected}")


@functools.lru_cache(maxsize=256)  # one entry for each set of formats that a layer is judged for
def _error_places(
    known: tuple[str, ...], formats: tuple[str, ...], metrics: tuple[str, ...]
) -> tuple[tuple[str, int], ...]:
    """Find the columns of a table that hold the standard error of each metric and format.

    Args:
        known: Names of the formats of the table.
        formats: Names of the formats to find.
        metrics: Names of the metrics to find.

    Returns:
        Pairs of a format and a column of the table's errors, for each format and metric.
    """
    columns = error_columns(known)
    return tuple((each, columns[f"{name}/{each}"]) for each in formats for name in metrics)


def layer_figures(
    table: StepTable, row: int, formats: Iterable[str], twins: TwinFigures = NO_TWINS
) -> Figures:
    """Return the figures of one layer.

    Args:
        table: The table of a step.
        row: Row of the layer in the table.
        formats: Names of formats of the table, those that the layer is judged for.
        twins: The figures of the layer's twins.
    """
    return Figures(table, dict.fromkeys((None, *formats), row), twins)


def model_figures(layers: Sequence[Figures]) -> Figures:
    """Combine figures of layers to those of the model that the layers form.

    Each layer is weighted by its number of elements, also if only a sample was measured.

    Args:
        layers: Figures of one or more layers or models, of one step or of several.

    Returns:
        The figures, for each format that one of the layers is judged for.

    Raises:
        ValueError: `layers` is empty.
    """
    if not layers:
        raise ValueError("layers=[]: expected Figures of one or more layers")
    formats = tuple(dict.fromkeys(format for layer in layers for format in layer.formats))
    each = [pair for figures in layers for pair in figures.layer_vectors(formats)]
    vectors, judged = zip(*each, strict=True)
    table, rows = StepTable.with_model(formats, np.stack(vectors), judged)
    return Figures(table, rows, merge_twins([layer.twins for layer in layers]))


def tensor_figures(formats: Sequence[str], row: Tensor) -> Figures:
    """Return the figures of one tensor.

    Args:
        formats: Names of the formats.
        row: Sums and maxima of the tensor, float64 (columns) on any device; copied to the host.
    """
    return vector_figures(formats, row.cpu().numpy())


def vector_figures(formats: Sequence[str], vector: Numbers) -> Figures:
    """Return the figures of one vector.

    Args:
        formats: Names of the formats.
        vector: Sums and maxima, float64 (columns).
    """
    return layer_figures(StepTable(formats, vector[None]), 0, formats)
