"""`Figures`: the metrics of a layer or a model as plain numbers, each computed when it is read."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from altgrad.metrics import (
    FORMAT_METRICS,
    LAYER_METRICS,
    KeptShare,
    Metric,
    Numbers,
    Share,
    get_metric,
    histogram_of,
)
from altgrad.statistics import (
    FIRST_STEPS_OCTAVE,
    FORMAT_MAXIMA,
    FORMAT_SUMS,
    MAXIMA,
    SUMS,
    LayerStatistics,
    max_count,
    sum_count,
)

_POPULATION, _ELEMENTS = SUMS.index("population"), SUMS.index("elements")
_FEWEST = 30  # with fewer elements that matter, their spread is not known


class Histogram(NamedTuple):
    """How many elements lie in each octave; the first bin and the last have no end.

    Attributes:
        first: log2 of where the first bin begins; bin k is from 2**(first + k) to twice that.
        counts: Of each bin; of a model estimated from samples, and no whole numbers.
    """

    first: int
    counts: Sequence[float]


class Vectors(NamedTuple):
    """`LayerStatistics` on the host, and which of their formats is meant; None for none."""

    sums: Sequence[float]
    maxima: Sequence[float]
    position: int | None = None

    def numbers(self) -> Numbers:
        """By name."""
        sums = dict(zip(SUMS, self.sums, strict=False))
        maxima = dict(zip(MAXIMA, self.maxima, strict=False))
        if self.position is None:
            return Numbers(sums, maxima)
        first, first_maximum = sum_count(self.position), max_count(self.position)
        of_format = self.sums[first : first + len(FORMAT_SUMS)]
        extrema = self.maxima[first_maximum : first_maximum + len(FORMAT_MAXIMA)]
        return Numbers(
            sums | dict(zip(FORMAT_SUMS, of_format, strict=True)),
            maxima | dict(zip(FORMAT_MAXIMA, extrema, strict=True)),
        )


class Figures(Mapping[str, float]):
    """Metrics by key: ``metric`` and ``metric/format``; NaN where one has no value.

    Args:
        vectors: What they follow from: under None those of the parameter, and those of each format
            under its name.
        layers: Of which layers the vectors are the weighted sums, for the figures of a model.
    """

    def __init__(
        self, vectors: Mapping[str | None, Vectors], layers: Sequence[Figures] = ()
    ) -> None:
        self._vectors = vectors
        self._layers = layers
        self._numbers: dict[str | None, Numbers] = {}
        self._known: dict[str, float] = {}

    @classmethod
    def of_layer(
        cls, formats: Sequence[str], sums: Sequence[float], maxima: Sequence[float]
    ) -> Figures:
        """Those of one layer's `LayerStatistics`."""
        vectors: dict[str | None, Vectors] = {None: Vectors(sums, maxima)}
        vectors |= {name: Vectors(sums, maxima, k) for k, name in enumerate(formats)}
        return cls(vectors)

    @property
    def formats(self) -> tuple[str, ...]:
        """Names of the formats."""
        return tuple(name for name in self._vectors if name is not None)

    @property
    def population(self) -> int:
        """How many elements the figures stand for."""
        return round(self._vectors[None].sums[_POPULATION])

    @property
    def elements(self) -> int:
        """How many were measured."""
        if self._layers:
            return sum(layer.elements for layer in self._layers)
        return round(self._vectors[None].sums[_ELEMENTS])

    def __getitem__(self, key: str) -> float:
        """The value of a metric.

        Raises:
            KeyError: No metric of this name, or no such format here; says which there are.
        """
        if key not in self._known:
            metric, format = self._parse(key)
            self._known[key] = metric.formula(self._of(format))
        return self._known[key]

    def __iter__(self) -> Iterator[str]:
        """The keys, those of the parameter first."""
        return iter(keys_of(self.formats))

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
        metric, format = self._parse(key)
        formula = metric.formula
        if not isinstance(formula, (Share, KeptShare)):
            return math.nan
        value, total = self[key], formula.denominator(self._of(format))
        if math.isnan(value) or not total:
            return math.nan
        if not self._layers:
            return math.sqrt(_variance(formula, self._of(format), value)) / total
        judged = [layer._of(format) for layer in self._layers if format in layer._vectors]  # noqa: SLF001
        weights = [n.sum["population"] / max(n.sum["elements"], 1) for n in judged]
        variances = [_variance(formula, n, value) for n in judged]
        return math.sqrt(sum(w * w * v for w, v in zip(weights, variances, strict=True))) / total

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
        first, total = (0, "moved") if key == "ulps" else (FIRST_STEPS_OCTAVE, "judged")
        below, *counts = histogram_of(self._of(format or None), name, total)
        return Histogram(first, (max(below, 0.0), *counts))

    def _of(self, format: str | None) -> Numbers:
        if format not in self._numbers:
            self._numbers[format] = self._vectors[format].numbers()
        return self._numbers[format]

    def _parse(self, key: str) -> tuple[Metric, str | None]:
        name, _, format = key.partition("/")
        try:
            metric = get_metric(name)
        except ValueError as error:
            raise KeyError(str(error)) from None
        if (name in FORMAT_METRICS) != bool(format) or (format or None) not in self._vectors:
            expected = "metric" if name in LAYER_METRICS else "metric/format"
            raise KeyError(f"{key!r}: expected {expected}, with a format of {self.formats}")
        return metric, format or None


def _variance(formula: Share | KeptShare, n: Numbers, value: float) -> float:
    """Of the sum of the residuals over one layer's sample, of which many could have been drawn."""
    population, elements = n.sum["population"], n.sum["elements"]
    if elements >= population or not formula.denominator(n):
        return 0.0
    carrying = elements
    if isinstance(formula, KeptShare):
        carrying = n.sum["judged_sq"] * n.sum["judged_sq"] / (n.sum["judged_4th"] or math.inf)
    if carrying < _FEWEST:
        return math.nan
    residuals = max(formula.squared_residuals(n, value), 0.0)
    return (1 - elements / population) * elements / (elements - 1) * residuals


@functools.lru_cache(maxsize=64)
def keys_of(formats: tuple[str, ...]) -> tuple[str, ...]:
    """Of all figures, in their order."""
    of_formats = (f"{metric}/{format}" for format in formats for metric in FORMAT_METRICS)
    return (*LAYER_METRICS, *of_formats)


def model_figures(layers: Sequence[Figures]) -> Figures:
    """Those of layers together, each with the weight of all its elements.

    Raises:
        ValueError: There is no layer.
    """
    if not layers:
        raise ValueError("layers=[]: expected the figures of one or more layers")
    formats = dict.fromkeys(format for layer in layers for format in layer.formats)
    vectors: dict[str | None, Vectors] = {}
    for format in (None, *formats):
        judged = [layer._vectors[format] for layer in layers if format in layer._vectors]  # noqa: SLF001
        vectors[format] = _merged(judged)
    return Figures(vectors, layers)


def _merged(each: Sequence[Vectors]) -> Vectors:
    weights = [v.sums[_POPULATION] / max(v.sums[_ELEMENTS], 1) for v in each]
    columns = zip(*(v.sums for v in each), strict=True)
    sums = [sum(w * x for w, x in zip(weights, column, strict=True)) for column in columns]
    sums[_POPULATION] = sums[_ELEMENTS]
    maxima = [max(column) for column in zip(*(v.maxima for v in each), strict=True)]
    return Vectors(sums, maxima, each[0].position)


def metrics_of(statistics: Sequence[LayerStatistics]) -> list[Figures]:
    """The figures of each, from one host copy."""
    if not statistics:
        return []
    numbers = torch.cat([v for each in statistics for v in (each.sums, each.maxima)]).tolist()
    figures, start = [], 0
    for each in statistics:
        middle = start + sum_count(len(each.formats))
        stop = middle + max_count(len(each.formats))
        figures.append(Figures.of_layer(each.formats, numbers[start:middle], numbers[middle:stop]))
        start = stop
    return figures
