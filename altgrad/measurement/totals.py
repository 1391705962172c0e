"""`Layers`: add up the sums of rows, which gives one vector of sums and maxima for each layer.

The kernel sums quantities such as update² over rows, each of which holds elements of one layer. It
returns each sum for all formats side by side. A vector has all sums of a format side by side
instead (see `columns`). One `index_select` with precomputed indices brings them in order::

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
    """A grouping of rows of sampled elements into clusters, for the standard errors of metrics.

    A metric such as stall_frac is a ratio Σ a / Σ b over elements, each with an a and a b. Elements
    that were drawn in blocks of neighbours may be alike. Each cluster, one or several rows of such
    a sample, then counts as one draw with the sums A = Σ a and B = Σ b over its elements. Standard
    errors follow from A², A · B and B².

    Attributes:
        row_clusters: Index of the cluster of each row, int64 (rows).
        cluster_layers: Index of the layer of each cluster, int64 (clusters).
        counted: A column of zeros, and the number of elements of each row, float64 (rows, 2).
        terms: Which columns of `counted` and the sums of a row, side by side, give Σ a and Σ b of
            each ratio, int64 (3 · ratios). First come the columns that are Σ a, then those that are
            Σ b, then those to subtract from Σ a. Column 0, of zeros, is to subtract nothing.
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

        A metric such as stall_frac is a ratio Σ a / Σ b over elements. A and B are the sums of a
        and b over a cluster, one or several rows of a sample that was drawn in blocks of
        neighbours.

        Args:
            sums: Sums of each row, float64 (rows, sums) in the order of `row_sums`.
            layers: Number of layers.

        Returns:
            Σ A², Σ A · B and Σ B² of each ratio, float64 (layers, 3 · ratios).
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
    """A description of one or several layers, by which sums of rows are added up to sums of layers.

    A row holds elements of one layer, and a layer has one or more rows. The method `add_up` makes a
    vector of sums and maxima for each layer. A step changes the counts of the histograms alone.

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
        products: Σ A², Σ A · B and Σ B² over the clusters that `add_cluster` has added, for each
            metric Σ a / Σ b, float64 (layers, 3 · metrics). A and B are the sums of a and b over
            one cluster.
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
        """Describe layers by the rows that hold their elements, with histograms of counts 0.

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
        """Return a copy that also counts one more chunk of elements; self must have a single layer.

        The layer's sample was drawn in blocks of neighbours, which may be alike. A chunk of it
        then counts as one draw, a *cluster*. For each metric Σ a / Σ b, with the chunk's sums A
        and B of a and b, A², A · B and B² are added to `products`. Standard errors follow from
        these.

        Args:
            sums: Sums of the chunk, float64 (1, sums) in the order of `row_sums`.
            elements: Number of elements of the chunk.
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
    """Return which of a layer's sums and maxima have a meaning for the dtype of the weights.

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
    """List the sums and maxima over a layer's elements, such as Σ update², in their order.

    All metrics of the layer follow from these. Some are of a number format, such as the number of
    updates that bf16 would lose.

    Args:
        formats: Number of number formats.

    Returns:
        The name of each sum or maximum, and the index of its format, or None if it has none.
    """
    columns: list[_Column] = [(name, None) for name in SUMS]
    columns += [(name, format) for format in range(formats) for name in FORMAT_SUMS]
    columns += [(f"max {name}", None) for name in MAXIMA]
    columns += [(f"max {name}", f) for f in range(formats) for name in FORMAT_MAXIMA]
    return columns


@functools.cache  # the list takes longer to make than a small layer to measure
def _source(formats: int) -> tuple[list[_Column], ...]:
    """List the sums and maxima over elements, such as Σ update², that `Layers.add_up` joins.

    Args:
        formats: Number of number formats, such as bf16, for each of which there are some sums.

    Returns:
        The name of each, and the index of its format or None, in five parts, as `add_up` joins
        them: counted, sums, products, octaves and extrema.
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
    """Return the indices by which `Layers.add_up` brings the sums of layers into their final order.

    Before, each sum stands for all formats side by side, as in `_source`. Afterwards all sums of
    one format stand side by side, as in `_columns`.

    Args:
        formats: Number of formats.
        device: Device of the result.

    Returns:
        For each column of the result of `add_up`, its index before the reordering, int64 (columns).
    """
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
    """Return which columns of a row of sums make up the metrics that have a standard error.

    Such a metric is a ratio (plus − minus) / total of three sums over elements.

    Args:
        formats: Number of formats.
        device: Device of the result.

    Returns:
        Columns, int64 (3 · metrics), as in `Clusters.terms`: those of plus for all metrics, then
        those of total, then those of minus. Column 0 stands for 0, to subtract nothing, column 1
        for the number of elements, and the sums follow in the order of the kernel's `row_sums`.
    """
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
    """Yield each metric's name with its formula, an `Estimate`: a ratio of sums over elements."""
    for name in names:
        formula = FORMULAS[name]
        assert isinstance(formula, Estimate)
        yield name, formula
