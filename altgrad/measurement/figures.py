"""`Figures`: the metrics of a layer or a model as plain numbers, each computed when it is read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from altgrad.measurement.catalogue import FORMAT_METRICS, LAYER_METRICS, figure_keys, get_metric
from altgrad.measurement.columns import FIRST_STEPS_OCTAVE
from altgrad.measurement.histogram import Histogram
from altgrad.measurement.step_table import Rows, StepTable


class Figures(Mapping[str, float]):
    """Metrics by key: ``metric`` and ``metric/format``; NaN where one has no value.

    Args:
        table: What they follow from, with other layers of the step.
        rows: Of the table, which are meant.
    """

    def __init__(self, table: StepTable, rows: Rows) -> None:
        self._table = table
        self._rows = rows
        self._formats = tuple(name for name in rows if name is not None)

    @property
    def formats(self) -> tuple[str, ...]:
        """Names of the formats."""
        return self._formats

    @property
    def population(self) -> int:
        """How many elements the figures stand for."""
        return self._table.counted[self._rows[None]][0]

    @property
    def elements(self) -> int:
        """How many were measured."""
        return self._table.counted[self._rows[None]][1]

    def __getitem__(self, key: str) -> float:
        """The value of a metric.

        Raises:
            KeyError: No metric of this name, or no such format here; says which there are.
        """
        name, format = self._parse(key)
        value = self._table.values(name)[self._table.place(format)][self._rows[format]]
        return math.nan if math.isnan(value) else value  # the one NaN that equals itself in a list

    def __iter__(self) -> Iterator[str]:
        """The keys, those of the parameter first."""
        return iter(figure_keys(self.formats))

    def __len__(self) -> int:
        """How many there are."""
        return len(LAYER_METRICS) + len(self.formats) * len(FORMAT_METRICS)

    def standard_error(self, key: str) -> float:
        """Of a share or the kept_update_ratio, as an estimate from sampled elements.

        0 where all elements were measured. NaN for other metrics, and where it cannot be trusted:
        fewer than 30 elements were measured, or the energy of the update is carried by fewer than
        30 of them (elements / energy_concentration). Even so a sample cannot see an outlier outside
        of it.

        References:
            Cochran, Sampling Techniques (1977), chapters 2 and 6: a ratio estimated from a
            (stratified) sample without replacement.

        Raises:
            KeyError: As for the value.
        """
        name, format = self._parse(key)
        return self._table.errors(name)[self._table.place(format)][self._rows[format]]

    def in_order(self) -> Sequence[float]:
        """All values, in the order of the keys; faster than one by one."""
        return self._joined(self._table.in_order, len(LAYER_METRICS), len(FORMAT_METRICS))

    def errors_in_order(self, metrics: tuple[str, ...]) -> Sequence[float]:
        """The standard errors of some metrics of a format, for one format after the other."""
        return self._joined(self._table.errors_in_order(metrics), 0, len(metrics))

    def _joined(self, of_rows: Sequence[Sequence[float]], first: int, each: int) -> Sequence[float]:
        """So many numbers of the parameter, and of each format."""
        row = of_rows[self._rows[None]]
        if self._formats == self._table.formats and len({*self._rows.values()}) == 1:
            return row
        numbers = [*row[:first]]
        for format in self._formats:
            start = first + self._table.place(format) * each
            numbers += of_rows[self._rows[format]][start : start + each]
        return numbers

    def histogram(self, key: str) -> Histogram:
        """Of the elements that moved; those that did not are not in it.

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
        return Histogram(first, tuple(self._table.histogram(name, row, format or None)))

    def _layers(self) -> list[tuple[int, tuple[str, ...]]]:
        """The rows of the layers that these are of, and the formats that each is judged for."""
        members, rows = self._table.members, self._rows
        return [
            (row, tuple(f for f in self.formats if row in members.get(rows[f], (rows[f],))))
            for row in members.get(rows[None], (rows[None],))
        ]

    def _parse(self, key: str) -> tuple[str, str | None]:
        name, _, format = key.partition("/")
        if name not in LAYER_METRICS and name not in FORMAT_METRICS:
            try:
                get_metric(name)
            except ValueError as error:
                raise KeyError(str(error)) from None
        if (name in FORMAT_METRICS) != bool(format) or (format or None) not in self._rows:
            expected = "metric" if name in LAYER_METRICS else "metric/format"
            raise KeyError(f"{key!r}: expected {expected}, with a format of {self.formats}")
        return name, format or None


def layer_figures(table: StepTable, row: int, formats: Iterable[str]) -> Figures:
    """Those of one layer, for some of the formats of the table."""
    return Figures(table, dict.fromkeys((None, *formats), row))


def model_figures(layers: Sequence[Figures]) -> Figures:
    """Those of layers together, each with the weight of all its elements.

    Raises:
        ValueError: There is no layer.
    """
    if not layers:
        raise ValueError("layers=[]: expected the figures of one or more layers")
    formats = tuple(dict.fromkeys(format for layer in layers for format in layer.formats))
    each = [(figures._table, *row) for figures in layers for row in figures._layers()]  # noqa: SLF001
    vectors = torch.stack([table.row_for(formats, row) for table, row, _ in each])
    return Figures(*StepTable.with_model(formats, vectors, [judged for _, _, judged in each]))


def tensor_figures(formats: Sequence[str], row: Tensor) -> Figures:
    """Figures of one tensor alone, from its row of sums and maxima; copies it to the host."""
    return layer_figures(StepTable(formats, row.cpu().unsqueeze(0)), 0, formats)
