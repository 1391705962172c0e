"""`Layers`: from the sums of rows to the vectors of the layers that they belong to."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from altgrad.measurement.columns import (
    FIRST_STEPS_OCTAVE,
    FORMAT_MAXIMA,
    FORMAT_ROW_MAXIMA,
    FORMAT_ROW_MINIMA,
    FORMAT_ROW_SQUARES,
    FORMAT_ROW_SUMS,
    FORMAT_SUMS,
    JUDGED,
    MAXIMA,
    OCTAVES,
    ROW_MAXIMA,
    ROW_MINIMA,
    ROW_SQUARES,
    ROW_SUMS,
    SUMS,
    WHAT_IF,
)
from altgrad.measurement.kernel import Histograms

_FLOAT64_BIAS = 1023
_Column = tuple[str, int | None]  # a sum or maximum and the format that it is of


class Layers(NamedTuple):
    """Layers that rows of elements belong to, and how the sums of these become vectors.

    Nothing of it changes with a step but what the histograms count.

    Attributes:
        counted: float64, (layers, 2): how many elements the parameter has and the rows hold.
        of_row: int64, (rows): the layer of each row.
        of_extremum: int64, (rows, extrema): the same for each maximum and minimum.
        histograms: Where the octaves of each row are counted.
        order: int64, (columns): where the columns of a vector come from.
        meant: bool, (columns): which of them have a meaning; None for all.
    """

    counted: Tensor
    of_row: Tensor
    of_extremum: Tensor
    histograms: Histograms
    order: Tensor
    meant: Tensor | None

    @classmethod
    def of(cls, layer_of_row: Tensor, counted: Tensor, judged: Sequence[bool]) -> Layers:
        """Describe the layers of some rows.

        Args:
            layer_of_row: int64, (rows): the layer of each row.
            counted: float64, (layers, 2): how many elements the parameter has and the rows hold.
            judged: Whether the weights are stored finer than each format, so that updates that it
                would lose are there to see.

        Returns:
            The layers, with histograms that have counted nothing.
        """
        formats, device = len(judged), counted.device
        return cls(
            counted,
            layer_of_row,
            layer_of_row.unsqueeze(1).expand(-1, len(_source(formats)[3])),
            _no_counts(layer_of_row, len(counted), formats),
            _order(formats, device),
            _meant(judged, device),
        )

    def nothing(self) -> tuple[Tensor, Tensor]:
        """Return the sums and extrema of a row without elements, as `row_sums` returns them."""
        _, sums, _, extrema = _source(self.histograms.steps_at.shape[1])
        return (
            self.counted.new_zeros(1, len(sums)),
            self.counted.new_full((1, len(extrema)), -torch.inf),
        )

    def vectors(self, sums: Tensor, extrema: Tensor) -> Tensor:
        """Add rows up to layers.

        Args:
            sums: Sums of each row, as `row_sums` returns them.
            extrema: Maxima and negated minima of each row.

        Returns:
            float64, (layers, columns): SUMS, FORMAT_SUMS of each format, MAXIMA, FORMAT_MAXIMA of
            each format.
        """
        layers = len(self.counted)
        if not layers == len(sums) == 1:  # the row of a layer that is measured alone is all of it
            added = sums.new_zeros(layers, sums.shape[1])
            largest = extrema.new_full((layers, extrema.shape[1]), -torch.inf)
            sums = added.index_add_(0, self.of_row, sums)
            extrema = largest.scatter_reduce_(0, self.of_extremum, extrema, "amax")
        octaves = self.histograms.counts.view(layers, -1)
        vectors = torch.cat((self.counted, sums, octaves, extrema), dim=1)
        vectors = vectors.index_select(1, self.order)
        return vectors if self.meant is None else torch.where(self.meant, vectors, 0.0)


def _no_counts(layer_of_row: Tensor, layers: int, formats: int) -> Histograms:
    """Return the histograms of some layers, of which nothing is counted yet."""
    device = layer_of_row.device
    start = layer_of_row[:, None, None] * ((1 + formats) * OCTAVES)
    of_formats = torch.arange(1, 1 + formats, device=device)[:, None] * OCTAVES
    return Histograms(
        torch.zeros(layers * (1 + formats) * OCTAVES, dtype=torch.float64, device=device),
        start - _FLOAT64_BIAS,
        start + of_formats - (_FLOAT64_BIAS + FIRST_STEPS_OCTAVE),
        # One number in memory, seen as more than a tensor has elements.
        torch.ones((), dtype=torch.float64, device=device).expand(2**40),
    )


def _meant(judged: Sequence[bool], device: torch.device) -> Tensor | None:
    """Return which columns have a meaning: of a format that is not judged none of the what-if."""
    if all(judged):
        return None
    what_if = {*WHAT_IF, *JUDGED, *(name for name in FORMAT_SUMS if name.startswith("steps["))}
    meant = [
        name not in what_if or format is None or judged[format]
        for name, format in _columns(len(judged))
    ]
    return torch.tensor(meant, device=device)


def _columns(formats: int) -> list[_Column]:
    """Return what the columns of `Layers.vectors` are."""
    columns: list[_Column] = [(name, None) for name in SUMS]
    columns += [(name, format) for format in range(formats) for name in FORMAT_SUMS]
    columns += [(f"max {name}", None) for name in MAXIMA]
    columns += [(f"max {name}", f) for f in range(formats) for name in FORMAT_MAXIMA]
    return columns


def _source(formats: int) -> tuple[list[_Column], ...]:
    """Return the columns that vectors are put together of: counted, sums, octaves, extrema."""

    def each(of_layer: tuple[str, ...], of_formats: tuple[str, ...], how: str) -> list[_Column]:
        columns: list[_Column] = [(how.format(name), None) for name in of_layer]
        return columns + [(how.format(name), f) for name in of_formats for f in range(formats)]

    octaves: list[_Column] = [(f"ulps[{bin}]", None) for bin in range(OCTAVES)]
    octaves += [(f"steps[{bin}]", f) for f in range(formats) for bin in range(OCTAVES)]
    return (
        [("population", None), ("elements", None)],
        each(ROW_SUMS, FORMAT_ROW_SUMS, "{}") + each(ROW_SQUARES, FORMAT_ROW_SQUARES, "{}"),
        octaves,
        each(ROW_MAXIMA, FORMAT_ROW_MAXIMA, "max {}")
        + each(ROW_MINIMA, FORMAT_ROW_MINIMA, "max minus_{}"),
    )


@functools.cache
@torch.inference_mode(mode=False)
def _order(formats: int, device: torch.device) -> Tensor:
    """Return for each column of the vectors where it comes from."""
    columns = itertools.chain.from_iterable(_source(formats))
    source = {column: position for position, column in enumerate(columns)}
    order = [
        source[(JUDGED[name], None) if name in JUDGED else (name, format)]
        for name, format in _columns(formats)
    ]
    return torch.tensor(order, device=device)
