"""`Figures`: the metrics of a layer or a model as plain numbers, computed when they are read."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from altgrad.measurement.catalogue import FORMAT_METRICS, LAYER_METRICS, figure_keys, get_metric
from altgrad.measurement.columns import FIRST_STEPS_OCTAVE
from altgrad.measurement.histogram import Histogram
from altgrad.measurement.step_table import RowsOfFormats, StepTable, error_columns


class Figures(Mapping[str, float]):
    """Metrics by key: ``metric`` and ``metric/format``; NaN where one has no value.

    Args:
        table: The table of a step.
        rows: The rows of the table that the figures are read from.
    """

    def __init__(self, table: StepTable, rows: RowsOfFormats) -> None:
        self._table = table
        self._rows = rows
        self._formats = tuple(name for name in rows if name is not None)

    @property
    def formats(self) -> tuple[str, ...]:
        """Return the names of the formats."""
        return self._formats

    @property
    def population(self) -> int:
        """Return how many elements the figures stand for."""
        return self._table.counted[self._rows[None]][0]

    @property
    def elements(self) -> int:
        """Return how many elements were measured."""
        return self._table.counted[self._rows[None]][1]

    def __getitem__(self, key: str) -> float:
        """Return the value of a metric.

        Raises:
            KeyError: No metric of this name, or no such format here; says which there are.
        """
        return self._table.figure(key, self._row_of(key))

    def __iter__(self) -> Iterator[str]:
        """Iterate over the keys, those of the parameter first."""
        return iter(figure_keys(self.formats))

    def __len__(self) -> int:
        """Return the number of keys."""
        return len(LAYER_METRICS) + len(self.formats) * len(FORMAT_METRICS)

    def standard_error(self, key: str) -> float:
        """Return the standard error of a share or kept_update_ratio that a sample estimates.

        0 where all elements were measured. NaN for other metrics, and where it cannot be trusted:
        fewer than 30 elements were measured, or the energy of the update is carried by fewer than
        30 of them (elements / energy_concentration). Even so a sample cannot see an outlier outside
        of it.

        References:
            Cochran, Sampling Techniques (1977), chapters 2 and 6: a ratio estimated from a
            (stratified) sample without replacement.

        Raises:
            KeyError: No metric of this name, or no such format here.
        """
        return self._table.error(key, self._row_of(key))

    def in_order(self) -> Sequence[float]:
        """Return all values in the order of the keys; faster than one by one."""
        figures, rows = self._table.figures, self._rows
        if self._formats == self._table.formats and len({*rows.values()}) == 1:
            return figures[rows[None]]
        numbers = figures[rows[None]][: len(LAYER_METRICS)]
        for format in self._formats:
            start = len(LAYER_METRICS) + self._table.formats.index(format) * len(FORMAT_METRICS)
            numbers += figures[rows[format]][start : start + len(FORMAT_METRICS)]
        return numbers

    def errors_in_order(self, metrics: tuple[str, ...]) -> Sequence[float]:
        """Return the standard errors of some shares, for one format after the other.

        Args:
            metrics: Names of metrics of a format that have a standard error.
        """
        errors, rows = self._table.errors, self._rows
        places = _error_places(self._table.formats, self._formats, metrics)
        return [errors[rows[format]][column] for format, column in places]

    def histogram(self, key: str) -> Histogram:
        """Return how far the elements moved, in octaves; those that did not move are not counted.

        Args:
            key: ``"ulps"``, by how many units in the last place of the weights' own dtype, or
                ``"steps/{format}"``, by which multiple of the format's stiffness; an update of less
                than half of that, an octave below −1, stalls on a weight that is on the grid.

        Raises:
            KeyError: No such histogram, or no such format here; says which there are.
        """
        name, _, format = key.partition("/")
        if key != "ulps" and (name != "steps" or format not in self.formats):
            expected = ("ulps", *(f"steps/{each}" for each in self.formats))
            raise KeyError(f"{key!r}: expected one of {expected}")
        first = 0 if key == "ulps" else FIRST_STEPS_OCTAVE
        row = self._rows[format or None]
        return Histogram(first, tuple(self._table.counts(format or None, row)))

    def layer_vectors(self, formats: Sequence[str]) -> list[tuple[Tensor, tuple[str, ...]]]:
        """Return the sums that the figures follow from, of each layer that they are of.

        Args:
            formats: Names of the formats that the vectors are to have.

        Returns:
            For each layer its vector, float64, as `altgrad.measurement.columns` describes it, and
            for which formats it is judged.
        """
        members, rows = self._table.members, self._rows
        return [
            (
                self._table.row_for(formats, row),
                tuple(f for f in self.formats if row in members.get(rows[f], (rows[f],))),
            )
            for row in members.get(rows[None], (rows[None],))
        ]

    def _row_of(self, key: str) -> int:
        """Return the row of the table in which the figure of a key is, or raise KeyError."""
        name, _, format = key.partition("/")
        row = self._rows.get(format or None)
        if row is not None and key in self._table.columns:
            return row
        try:
            get_metric(name)
        except ValueError as error:
            raise KeyError(str(error)) from None
        expected = "metric" if name in LAYER_METRICS else "metric/format"
        raise KeyError(f"{key!r}: expected {expected}, with a format of {self.formats}")


@functools.lru_cache(maxsize=256)
def _error_places(
    known: tuple[str, ...], formats: tuple[str, ...], metrics: tuple[str, ...]
) -> tuple[tuple[str, int], ...]:
    """Return the formats, and for each metric of a format its column in a row of errors."""
    columns = error_columns(known)
    return tuple((each, columns[f"{name}/{each}"]) for each in formats for name in metrics)


def layer_figures(table: StepTable, row: int, formats: Iterable[str]) -> Figures:
    """Return the figures of one layer, for some of the formats of the table."""
    return Figures(table, dict.fromkeys((None, *formats), row))


def model_figures(layers: Sequence[Figures]) -> Figures:
    """Return the figures of layers together, each with the weight of all its elements.

    Raises:
        ValueError: There is no layer.
    """
    if not layers:
        raise ValueError("layers=[]: expected the figures of one or more layers")
    formats = tuple(dict.fromkeys(format for layer in layers for format in layer.formats))
    each = [pair for figures in layers for pair in figures.layer_vectors(formats)]
    vectors, judged = zip(*each, strict=True)
    return Figures(*StepTable.with_model(formats, torch.stack(vectors), judged))


def tensor_figures(formats: Sequence[str], row: Tensor) -> Figures:
    """Return the figures of one tensor from its row of sums and maxima, copied to the host."""
    return layer_figures(StepTable(formats, row.cpu().unsqueeze(0)), 0, formats)
