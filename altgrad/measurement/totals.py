"""`Layers`: add up the sums of rows, which gives one vector of sums and maxima for each layer.

The kernel returns each sum for all formats side by side. A vector has all sums of a format side by
side instead (see `columns`). One `index_select` with precomputed indices brings them in order::

    kernel   kept of format 0 | kept of format 1 | lost_sq of format 0 | lost_sq of format 1
    vector   kept of format 0 | lost_sq of format 0 | kept of format 1 | lost_sq of format 1

Read `kernel` first; `chunks` and then `measurer` come next.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from altgrad.measurement.columns import (
    FORMAT_ESTIMATES,
    FORMAT_MAXIMA,
    FORMAT_ROW_MAXIMA,
    FORMAT_ROW_MINIMA,
    FORMAT_ROW_SQUARES,
    FORMAT_ROW_SUMS,
    FORMAT_SUMS,
    JUDGED,
    LAYER_ESTIMATES,
    MAXIMA,
    PRODUCTS,
    ROW_MAXIMA,
    ROW_MINIMA,
    ROW_SQUARES,
    ROW_SUMS,
    SUMS,
    WHAT_IF,
)
from altgrad.measurement.histogram import (
    FIRST_STEPS_OCTAVE,
    FIRST_WEIGHTS_OCTAVE,
    OCTAVES,
)
from altgrad.measurement.kernel import Histograms
from altgrad.measurement.metrics import FORMULAS, Estimate

_FLOAT64_BIAS = 1023  # added to exponents in float64; the kernel finds bins by biased exponents
_Column = tuple[str, int | None]  # name of a sum or maximum, and index of its format if it has one


class Clusters(NamedTuple):
    """The clusters that rows of elements form, with constants to compute products of their sums.

    A cluster is one or several rows of a sample that was drawn in blocks of neighbours. Neighbours
    may be alike: the standard error of an estimate Σ a / Σ b then follows from whole clusters, and
    not from single elements. It needs the products A², A · B and B² of the sums A and B of a and b
    over each cluster.

    Attributes:
        row_clusters: Index of the cluster of each row, int64 (rows).
        cluster_layers: Index of the layer of each cluster, int64 (clusters).
        counted: A column of zeros, and the number of elements of each row, float64 (rows, 2). They
            stand before the sums of a row; `terms` refers to the zeros if nothing is subtracted.
        terms: For each estimate (plus − minus) / total, the columns of its sums in `counted` and
            `row_sums` side by side, int64 (3 · estimates): those of plus, of total, of minus.
    """

    row_clusters: Tensor
    cluster_layers: Tensor
    counted: Tensor
    terms: Tensor

    @classmethod
    def create(
        cls, row_clusters: Tensor, row_layers: Tensor, row_elements: Tensor, formats: int
    ) -> Clusters:
        """Describe the clusters that rows of elements form.

        A cluster is one or several rows of a sample that was drawn in blocks of neighbours.

        Args:
            row_clusters: Index of the cluster of each row, int64 (rows).
            row_layers: Index of the layer of each row, int64 (rows).
            row_elements: Number of elements of each row, float64 (rows).
            formats: Number of formats.

        Returns:
            The clusters, on the device of the arguments.
        """
        layers = row_layers.new_zeros(int(row_clusters.max()) + 1)
        return cls(
            row_clusters,
            layers.scatter_(0, row_clusters, row_layers),
            torch.stack((torch.zeros_like(row_elements), row_elements), dim=1),
            _find_terms(formats, row_layers.device),
        )

    def add_products(self, sums: Tensor, layers: int) -> Tensor:
        """Add up the products A², A · B and B² over the clusters of each layer.

        A and B are the sums of a and b over a cluster, for an estimate Σ a / Σ b. A cluster is one
        or several rows of a sample that was drawn in blocks of neighbours.

        Args:
            sums: Sums of each row, float64 (rows, sums) in the order of `row_sums`.
            layers: Number of layers.

        Returns:
            Σ A², Σ A · B and Σ B² of each estimate, float64 (layers, 3 · estimates).
        """
        terms = torch.cat((self.counted, sums), dim=1).index_select(1, self.terms)
        by_cluster = sums.new_zeros(len(self.cluster_layers), terms.shape[1])
        by_cluster.index_add_(0, self.row_clusters, terms)
        plus, b, minus = by_cluster.chunk(3, dim=1)
        a = plus - minus
        products = torch.cat((a * a, a * b, b * b), dim=1)
        added = sums.new_zeros(layers, products.shape[1])
        return added.index_add_(0, self.cluster_layers, products)


class Layers(NamedTuple):
    """The layers that rows of elements belong to, with the constants for `add_up`.

    A step changes the counts of the histograms and nothing else.

    Attributes:
        counted: For each layer its number of elements, its number of measured elements, and the
            number of clusters of these, 0 without clusters, float64 (layers, 3).
        row_layers: Index of the layer of each row, int64 (rows).
        extremum_layers: `row_layers`, repeated for each maximum and minimum, int64 (rows, extrema).
        histograms: Counts of elements by octave (power of two) for all layers.
        order: For each column of a layer's vector, its place among the columns that `add_up` joins,
            int64 (columns).
        meant: False for columns that mean nothing and that `add_up` sets to 0, bool (columns):
            those that say what a format would keep of updates, if it is no coarser than the dtype
            of the weights. None if there are no such formats.
        clusters: The clusters of the rows. None if no elements were drawn in blocks.
        products: Σ A², Σ A · B and Σ B² of each estimate over the clusters that `add_cluster` has
            added, float64 (layers, 3 · estimates).
    """

    counted: Tensor
    row_layers: Tensor
    extremum_layers: Tensor
    histograms: Histograms
    order: Tensor
    meant: Tensor | None
    clusters: Clusters | None
    products: Tensor

    @classmethod
    def create(
        cls,
        row_layers: Tensor,
        counted: Tensor,
        judged: Sequence[bool],
        clusters: Clusters | None = None,
    ) -> Layers:
        """Describe the layers that rows of elements belong to, with histograms whose counts are 0.

        Args:
            row_layers: Index of the layer of each row, int64 (rows).
            counted: For each layer its number of elements, its number of measured elements, and the
                number of clusters of these, 0 without clusters, float64 (layers, 3).
            judged: For each format, True if it is coarser than the dtype of the weights. If not,
                its sums that say what it would keep of updates are 0.
            clusters: The clusters of the rows. None if no elements were drawn in blocks.

        Returns:
            The layers, on the device of `counted`.
        """
        formats, device = len(judged), counted.device
        return cls(
            counted,
            row_layers,
            row_layers.unsqueeze(1).expand(-1, len(_source(formats)[4])),
            _make_histograms(row_layers, len(counted), formats),
            _order(formats, device),
            _meant(judged, device),
            clusters,
            counted.new_zeros(len(counted), len(_source(formats)[2])),
        )

    def make_empty_row(self) -> tuple[Tensor, Tensor]:
        """Make what `row_sums` would return for one row without elements.

        Returns:
            Sums of 0, float64 (1, sums), and extrema of −inf, float64 (1, extrema).
        """
        _, sums, _, _, extrema = _source(self.histograms.steps_at.shape[1])
        return (
            self.counted.new_zeros(1, len(sums)),
            self.counted.new_full((1, len(extrema)), -torch.inf),
        )

    def add_cluster(self, sums: Tensor, elements: int) -> Layers:
        """Return a copy of these `Layers`, a single one, with one more cluster.

        The cluster is a chunk that was measured alone. Its sums are added to `products`, from which
        standard errors follow.

        Args:
            sums: Sums of the cluster, float64 (1, sums) in the order of `row_sums`.
            elements: Number of elements of the cluster.
        """
        count = sums.new_full((1,), elements)
        cluster = Clusters.create(
            self.row_layers, self.row_layers, count, self.histograms.steps_at.shape[1]
        )
        one = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64, device=sums.device)
        products = self.products + cluster.add_products(sums, 1)
        return self._replace(counted=self.counted + one, products=products)

    def add_up(self, sums: Tensor, extrema: Tensor) -> Tensor:
        """Add up the sums of each layer's rows of elements, to one vector for each layer.

        Args:
            sums: Sums of each row, float64 (rows, sums) in the order of `row_sums`.
            extrema: Maxima and negated minima of each row, float64 (rows, extrema), in the order of
                `row_sums`.

        Returns:
            Vectors, float64 (layers, columns): SUMS, FORMAT_SUMS of each format, MAXIMA,
            FORMAT_MAXIMA of each format.
        """
        layers, products = len(self.counted), self.products
        if self.clusters is not None:  # then no cluster was added by `add_cluster`
            products = self.clusters.add_products(sums, layers)
        if not layers == len(sums) == 1:  # a single row of a single layer needs no addition
            added = sums.new_zeros(layers, sums.shape[1])
            largest = extrema.new_full((layers, extrema.shape[1]), -torch.inf)
            sums = added.index_add_(0, self.row_layers, sums)
            extrema = largest.scatter_reduce_(0, self.extremum_layers, extrema, "amax")
        octaves = self.histograms.counts.view(layers, -1)
        vectors = torch.cat((self.counted, sums, products, octaves, extrema), dim=1)
        vectors = vectors.index_select(1, self.order)
        return vectors if self.meant is None else torch.where(self.meant, vectors, 0.0)


def _make_histograms(row_layers: Tensor, layers: int, formats: int) -> Histograms:
    """Make histograms with counts of 0.

    The histograms of a layer follow each other in this order, each with 64 bins. They count
    abs(update) in ULPs, abs(weight), and abs(update) over the spacing of each format::

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
        # scatter_add_ needs an increment for each index. A single 1.0 in memory, with stride 0,
        # looks like more elements than any tensor has:
        # https://docs.pytorch.org/docs/stable/generated/torch.Tensor.expand.html
        torch.ones((), dtype=torch.float64, device=device).expand(2**40),
    )


def _meant(judged: Sequence[bool], device: torch.device) -> Tensor | None:
    """Return a mask of the columns that have a meaning for the dtype of the weights.

    What-if sums say what a format would keep of updates. They mean nothing for a format that is no
    coarser than the dtype of the weights: the updates that it would lose are lost already.

    Args:
        judged: For each format, True if it is coarser than the dtype of the weights.
        device: Device of the mask.

    Returns:
        bool (columns), False for the what-if sums of formats where `judged` is False. None if there
        are no such formats.
    """
    if all(judged):
        return None
    what_if = {*WHAT_IF, *JUDGED, *(name for name in FORMAT_SUMS if name.startswith("steps["))}
    for name, formula in _estimates(FORMAT_ESTIMATES):
        if formula.total in JUDGED:
            what_if |= {f"{name} {product}" for product in PRODUCTS}
    meant = [
        name not in what_if or format is None or judged[format]
        for name, format in _columns(len(judged))
    ]
    return torch.tensor(meant, device=device)


def _columns(formats: int) -> list[_Column]:
    """List the columns of a layer's vector in order: name, and index of the format or None."""
    columns: list[_Column] = [(name, None) for name in SUMS]
    columns += [(name, format) for format in range(formats) for name in FORMAT_SUMS]
    columns += [(f"max {name}", None) for name in MAXIMA]
    columns += [(f"max {name}", f) for f in range(formats) for name in FORMAT_MAXIMA]
    return columns


def _source(formats: int) -> tuple[list[_Column], ...]:
    """List the columns that `Layers.add_up` joins: name, and index of the format or None.

    Returns:
        The columns of its five parts: counted, sums, products, octaves and extrema.
    """

    def each(names: tuple[str, ...], format_names: tuple[str, ...], how: str) -> list[_Column]:
        columns: list[_Column] = [(how.format(name), None) for name in names]
        return columns + [(how.format(name), f) for name in format_names for f in range(formats)]

    bins = range(OCTAVES)
    octaves: list[_Column] = [(f"{name}[{k}]", None) for name in ("ulps", "weights") for k in bins]
    octaves += [(f"steps[{k}]", f) for f in range(formats) for k in bins]
    products: list[_Column] = []
    for product in PRODUCTS:
        products += each(LAYER_ESTIMATES, FORMAT_ESTIMATES, f"{{}} {product}")
    return (
        [("population", None), ("elements", None), ("clusters", None)],
        each(ROW_SUMS, FORMAT_ROW_SUMS, "{}") + each(ROW_SQUARES, FORMAT_ROW_SQUARES, "{}"),
        products,
        octaves,
        each(ROW_MAXIMA, FORMAT_ROW_MAXIMA, "max {}")
        + each(ROW_MINIMA, FORMAT_ROW_MINIMA, "max minus_{}"),
    )


# The result is cached, for calls in inference mode and outside of it. A tensor that is made in
# inference mode cannot be used freely outside:
# https://docs.pytorch.org/docs/stable/notes/autograd.html#inference-mode
@functools.cache
@torch.inference_mode(mode=False)
def _order(formats: int, device: torch.device) -> Tensor:
    """Return where `_source` lists each column of a layer's vector, int64 (columns)."""
    columns = itertools.chain.from_iterable(_source(formats))
    source = {column: position for position, column in enumerate(columns)}
    order = [
        source[(JUDGED[name], None) if name in JUDGED else (name, format)]
        for name, format in _columns(formats)
    ]
    return torch.tensor(order, device=device)


@functools.cache
@torch.inference_mode(mode=False)
def _find_terms(formats: int, device: torch.device) -> Tensor:
    """Return which columns each estimate adds, divides by and subtracts, int64 (3 · estimates)."""
    columns: list[_Column] = [("", None), ("elements", None), *_source(formats)[1]]
    place = {column: position for position, column in enumerate(columns)}

    def find(name: str | None, format: int | None) -> int:
        name = JUDGED.get(name or "", name or "")
        return place[(name, None) if (name, None) in place else (name, format)]

    estimates: list[tuple[Estimate, int | None]]
    estimates = [(formula, None) for _, formula in _estimates(LAYER_ESTIMATES)]
    estimates += [(f, k) for _, f in _estimates(FORMAT_ESTIMATES) for k in range(formats)]
    terms = [find(formula.plus, format) for formula, format in estimates]
    terms += [find(formula.total, format) for formula, format in estimates]
    terms += [find(formula.minus, format) for formula, format in estimates]
    return torch.tensor(terms, device=device)


def _estimates(names: tuple[str, ...]) -> Iterator[tuple[str, Estimate]]:
    """Yield each name of a metric with its formula, an `Estimate`: a ratio Σ a / Σ b."""
    for name in names:
        formula = FORMULAS[name]
        assert isinstance(formula, Estimate)
        yield name, formula
