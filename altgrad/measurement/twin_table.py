"""`TwinTable`: the sums from which the metrics of twins follow, on the host, and their figures.

A twin is a sample of a layer that is stored and stepped as a recipe says; a recipe says in which
formats. A metric of a twin is a ratio Σ a / Σ b over its elements, such as ``progress_kept``, or a
median over them, of a state of the optimizer divided by that in float32.

The table has a row for each layer and recipe, and a row for the model and each recipe. The sums of
a model are those of its layers, each weighted so that its sample stands for all elements of the
layer. The median of a model is the median of those of its layers, each weighted by its number of
elements.

Read `twin_parts` and `standard_errors` first; `twin_figures` comes next and reads single rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache

import numpy as np

from altgrad.measurement.catalogue import STATED_TWIN_ERRORS, get_metric, twin_metrics
from altgrad.measurement.metrics import quiet
from altgrad.measurement.numbers import Numbers
from altgrad.measurement.standard_errors import EstimateSums, standard_errors
from altgrad.measurement.twin_sums import SUMS, TwinColumns

_CARRIED = {
    "progress_kept": "frozen_frac",
    "window_progress_kept": "still_frac",
    "step_projection": "still_frac",
}
"""For three metrics Σ a / Σ b, another metric whose denominator counts the elements with b ≠ 0.

In these three, b is a square, so that Σ b is no count. Standard errors need the count, and read it
from the other metric. For ``step_projection`` it may be too high, since it includes elements that
moved only before the latest step.
"""


class TwinTable:
    """A table of sums over the elements of twins, with the metrics that follow, and their errors.

    A twin is a sample of a layer that is stored and stepped as a recipe says. A metric such as
    ``progress_kept`` is a ratio Σ a / Σ b over its elements, or a median.

    A row is a layer with a recipe, or a model with a recipe.

    Args:
        states: Names of the optimizer's states, such as ``exp_avg_sq``.
        vectors: Sums and medians of each row, float64 (rows, columns) in the order of
            `TwinColumns`.
        counted: For each row, the layer's number of elements, the number in its sample, and the
            number of blocks in which these were drawn, 0 for single elements, float64 (rows, 3).
        members: For each row of a model, the rows of the layers that form the model.

    Attributes:
        states: The `states` argument.
        vectors: The `vectors` argument.
        counted: The `counted` argument.
        members: The `members` argument; empty by default.
        columns: Position of each metric in the rows of `figures`.
    """

    def __init__(
        self,
        states: Sequence[str],
        vectors: Numbers,
        counted: Numbers,
        members: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        self.states = tuple(states)
        self.vectors = vectors
        self.counted = counted
        self.members = members or {}
        self.columns = _number_metrics(self.states)
        self._layout = TwinColumns(self.states)
        self._errors: dict[str, Numbers] = {}  # of each metric

    @classmethod
    def with_model(
        cls, states: Sequence[str], vectors: Numbers, counted: Numbers, recipes: Sequence[str]
    ) -> tuple[TwinTable, Mapping[str, int]]:
        """Make the table of all layers' twins, and add a row for the whole model in each recipe.

        A *recipe* says in which formats weights and optimizer states are stored. A *twin* is a
        sample of a layer that is stored and stepped so, beside the training. A row has the sums
        over the sample's elements that compare the twin with one in float32. The model's figures
        for a recipe are over the layers that have the recipe.

        Args:
            states: Names of the optimizer's states.
            vectors: Sums and medians of each layer and recipe, float64 (rows, columns) in the order
                of `TwinColumns`.
            counted: For each row, the layer's number of elements, the number in its sample, and the
                number of blocks in which these were drawn, float64 (rows, 3).
            recipes: Name of the recipe of each row.

        Returns:
            The table, and the row of the model by name of each recipe.
        """
        rows: dict[str, list[int]] = {}
        for row, recipe in enumerate(recipes):
            rows.setdefault(recipe, []).append(row)
        layout = TwinColumns(tuple(states))
        merged = [_merge(layout, vectors[own], counted[own]) for own in rows.values()]
        populations = [counted[own, 0].sum() for own in rows.values()]
        table = cls(
            states,
            np.concatenate((vectors, *merged)),
            # A model's sums are weighted to stand for all elements, as if all were in the sample.
            np.concatenate((counted, *([[each, each, 0.0]] for each in populations))),
            dict(enumerate(rows.values(), len(vectors))),
        )
        return table, {recipe: len(vectors) + place for place, recipe in enumerate(rows)}

    @cached_property
    def figures(self) -> Numbers:
        """The values of all metrics by row, a layer or model with a recipe, as in `columns`.

        A *recipe* says how weights and optimizer states are stored.
        """
        sums, medians = self._split()
        with quiet():
            ratios = sums[:, :, 0] / sums[:, :, 1]
        by_metric = dict(zip(self._layout.ratios, ratios.T, strict=True))
        by_metric |= zip(self._layout.medians, medians.T, strict=True)
        by_metric |= {name: np.sqrt(by_metric[name]) for name in self._layout.roots}
        return np.stack([by_metric[name] for name in self.columns], 1)

    def read_column(self, metric: str) -> Numbers:
        """Return the figures of a metric by row, a layer or model with a recipe, float64 (rows)."""
        return self.figures[:, self.columns[metric]]

    def estimate_errors(self, metric: str) -> Numbers:
        """Return the standard errors of a metric by row; NaN for a metric that has none.

        A row is a layer or model with a *recipe*, which says how weights and optimizer states are
        stored. The errors of `STATED_TWIN_ERRORS` are computed together, and those of all other
        metrics.

        Args:
            metric: Name of the metric.

        Returns:
            Standard errors, float64 (rows).
        """
        if metric not in self._errors:
            is_stated = metric in STATED_TWIN_ERRORS
            known = {*self._layout.ratios} - {*self._layout.roots}
            same = [name for name in self.columns if (name in STATED_TWIN_ERRORS) is is_stated]
            names = [name for name in same if name in known]
            missing = np.full(len(self.vectors), np.nan)
            self._errors |= dict.fromkeys(same, missing)
            found = standard_errors(self._estimate_sums(names), self.counted, self.members)
            self._errors |= zip(names, found.T, strict=True)
        return self._errors[metric]

    @cached_property
    def moved(self) -> list[float]:
        """The number of sampled elements that the twin in fp32 has moved, by row.

        A row is a layer or model with a recipe. The twin in fp32 is a sample of each layer with
        float32 weights and states.
        """
        numbers: list[float] = self.vectors[:, -1].tolist()
        return numbers

    def convert_rows(self, states: Sequence[str], rows: Sequence[int]) -> Numbers:
        """Return some rows of `vectors`, their columns arranged for other optimizer states.

        Args:
            states: Names of the states of the result, which include those of the table.
            rows: The rows to convert.

        Returns:
            Sums and medians, float64 (rows, columns) in the order of `TwinColumns`, with sums of 0
            and medians of NaN for states that this table does not have.
        """
        vectors: Numbers = self.vectors[[*rows]]
        if self.states == tuple(states):
            return vectors
        layout = TwinColumns(tuple(states))
        converted = np.zeros((len(vectors), len(layout)))
        sums, medians = _split(layout, converted)
        medians[:] = np.nan
        own_sums, own_medians = _split(self._layout, vectors)
        sums[:, [layout.ratios.index(name) for name in self._layout.ratios]] = own_sums
        medians[:, [layout.medians.index(name) for name in self._layout.medians]] = own_medians
        converted[:, -1] = vectors[:, -1]
        return converted

    def _split(self) -> tuple[Numbers, Numbers]:
        return _split(self._layout, self.vectors)

    def _estimate_sums(self, names: Sequence[str]) -> EstimateSums:
        """Return sums over the elements of twins, from which standard errors of metrics follow.

        A twin is a sample of a layer that is stored and stepped as a recipe says.

        Args:
            names: Names of the metrics.
        """
        sums = self._split()[0]
        places = [self._layout.ratios.index(name) for name in names]
        is_share = np.array([float(get_metric(name).unit == "share") for name in names])
        carrying = np.stack([self._count_carrying(sums, name) for name in names], axis=1)
        a, b, aa, ab, bb = np.moveaxis(sums[:, places], 2, 0)
        shares = np.broadcast_to(is_share, carrying.shape)
        return EstimateSums(a, b, aa, ab, bb, carrying, shares)

    def _count_carrying(self, sums: Numbers, name: str) -> Numbers:
        """Count the elements with b other than 0 in the metric Σ a / Σ b called `name`, (rows)."""
        if name == "decay_projection":  # b is weight², so that all finite elements count
            a, b = sums[:, self._layout.ratios.index("twin_nonfinite_frac"), :2].T
            finite: Numbers = b - a
            return finite
        counts: Numbers = sums[:, self._layout.ratios.index(_CARRIED.get(name, name)), 1]
        return counts


@lru_cache(maxsize=64)
def _number_metrics(states: tuple[str, ...]) -> Mapping[str, int]:
    """Return the position of each metric of twins in a row of `TwinTable.figures`."""
    return {name: column for column, name in enumerate(twin_metrics(states))}


def _split(layout: TwinColumns, vectors: Numbers) -> tuple[Numbers, Numbers]:
    """Split rows of a `TwinTable` into the sums of ratios and the medians, as views.

    A row is about a twin: a sample of a layer that is stored and stepped as a recipe says. Most of
    its metrics, such as ``progress_kept``, are ratios Σ a / Σ b over the elements of the sample.
    The others are medians over these elements, one for each state of the optimizer, of the state in
    the twin divided by that in float32.

    Args:
        layout: The columns of the rows.
        vectors: The rows, float64 (rows, columns).

    Returns:
        Σ a, Σ b, Σ a², Σ a · b and Σ b² of each ratio, (rows, ratios, 5), and the medians, (rows,
        states).
    """
    stop = len(layout.ratios) * len(SUMS)
    sums = vectors[:, :stop].reshape(len(vectors), len(layout.ratios), len(SUMS))
    return sums, vectors[:, stop : stop + len(layout.medians)]


def _merge(layout: TwinColumns, vectors: Numbers, counted: Numbers) -> Numbers:
    """Merge the sums and medians of the twins of layers into those of the model they form.

    A twin is a sample of a layer that is stored and stepped as a recipe says. Its sums are
    multiplied by the layer's number of elements over that of the sample, so that they stand for the
    whole layer.

    Args:
        layout: The columns of the vectors.
        vectors: Sums and medians of each layer, float64 (layers, columns).
        counted: For each layer its number of elements, the number in its sample, and the number of
            blocks in which these were drawn, float64 (layers, 3).

    Returns:
        The merged vector, float64 (1, columns).
    """
    weights = counted[:, 0] / np.maximum(counted[:, 1], 1)
    merged: Numbers = (weights[:, None] * vectors).sum(0)[None]
    (medians,) = _split(layout, merged)[1]
    for place, column in enumerate(_split(layout, vectors)[1].T):
        medians[place] = find_weighted_median(column, counted[:, 0])
    merged[0, -1] = vectors[:, -1].sum()
    return merged


def find_weighted_median(numbers: Numbers, weights: Numbers) -> float:
    """Return the weighted median: the smallest number up to which half of the weight lies.

    Args:
        numbers: Numbers, float64 (numbers). NaN is left out.
        weights: The weight of each number, float64 (numbers).

    Returns:
        The median; NaN if every number is NaN or has the weight 0.
    """
    known = ~np.isnan(numbers) & (weights > 0)
    if not known.any():
        return math.nan
    order = np.argsort(numbers[known])
    below = np.cumsum(weights[known][order])
    return float(numbers[known][order][np.searchsorted(below, below[-1] / 2)])
