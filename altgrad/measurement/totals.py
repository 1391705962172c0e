"""`Layers`: add the sums of rows up to the vectors of layers.

The kernel returns columns grouped by kind, for all formats; a vector has all columns of a format
side by side (see `columns`). One `index_select` along a precomputed order translates.

Read `kernel` first; `measurer` comes next and calls both.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from altgrad.measurement.columns import (
    FIRST_STEPS_OCTAVE,
    FIRST_WEIGHTS_OCTAVE,
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

_FLOAT64_BIAS = 1023  # of the exponent; the kernel counts octaves by biased exponents
_Column = tuple[str, int | None]  # name of a sum or maximum, and index of its format


class Layers(NamedTuple):
    """The layers of some rows, with constants that turn the sums of rows into vectors.

    A step changes the counts of the histograms and nothing else.

    Attributes:
        counted: Number of elements of each whole layer, and of those in the rows, float64
            (layers, 2).
        row_layers: Index of the layer of each row, int64 (rows).
        extremum_layers: `row_layers` for each maximum and minimum, int64 (rows, extrema).
        histograms: Counts of octaves of all layers.
        order: Source of each column of a vector, int64 (columns).
        meant: True for columns that have a meaning, bool (columns). None if all have.
    """

    counted: Tensor
    row_layers: Tensor
    extremum_layers: Tensor
    histograms: Histograms
    order: Tensor
    meant: Tensor | None

    @classmethod
    def create(cls, row_layers: Tensor, counted: Tensor, judged: Sequence[bool]) -> Layers:
        """Describe the layers of some rows, with histograms of 0.

        Args:
            row_layers: Index of the layer of each row, int64 (rows).
            counted: Number of elements of each whole layer, and of those in the rows, float64
                (layers, 2).
            judged: For each format, True if the weights are stored finer than the format. Its
                what-if columns are 0 otherwise.

        Returns:
            The layers, on the device of `counted`.
        """
        formats, device = len(judged), counted.device
        return cls(
            counted,
            row_layers,
            row_layers.unsqueeze(1).expand(-1, len(_source(formats)[3])),
            _make_histograms(row_layers, len(counted), formats),
            _order(formats, device),
            _meant(judged, device),
        )

    def make_empty_row(self) -> tuple[Tensor, Tensor]:
        """Make the sums and extrema of a row without elements, in the columns of `row_sums`.

        Returns:
            Sums of 0, float64 (1, columns), and extrema of −inf, float64 (1, columns).
        """
        _, sums, _, extrema = _source(self.histograms.steps_at.shape[1])
        return (
            self.counted.new_zeros(1, len(sums)),
            self.counted.new_full((1, len(extrema)), -torch.inf),
        )

    def add_up(self, sums: Tensor, extrema: Tensor) -> Tensor:
        """Add rows up to layers.

        Args:
            sums: Sums of each row, float64 (rows, columns) in the order of `row_sums`.
            extrema: Maxima and negated minima of each row, float64 (rows, columns).

        Returns:
            Vectors, float64 (layers, columns): SUMS, FORMAT_SUMS of each format, MAXIMA,
            FORMAT_MAXIMA of each format.
        """
        layers = len(self.counted)
        if not layers == len(sums) == 1:  # a single row of a single layer needs no addition
            added = sums.new_zeros(layers, sums.shape[1])
            largest = extrema.new_full((layers, extrema.shape[1]), -torch.inf)
            sums = added.index_add_(0, self.row_layers, sums)
            extrema = largest.scatter_reduce_(0, self.extremum_layers, extrema, "amax")
        octaves = self.histograms.counts.view(layers, -1)
        vectors = torch.cat((self.counted, sums, octaves, extrema), dim=1)
        vectors = vectors.index_select(1, self.order)
        return vectors if self.meant is None else torch.where(self.meant, vectors, 0.0)


def _make_histograms(row_layers: Tensor, layers: int, formats: int) -> Histograms:
    """Make histograms of 0.

    The bins of one layer, each part of 64 float64::

        | ULPs | weights | steps of format 0 | steps of format 1 | …

    Args:
        row_layers: Index of the layer of each row, int64 (rows).
        layers: Number of layers.
        formats: Number of formats.

    Returns:
        The histograms, on the device of `row_layers`.
    """
    device = row_layers.device
    start = row_layers[:, None, None] * ((2 + formats) * OCTAVES)
    format_starts = torch.arange(2, 2 + formats, device=device)[:, None] * OCTAVES
    return Histograms(
        torch.zeros(layers * (2 + formats) * OCTAVES, dtype=torch.float64, device=device),
        start - _FLOAT64_BIAS,
        start + OCTAVES - (_FLOAT64_BIAS + FIRST_WEIGHTS_OCTAVE),
        start + format_starts - (_FLOAT64_BIAS + FIRST_STEPS_OCTAVE),
        # A single 1.0 in memory with stride 0, seen as more elements than any tensor has:
        # scatter_add_ needs an increment for each index.
        torch.ones((), dtype=torch.float64, device=device).expand(2**40),
    )


def _meant(judged: Sequence[bool], device: torch.device) -> Tensor | None:
    """Mark the columns that have a meaning: all, but for what-if columns of unjudged formats."""
    if all(judged):
        return None
    what_if = {*WHAT_IF, *JUDGED, *(name for name in FORMAT_SUMS if name.startswith("steps["))}
    meant = [
        name not in what_if or format is None or judged[format]
        for name, format in _columns(len(judged))
    ]
    return torch.tensor(meant, device=device)


def _columns(formats: int) -> list[_Column]:
    """List the columns of a vector in their order."""
    columns: list[_Column] = [(name, None) for name in SUMS]
    columns += [(name, format) for format in range(formats) for name in FORMAT_SUMS]
    columns += [(f"max {name}", None) for name in MAXIMA]
    columns += [(f"max {name}", f) for f in range(formats) for name in FORMAT_MAXIMA]
    return columns


def _source(formats: int) -> tuple[list[_Column], ...]:
    """List the columns of the parts of a vector: counted, sums, octaves, extrema."""

    def each(names: tuple[str, ...], format_names: tuple[str, ...], how: str) -> list[_Column]:
        columns: list[_Column] = [(how.format(name), None) for name in names]
        return columns + [(how.format(name), f) for name in format_names for f in range(formats)]

    bins = range(OCTAVES)
    octaves: list[_Column] = [(f"{name}[{k}]", None) for name in ("ulps", "weights") for k in bins]
    octaves += [(f"steps[{k}]", f) for f in range(formats) for k in bins]
    return (
        [("population", None), ("elements", None)],
        each(ROW_SUMS, FORMAT_ROW_SUMS, "{}") + each(ROW_SQUARES, FORMAT_ROW_SQUARES, "{}"),
        octaves,
        each(ROW_MAXIMA, FORMAT_ROW_MAXIMA, "max {}")
        + each(ROW_MINIMA, FORMAT_ROW_MINIMA, "max minus_{}"),
    )


# The tensor is cached. Made in inference mode, its use outside of that mode would be restricted:
# https://docs.pytorch.org/docs/stable/notes/autograd.html#inference-mode
@functools.cache
@torch.inference_mode(mode=False)
def _order(formats: int, device: torch.device) -> Tensor:
    """Return the source of each column of a vector in its concatenated parts, int64 (columns)."""
    columns = itertools.chain.from_iterable(_source(formats))
    source = {column: position for position, column in enumerate(columns)}
    order = [
        source[(JUDGED[name], None) if name in JUDGED else (name, format)]
        for name, format in _columns(formats)
    ]
    return torch.tensor(order, device=device)
