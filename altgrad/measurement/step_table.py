"""`StepTable`: what layers did in one step, a row for each, and all figures as one matrix."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from altgrad.measurement.catalogue import FORMAT_METRICS, LAYER_METRICS, figure_keys
from altgrad.measurement.columns import (
    ELEMENTS,
    FORMAT_MAXIMA,
    FORMAT_SUMS,
    MAXIMA,
    OCTAVES,
    POPULATION,
    SUMS,
    max_count,
    sum_count,
)
from altgrad.measurement.metrics import FORMULAS, Estimate
from altgrad.measurement.standard_errors import estimate_sums, standard_errors

RowsOfFormats = Mapping[str | None, int]
"""The row in which a layer or model has the sums of each format, and under None its own."""

LAYER_ESTIMATES, FORMAT_ESTIMATES = (
    tuple(name for name in metrics if isinstance(FORMULAS[name], Estimate))
    for metrics in (LAYER_METRICS, FORMAT_METRICS)
)
"""Metrics that have a standard error."""


class StepTable:
    """Rows of sums and maxima, and everything that follows from them.

    Figures, errors and histograms are matrices, computed for all rows when one is first read.

    Args:
        formats: Names of the formats, in the order of their sums.
        vectors: float64 on the host, (rows, columns): the sums of each row, then its maxima.
        members: For rows that stand for several layers: which rows these are.

    Attributes:
        columns: The place of each key in the rows of `figures`.
    """

    def __init__(
        self,
        formats: Sequence[str],
        vectors: Tensor,
        members: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        self.formats = tuple(formats)
        self.vectors = vectors
        self.members = members or {}
        self.columns = _figure_columns(self.formats)
        self._places = _places(len(self.formats))
        self._first: tuple[str, list[list[float]]] | None = None
        self._figures: list[list[float]] | None = None

    @classmethod
    def with_model(
        cls, formats: Sequence[str], vectors: Tensor, judged: Sequence[Collection[str]]
    ) -> tuple[StepTable, RowsOfFormats]:
        """Make the table of layers and of the model that they form.

        Args:
            formats: Names of the formats, in the order of their sums.
            vectors: The vectors of the layers.
            judged: For which formats each of them is judged. A model's figures of a format are
                those of the layers that are judged for it.

        Returns:
            The table, and the rows of the model in it.
        """
        rows: dict[str | None, int] = {}
        members: dict[tuple[int, ...], int] = {}
        for format in (None, *formats):
            layers = tuple(k for k, own in enumerate(judged) if format is None or format in own)
            if layers:
                rows[format] = members.setdefault(layers, len(vectors) + len(members))
        merged = [_merged(vectors, layers, sum_count(len(formats))) for layers in members]
        by_row = {row: layers for layers, row in members.items()}
        return cls(formats, torch.cat((vectors, *merged)), by_row), rows

    def sum(self, name: str) -> Tensor:
        """Return a column of sums: (rows, 1), or (rows, formats) for one of formats."""
        return self.vectors[:, self._places[name]]

    def max(self, name: str) -> Tensor:
        """Return a column of maxima, shaped as in `sum`."""
        return self.vectors[:, self._places[f"max {name}"]]

    def histogram(self, name: str) -> Tensor:
        """Return how many elements moved by each octave: (64, 1 or formats, rows).

        Args:
            name: ``"ulps"``, or ``"steps"``, of the elements that a format is judged by.
        """
        return self._octaves[:, :1] if name == "ulps" else self._octaves[:, 1:]

    def counts(self, format: str | None, row: int) -> list[float]:
        """Return the histogram of a row: of ULPs, or of steps of a format."""
        place = 0 if format is None else 1 + self.formats.index(format)
        counts: list[float] = self._octaves[:, place, row].tolist()
        return counts

    def figure(self, key: str, row: int) -> float:
        """Return one figure of a row, NaN where it has no value.

        A step itself reads no metric but one, which is evaluated alone, in a tenth of the time
        that the matrix takes; as soon as another one is read, all are.
        """
        metric, _, format = key.partition("/")
        if self._figures is None and self._first is None:
            self._first = metric, FORMULAS[metric](self).tolist()
        if self._figures is None and self._first is not None and self._first[0] == metric:
            value = self._first[1][row][self.formats.index(format) if format else 0]
        else:
            value = self.figures[row][self.columns[key]]
        return math.nan if math.isnan(value) else value  # the one NaN that equals itself in a list

    @property
    def figures(self) -> list[list[float]]:
        """Return the figures of each row, in the order of `catalogue.figure_keys`."""
        if self._figures is None:
            of_layer = [FORMULAS[name](self) for name in LAYER_METRICS]
            of_formats = [FORMULAS[name](self) for name in FORMAT_METRICS]
            self._figures = _by_key(of_layer, of_formats).tolist()
        return self._figures

    @functools.cached_property
    def errors(self) -> list[list[float]]:
        """Return the standard errors of each row, in the order of `error_columns`."""
        each = [estimate_sums(FORMULAS[name], self, 1) for name in LAYER_ESTIMATES]
        each += [estimate_sums(FORMULAS[n], self, len(self.formats)) for n in FORMAT_ESTIMATES]
        sums = [torch.cat(part, dim=1) for part in zip(*each, strict=True)]
        counted = self.vectors[:, [POPULATION, ELEMENTS]]
        errors: list[list[float]] = standard_errors(sums, counted, self.members).tolist()
        return errors

    def error(self, key: str, row: int) -> float:
        """Return the standard error of a figure; NaN where its metric has none."""
        column = error_columns(self.formats).get(key)
        return math.nan if column is None else self.errors[row][column]

    @functools.cached_property
    def counted(self) -> list[list[int]]:
        """Return how many elements each row stands for, and how many were measured for it."""
        pairs = self.vectors[:, [POPULATION, ELEMENTS]].tolist()
        counted = [[round(population), round(elements)] for population, elements in pairs]
        for row, layers in self.members.items():
            counted[row][1] = sum(counted[layer][1] for layer in layers)
        return counted

    def row_for(self, formats: Sequence[str], row: int) -> Tensor:
        """Return the vector of a row as one of other formats, empty for those it does not have."""
        if self.formats == tuple(formats):
            return self.vectors[row]
        vector, middle = self.vectors[row], sum_count(len(self.formats))
        parts = [vector[: len(SUMS)], vector[middle : middle + len(MAXIMA)]]
        sums, maxima = parts[:1], parts[1:]
        for format in formats:
            if format in self.formats:
                position = self.formats.index(format)
                sums.append(vector[sum_count(position) : sum_count(position + 1)])
                first, stop = max_count(position), max_count(position + 1)
                maxima.append(vector[middle + first : middle + stop])
            else:
                sums.append(vector.new_zeros(len(FORMAT_SUMS)))
                maxima.append(vector.new_full((len(FORMAT_MAXIMA),), -torch.inf))
        return torch.cat((*sums, *maxima))

    @functools.cached_property
    def _octaves(self) -> Tensor:
        """Return all histograms, (64, 1 + formats, rows): of ULPs, then of the steps of formats.

        Vectors have 63 octaves of those that moved; the first one is what is in no other.
        """
        formats, stop = len(self.formats), sum_count(len(self.formats))
        ulps = self.vectors[:, len(SUMS) + 1 - OCTAVES : len(SUMS)].unsqueeze(1)
        steps = self.vectors[:, len(SUMS) : stop].reshape(len(ulps), formats, len(FORMAT_SUMS))
        octaves = torch.cat((ulps, steps[:, :, 1 - OCTAVES :]), dim=1).permute(2, 1, 0).contiguous()
        moved = torch.cat((self.sum("moved"), self.sum("judged")), dim=1).t()
        # Of layers with weights the rounding of the sums may leave a little less than nothing.
        first = (moved - octaves.sum(0)).clamp(min=0)
        return torch.cat((first.unsqueeze(0), octaves))


def _by_key(of_layer: Sequence[Tensor], of_formats: Sequence[Tensor]) -> Tensor:
    """Put values of metrics side by side: those of the layer, then those of each format.

    Args:
        of_layer: (rows, 1) of each metric.
        of_formats: (rows, formats) of each metric.

    Returns:
        (rows, keys).
    """
    return torch.cat((*of_layer, torch.stack([*of_formats], dim=2).flatten(1)), dim=1)


@functools.cache
def _places(formats: int) -> Mapping[str, slice]:
    """Return where each sum, and under ``"max …"`` each maximum, lies in vectors."""
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
    """Return where each key is in a row of figures."""
    return {key: column for column, key in enumerate(figure_keys(formats))}


@functools.lru_cache(maxsize=64)
def error_columns(formats: tuple[str, ...]) -> Mapping[str, int]:
    """Return where each key is in a row of errors: each estimate of all formats in turn."""
    of_formats = (f"{name}/{format}" for name in FORMAT_ESTIMATES for format in formats)
    return {key: column for column, key in enumerate((*LAYER_ESTIMATES, *of_formats))}


def _merged(vectors: Tensor, layers: Sequence[int], middle: int) -> Tensor:
    """Return the vector of layers together, (1, columns), each with the weight of all its elements.

    Args:
        vectors: (layers, columns).
        layers: Which of them.
        middle: How many columns are sums.
    """
    chosen = vectors if len(layers) == len(vectors) else vectors[[*layers]]
    weights = chosen[:, POPULATION] / chosen[:, ELEMENTS].clamp(min=1)
    # Not a matrix product: some processors add up its columns in different orders, and a share of
    # nothing, the difference of two equal columns, would be 3e-16 and not 0.
    sums = (weights.unsqueeze(1) * chosen[:, :middle]).sum(0)
    sums[POPULATION] = sums[ELEMENTS]  # which have been weighted to it
    return torch.cat((sums, chosen[:, middle:].amax(0))).unsqueeze(0)
