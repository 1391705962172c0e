"""From the sums of rows to the vectors of the layers that they belong to."""

from __future__ import annotations

import functools
import itertools
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
from altgrad.measurement.kernel import RowSums

_FLOAT64_BIAS = 1023
_Column = tuple[str, int | None]  # a sum or maximum and the format that it is of


class LayersOfRows(NamedTuple):
    """Which layer each row belongs to; int64, of (rows) and of (rows, maxima)."""

    of_row: Tensor
    of_maximum: Tensor

    @classmethod
    def of(cls, layer_of_row: Tensor, formats: int) -> LayersOfRows:
        """From that of each row."""
        return cls(layer_of_row, layer_of_row.unsqueeze(1).expand(-1, len(_source(formats)[3])))


class Totals:
    """Sums and maxima of some layers, to which those of rows are added.

    Attributes:
        counts: The histograms of all layers, one after the other, of ULPs and then of steps.
    """

    def __init__(self, layers: int, formats: int, device: torch.device) -> None:
        self._formats = formats
        self._layers = layers
        self._sums: Tensor | None = None
        self._maxima: Tensor | None = None
        count = layers * (1 + formats) * OCTAVES
        self.counts = torch.zeros(count, dtype=torch.float64, device=device)

    def add(self, rows: RowSums, layers: LayersOfRows | None = None) -> None:
        """Rows of which all belong to one layer, where none are named."""
        if layers is None:
            sums, maxima = rows.sums.sum(0, keepdim=True), rows.maxima.amax(0, keepdim=True)
        else:
            sums = rows.sums.new_zeros(self._layers, rows.sums.shape[1])
            sums.index_add_(0, layers.of_row, rows.sums)
            maxima = rows.maxima.new_full((self._layers, rows.maxima.shape[1]), -torch.inf)
            maxima.scatter_reduce_(0, layers.of_maximum, rows.maxima, "amax")
        self._sums = sums if self._sums is None else self._sums + sums
        self._maxima = maxima if self._maxima is None else torch.maximum(self._maxima, maxima)

    def vectors(self, counted: Tensor, meant: Tensor | None) -> Tensor:
        """(layers, SUMS, FORMAT_SUMS of each format, MAXIMA, FORMAT_MAXIMA of each format).

        Args:
            counted: (layers, 2), the population and the elements of each.
            meant: What `meant_columns` gives.
        """
        if self._sums is None or self._maxima is None:  # no element at all
            widths = [len(part) for part in _source(self._formats)[1:]]
            self._sums = counted.new_zeros(self._layers, widths[0])
            self._maxima = counted.new_full((self._layers, widths[2]), -torch.inf)
        octaves = self.counts.view(self._layers, -1)
        table = torch.cat((counted, self._sums, octaves, self._maxima), dim=1)
        vectors = table.index_select(1, _order(self._formats, counted.device))
        return vectors if meant is None else torch.where(meant, vectors, 0.0)


def meant_columns(judged: list[bool], device: torch.device) -> Tensor | None:
    """Which columns have a meaning; None for all of them.

    Args:
        judged: Whether the weights are stored finer than each format, so that updates that it would
            lose are there to see.
        device: Where the columns are.
    """
    if all(judged):
        return None
    what_if = {*WHAT_IF, *JUDGED, *(name for name in FORMAT_SUMS if name.startswith("steps["))}
    meant = [
        name not in what_if or format is None or judged[format]
        for name, format in _columns(len(judged))
    ]
    return torch.tensor(meant, device=device)


def bins_of(layer_of_row: Tensor, formats: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `Histograms` needs: the first bin of each row, less the exponent that it counts."""
    start = layer_of_row[:, None, None] * ((1 + formats) * OCTAVES)
    of_formats = torch.arange(1, 1 + formats, device=layer_of_row.device)[:, None] * OCTAVES
    ones = torch.ones((), dtype=torch.float64, device=layer_of_row.device).expand(2**40)
    steps_at = start + of_formats - (_FLOAT64_BIAS + FIRST_STEPS_OCTAVE)
    return start - _FLOAT64_BIAS, steps_at, ones


def _columns(formats: int) -> list[_Column]:
    """What the columns of `Totals.vectors` are."""
    columns: list[_Column] = [(name, None) for name in SUMS]
    columns += [(name, format) for format in range(formats) for name in FORMAT_SUMS]
    columns += [(f"max {name}", None) for name in MAXIMA]
    columns += [(f"max {name}", f) for f in range(formats) for name in FORMAT_MAXIMA]
    return columns


def _source(formats: int) -> tuple[list[_Column], ...]:
    """What the columns are that it is put together of: counted, sums, octaves and maxima."""

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
    """For each column of the vectors, where it comes from."""
    columns = itertools.chain.from_iterable(_source(formats))
    source = {column: position for position, column in enumerate(columns)}
    order = [
        source[(JUDGED[name], None) if name in JUDGED else (name, format)]
        for name, format in _columns(formats)
    ]
    return torch.tensor(order, device=device)
