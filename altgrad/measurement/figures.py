"""`Figures`: the metrics of a layer or a model as plain numbers, computed when they are read.

Read `step_table` first, which computes the figures of all layers at once, and `twin_figures`, which
does so for twins.

`figure_columns` comes next, which reads the figures of all layers of a step at once; `step_record`
holds the figures of each layer, and of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from altgrad._messages import format_count
from altgrad.measurement.catalogue import FORMAT_METRICS, LAYER_METRICS, figure_keys, get_metric
from altgrad.measurement.histogram import FIRST_STEPS_OCTAVE, FIRST_WEIGHTS_OCTAVE, Histogram
from altgrad.measurement.intervals import find_interval
from altgrad.measurement.notebook import write_table
from altgrad.measurement.numbers import Numbers
from altgrad.measurement.step_table import FormatRows, StepTable
from altgrad.measurement.twin_figures import NO_TWINS, TwinFigures, merge_twins

_FIRST_OCTAVES = {"weights": FIRST_WEIGHTS_OCTAVE, "ulps": 0, "steps": FIRST_STEPS_OCTAVE}


class Figures(Mapping[str, float]):
    """A mapping of figures, the values of metrics, by key: ``metric`` or ``metric/format``.

    A key of twins is ``metric/recipe``. A twin is a sample of a layer that is stored and stepped as
    a recipe says.

    It holds the figures of one layer, or those of a model. A figure is NaN if it has no value.
    `altgrad.measurement.catalogue` lists all metrics.

    Args:
        table: The table with the sums of all layers in one step.
        rows: The row of the table to read for each format, by name; under None, the row for metrics
            without a format. A layer has a single row; a model may have several.
        twins: The figures of the twins of the same layer or model.
    """

    def __init__(self, table: StepTable, rows: FormatRows, twins: TwinFigures = NO_TWINS) -> None:
        self._table = table
        self._rows = rows
        self._twins = twins
        self._formats = tuple(name for name in rows if name is not None)

    @property
    def formats(self) -> tuple[str, ...]:
        """The names of the number formats for which there are figures (values of metrics)."""
        return self._formats

    @property
    def table(self) -> StepTable:
        """The table that computes these figures, and those of all other layers of the step."""
        return self._table

    @property
    def rows(self) -> FormatRows:
        """The row of `table` with the figures of each format; under None, of metrics without."""
        return self._rows

    @property
    def recipes(self) -> tuple[str, ...]:
        """The names of the recipes by which twins, samples of layers, were stored and stepped."""
        return self._twins.recipes

    @property
    def twins(self) -> TwinFigures:
        """The figures of twins alone: of samples that are stored and stepped as recipes say."""
        return self._twins

    @property
    def twin_keys(self) -> tuple[str, ...]:
        """The keys of the figures of twins, ``metric/recipe``, in the order of iteration.

        A twin is a sample of a layer that is stored and stepped as a recipe says.
        """
        return self._twins.keys_in_order

    @property
    def moved_elements(self) -> float:
        """The number of sampled elements that the twin in fp32 has moved; NaN without twins.

        A twin steps a sample of each layer as a recipe says. The twin in fp32 has float32 weights
        and states, and the others are compared with it.
        """
        return self._twins.moved_elements

    @property
    def population(self) -> int:
        """The number of elements of the whole layer or model, measured or not."""
        return self._table.counted[self._rows[None]][0]

    @property
    def elements(self) -> int:
        """The number of elements that were measured: all, or a sample."""
        return self._table.counted[self._rows[None]][1]

    def __getitem__(self, key: str) -> float:
        """Return one figure, the value of a metric; NaN if it has no value.

        Args:
            key: ``metric``, ``metric/format`` or ``metric/recipe``.

        Raises:
            KeyError: The metric, the format or the recipe is unknown; the message lists those that
                are known.
        """
        row = self._find_row(key)
        return self._twins[key] if row is None else self._table.figure(key, row)

    def __contains__(self, key: object) -> bool:
        """Return True if there is a figure (value of a metric) with this key."""
        text = str(key)
        is_own = text in self._table.columns and (text.partition("/")[2] or None) in self._rows
        return is_own or key in self._twins

    def get(self, key: str, default: Any = None) -> Any:
        """Return one figure, the value of a metric, or `default` if there is none with this key.

        Args:
            key: ``metric``, ``metric/format`` or ``metric/recipe``.
            default: What is returned for another key.
        """
        return self[key] if key in self else default  # noqa: SIM401 - that is this method itself

    def __iter__(self) -> Iterator[str]:
        """Iterate over the keys: ``metric``, then ``metric/format``, then ``metric/recipe``."""
        return iter((*figure_keys(self.formats), *self.twin_keys))

    def __len__(self) -> int:
        """Return the number of keys."""
        return len(LAYER_METRICS) + len(self.formats) * len(FORMAT_METRICS) + len(self._twins)

    def __repr__(self) -> str:
        """Return a line with the number of measured elements, the formats and the recipes."""
        measured = f"{self.elements:,} of {format_count(self.population, 'element')}"
        names = {"formats": self.formats, "recipes": self.recipes}
        parts = [f"{noun}: {', '.join(each)}" for noun, each in names.items() if each]
        return f"Figures({'; '.join([measured, *parts])})"

    def _repr_html_(self) -> str:
        """Return tables of all figures for a notebook: of the layer, of formats, of recipes."""
        parts: list[dict[str, float]] = [
            {key: self[key] for key in LAYER_METRICS},
            {key: self[key] for key in figure_keys(self.formats) if key not in LAYER_METRICS},
            dict(self.twins),
        ]
        return "".join(map(write_table, parts))

    def standard_error(self, key: str) -> float:
        """Return the standard error of a figure that a sample estimates.

        A figure is the value of a metric. Shares of elements, kept_update_ratio and most metrics of
        twins have a standard error, with the unit of the figure. It is half of the width of
        `interval`, divided by 1.96, and 0 if all elements were measured. It knows nothing of an
        outlier that is not in the sample.

        Args:
            key: ``metric``, ``metric/format`` or ``metric/recipe``.

        Returns:
            The standard error. NaN for metrics without one, and where the sample is too small:

            - kept_update_ratio, and ratios of twins (samples stepped as recipes say) that are no
                shares, need 100 elements that moved. Large updates count for more in these ratios:
                the number of elements divided by energy_concentration must be 15 or more.
            - If blocks of neighbours were drawn, 5 clusters of blocks are needed instead of the 15,
                for shares, too.

        Raises:
            KeyError: The metric, the format or the recipe is unknown.

        References:
            Cochran, Sampling Techniques (1977), chapters 2, 5, 6 and 9: a ratio estimated from a
            (stratified) sample of elements or clusters without replacement.
        """
        row = self._find_row(key)
        return self._twins.standard_error(key) if row is None else self._table.error(key, row)

    def interval(self, key: str) -> tuple[float, float]:
        """Return the confidence interval of 95 % around a figure that a sample estimates.

        A figure is the value of a metric. About 95 of 100 samples have an interval that contains
        the figure of all elements. Shares have Wilson's interval, which is wider than 0 also at the
        shares 0 and 1.

        Args:
            key: ``metric``, ``metric/format`` or ``metric/recipe``.

        Returns:
            The lower and the upper end. Both equal the figure if all elements were measured. Both
            are NaN where `standard_error` returns NaN.

        Raises:
            KeyError: The metric, the format or the recipe is unknown.
        """
        return find_interval(key.partition("/")[0], self[key], self.standard_error(key))

    def in_order(self) -> Sequence[float]:
        """Return all figures (values of metrics) but those of twins, in the order of iteration.

        A twin is a sample of a layer that is stored and stepped as a recipe says.

        This is faster than reading figure by figure.
        """
        # Most layers and models have the formats of the table, and one row: that is the result.
        figures, rows = self._table.figures, self._rows
        if self._formats == self._table.formats and len({*rows.values()}) == 1:
            numbers: list[float] = figures[rows[None]].tolist()
            return numbers
        numbers = figures[rows[None], : len(LAYER_METRICS)].tolist()
        for format in self._formats:
            start = len(LAYER_METRICS) + self._table.formats.index(format) * len(FORMAT_METRICS)
            numbers += figures[rows[format], start : start + len(FORMAT_METRICS)].tolist()
        return numbers

    def twins_in_order(self) -> Sequence[float]:
        """Return all figures (values of metrics) of twins, in the order of `twin_keys`.

        A twin is a sample of a layer that is stored and stepped as a recipe says. This is faster
        than reading figure by figure.
        """
        return self._twins.in_order()

    def errors_in_order(self, metrics: tuple[str, ...]) -> Sequence[float]:
        """Return the standard errors of some metrics for all formats.

        Args:
            metrics: Names of metrics of a format that have a standard error.

        Returns:
            A flat sequence: the errors of all `metrics` for the first format, then for the next.
        """
        table = self._table
        errors = [table.estimate_errors(name) for name in metrics]
        places = [(self._rows[name], table.formats.index(name)) for name in self._formats]
        return [each[place].item() for place in places for each in errors]

    def histogram(self, key: str) -> Histogram:
        """Return a histogram with a bin for each octave, from a power of two up to the next.

        Args:
            key: One of three histograms:

                - ``"weights"`` counts abs(weight) before the step, over the weights other than 0.
                - ``"ulps"`` counts abs(update) over the spacing of the dtype in which the weights
                    are stored, for the elements that moved.
                - ``"steps/{format}"`` counts abs(update) over the spacing of the format, for the
                    same elements. A weight on the grid stalls if its update is below half of the
                    spacing, in an octave below −1.

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
        """Return the sums and maxima of each layer, from which values of metrics are computed.

        Args:
            formats: Names of the formats that the vectors have columns for. Columns of formats
                without figures are empty: sums of 0, maxima of −inf.

        Returns:
            For the layer, or for each layer of the model: its vector, float64 (columns) in the
            order of `altgrad.measurement.columns`, and the names of its formats.
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
        """Return the row of the step's table that has the figure of a key.

        A key is ``metric`` or ``metric/format``; formats have a row each. None for a key
        ``metric/recipe``: figures of recipes, which twins try, are in another table.

        Raises:
            KeyError: There is no such key.
        """
        name, _, format = key.partition("/")
        # Only an unknown key looks into the catalogue, for the message: a run reads many figures.
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


def layer_figures(
    table: StepTable, row: int, formats: Iterable[str], twins: TwinFigures = NO_TWINS
) -> Figures:
    """Return the figures, the values of metrics, of one layer in one step.

    Args:
        table: The table with the sums of all layers in one step.
        row: Row of the layer in the table.
        formats: Names of the formats of this layer, all of which the table has.
        twins: The figures of the layer's twins: samples that are stored and stepped as recipes say.
    """
    return Figures(table, dict.fromkeys((None, *formats), row), twins)


def model_figures(layers: Sequence[Figures]) -> Figures:
    """Combine the figures (values of metrics) of layers into those of the model that they form.

    Each layer is weighted by its number of elements, also if only a sample was measured.

    Args:
        layers: Figures of one or more layers or models, of one step or of several.

    Returns:
        The figures of the model, for each format of any of the layers. Those of a format are over
        the layers that have the format.

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
    """Return the figures (values of metrics) of one tensor, from its sums, copied to the host.

    Args:
        formats: Names of the formats, in the order of their columns.
        row: Sums and maxima of the tensor, float64 (columns) on any device, in the order of
            `altgrad.measurement.columns`.
    """
    return vector_figures(formats, row.cpu().numpy())


def vector_figures(formats: Sequence[str], vector: Numbers) -> Figures:
    """Return the figures (values of metrics) of one layer, from its sums on the host.

    Args:
        formats: Names of the formats, in the order of their columns.
        vector: Sums and maxima of the layer, float64 (columns) in the order of
            `altgrad.measurement.columns`.
    """
    return layer_figures(StepTable(formats, vector[None]), 0, formats)
