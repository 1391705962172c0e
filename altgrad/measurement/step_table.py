"""`StepTable`: what layers did in one step, a row for each, so that a metric is one evaluation."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from altgrad.measurement.catalogue import FORMAT_METRICS, LAYER_METRICS
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
from altgrad.measurement.metrics import FORMULAS, KeptShare, Numbers, Share, histogram_of

_TOTALS = {"ulps": "moved", "steps": "judged"}
_FEWEST = 30  # with fewer elements that matter, their spread is not known
Rows = Mapping[str | None, int]
"""Of a layer or a model: the row of each format, and under None that of the parameters."""


class StepTable:
    """Rows of sums and maxima, and everything that follows from them, computed when it is read.

    Args:
        formats: Names of the formats, in the order of their sums.
        vectors: float64 on the host: of each row its sums, then its maxima.
        members: Of rows that stand for several layers: which rows these are.
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
        self._tensors: dict[str, Tensor] = {}
        self._lists: dict[str, list[list[float]]] = {}

    @classmethod
    def with_model(
        cls, formats: Sequence[str], vectors: Tensor, judged: Sequence[Collection[str]]
    ) -> tuple[StepTable, Rows]:
        """The table of layers and the model that they make, and the rows of the latter.

        Args:
            formats: As above.
            vectors: Of the layers.
            judged: For which formats each of them is judged. A model's figures of a format are
                those of the layers that are judged for it.
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

    @functools.cached_property
    def counted(self) -> list[list[int]]:
        """How many elements each row stands for, and how many were measured for it."""
        pairs = self.vectors[:, [POPULATION, ELEMENTS]].tolist()
        counted = [[round(population), round(elements)] for population, elements in pairs]
        for row, layers in self.members.items():
            counted[row][1] = sum(counted[layer][1] for layer in layers)
        return counted

    @functools.cached_property
    def in_order(self) -> list[list[float]]:
        """Of each row all metrics: of the parameter, and then those of each format."""
        of_layers = torch.cat([self._values(name) for name in LAYER_METRICS])
        of_formats = self._by_row([self._values(name) for name in FORMAT_METRICS])
        values: list[list[float]] = torch.cat((of_layers.t(), of_formats), dim=1).tolist()
        return values

    def errors_in_order(self, names: tuple[str, ...]) -> list[list[float]]:
        """Of each row the standard errors of some metrics, of each format in turn."""
        key = f"errors of {names}"
        if key not in self._lists:
            self._lists[key] = self._by_row([self._errors(name) for name in names]).tolist()
        return self._lists[key]

    def values(self, name: str) -> list[list[float]]:
        """One metric of all rows; of the parameters, or one after the other of each format."""
        if name not in self._lists:
            self._lists[name] = self._values(name).tolist()
        return self._lists[name]

    def errors(self, name: str) -> list[list[float]]:
        """Standard errors of a metric, as of `values`; NaN where it has none."""
        key = f"errors of {name}"
        if key not in self._lists:
            self._lists[key] = self._errors(name).tolist()
        return self._lists[key]

    def histogram(self, name: str, row: int, format: str | None) -> list[float]:
        """How many elements lie in each octave, of ``"ulps"`` or ``"steps"``."""
        key = f"histogram of {name}"
        if key not in self._tensors:
            self._tensors[key] = histogram_of(self._numbers, name, _TOTALS[name])
        counts: list[float] = self._tensors[key][:, self.place(format), row].tolist()
        return counts

    def place(self, format: str | None) -> int:
        """Where a format is among those of `values`."""
        return 0 if format is None else self.formats.index(format)

    def row_for(self, formats: Sequence[str], row: int) -> Tensor:
        """The vector of a row, as if it were of other formats; nothing where it has none."""
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

    def _values(self, name: str) -> Tensor:
        if name not in self._tensors:
            self._tensors[name] = FORMULAS[name](self._numbers)
        return self._tensors[name]

    def _by_row(self, values: Sequence[Tensor]) -> Tensor:
        """From metrics of (formats, rows) to (rows, formats · metrics)."""
        return torch.stack([*values]).permute(2, 1, 0).flatten(1)

    @functools.cached_property
    def _numbers(self) -> Numbers:
        columns, middle = self.vectors.t().contiguous(), sum_count(len(self.formats))
        sums, maxima = columns[:middle], columns[middle:]
        of_formats = sums[len(SUMS) :].view(len(self.formats), len(FORMAT_SUMS), len(self.vectors))
        octaves = {
            "ulps": sums[len(SUMS) + 1 - OCTAVES : len(SUMS)].unsqueeze(1),
            "steps": of_formats[:, 1 - OCTAVES :].transpose(0, 1),
        }
        return Numbers(
            _Columns(sums, SUMS, FORMAT_SUMS), _Columns(maxima, MAXIMA, FORMAT_MAXIMA), octaves
        )

    def _errors(self, name: str) -> Tensor:
        n, formula, value = self._numbers, FORMULAS[name], self._values(name)
        if not isinstance(formula, (Share, KeptShare)):
            return torch.full_like(value, torch.nan)
        total = formula.denominator(n)
        variance = self._variance(formula, value)
        for row, layers in self.members.items():
            of_layers = self._variance(formula, value[:, row : row + 1]) * self._weights_sq
            variance[:, row] = of_layers[:, [*layers]].sum(1)
        return (variance.sqrt() / total).masked_fill(value.isnan() | (total == 0), math.nan)

    def _variance(self, formula: Share | KeptShare, value: Tensor) -> Tensor:
        """Of the sum of the residuals over a layer's sample, of which many could be drawn."""
        n, carrying = self._numbers, self._numbers.sum["elements"]
        if isinstance(formula, KeptShare):
            squares = n.sum["judged_sq"] * n.sum["judged_sq"]
            carrying = (squares / n.sum["judged_4th"]).masked_fill(n.sum["judged_4th"] == 0, 0.0)
        variance = formula.squared_residuals(n, value).clamp(min=0) * self._variance_per_residual
        variance = variance.masked_fill(carrying < _FEWEST, math.nan)
        return variance.masked_fill(self._is_whole | (formula.denominator(n) == 0), 0.0)

    @functools.cached_property
    def _variance_per_residual(self) -> Tensor:
        population, elements = self._numbers.sum["population"], self._numbers.sum["elements"]
        return (1 - elements / population) * elements / (elements - 1)

    @functools.cached_property
    def _is_whole(self) -> Tensor:
        return self._numbers.sum["elements"] >= self._numbers.sum["population"]

    @functools.cached_property
    def _weights_sq(self) -> Tensor:
        """Of the elements measured of a layer each stands for so many; the square of that."""
        population, elements = self._numbers.sum["population"], self._numbers.sum["elements"]
        return (population / elements.clamp(min=1)).square()


class _Columns(dict[str, Tensor]):
    """By name: of the parameters (1, rows), of formats (formats, rows).

    Args:
        columns: Those of the parameters, and then those of each format.
        names: Of those of the parameters.
        format_names: Of those of a format.
    """

    def __init__(
        self, columns: Tensor, names: tuple[str, ...], format_names: tuple[str, ...]
    ) -> None:
        super().__init__()
        self._columns = columns
        self._places = _places(names, format_names)

    def __missing__(self, name: str) -> Tensor:
        self[name] = self._columns[self._places[name]]
        return self[name]


@functools.cache
def _places(names: tuple[str, ...], format_names: tuple[str, ...]) -> Mapping[str, slice]:
    """Of each name, whichever number of formats there are."""
    first, each = len(names), len(format_names)
    places = {name: slice(place, place + 1) for place, name in enumerate(names)}
    return places | {
        name: slice(first + place, None, each) for place, name in enumerate(format_names)
    }


def _merged(vectors: Tensor, layers: Sequence[int], middle: int) -> Tensor:
    """These together, each with the weight of all its elements: (1, columns)."""
    chosen = vectors if len(layers) == len(vectors) else vectors[[*layers]]
    weights = chosen[:, POPULATION] / chosen[:, ELEMENTS].clamp(min=1)
    # Not a matrix product: some processors add up its columns in different orders, and a share of
    # nothing, the difference of two equal columns, would be 3e-16 and not 0.
    sums = (weights.unsqueeze(1) * chosen[:, :middle]).sum(0)
    sums[POPULATION] = sums[ELEMENTS]  # which have been weighted to it
    return torch.cat((sums, chosen[:, middle:].amax(0))).unsqueeze(0)
