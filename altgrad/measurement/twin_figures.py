"""`TwinFigures`: the figures of the twins of a layer or a model, as plain numbers.

A twin is a sample of a layer that is stored and stepped as a recipe says. `TwinValues` has the sums
over all twins of a step from which the figures follow, as they were copied to the host.

Read `twin_table` first, which computes the figures; `figures` comes next.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from altgrad.measurement.catalogue import twin_keys, twin_metrics
from altgrad.measurement.intervals import find_interval
from altgrad.measurement.numbers import Numbers
from altgrad.measurement.twin_parts import TwinPart
from altgrad.measurement.twin_sums import TwinColumns
from altgrad.measurement.twin_table import TwinTable


@dataclass(frozen=True, eq=False)
class TwinValues:
    """The sums of all twins of a step, from which metrics such as progress_kept follow.

    A twin is a sample of a layer that is stored and stepped as a recipe says. Most metrics of twins
    are ratios Σ a / Σ b over its elements. For progress_kept, a is the element's movement since the
    start times its movement in float32, and b is the square of the latter.

    Attributes:
        table: The sums, with a row for each layer and recipe.
        rows: For each layer, by name, its row in the table for each recipe, by name.
        averages: For each state that only some layers have, such as an average of a part of the
            weights, or a running statistic of BatchNorm, the names of these layers.
    """

    table: TwinTable
    rows: Mapping[str, Mapping[str, int]]
    averages: Mapping[str, Collection[str]] = field(default_factory=dict)

    def find_states(self, layer: str) -> tuple[str, ...]:
        """Return the names of the states of a layer, by its name."""
        return tuple(s for s in self.table.states if layer in self.averages.get(s, (layer,)))

    @classmethod
    def read(
        cls,
        names: tuple[Sequence[str], Sequence[str], Sequence[str]],
        values: Numbers,
        *,
        sizes: Sequence[int],
        populations: Sequence[int],
        blocks: Sequence[int] = (),
    ) -> TwinValues:
        """Read the sums of twins that `measure_twins` returned, after their copy to the host.

        A twin is a sample of a layer that is stored and stepped as a recipe says.

        Args:
            names: Names of the layers, of the recipes, and of the optimizer's states.
            values: The sums, float64 (layers, recipes, columns), in the order of `TwinColumns`.
            sizes: Number of sampled elements of each layer.
            populations: Number of elements of each layer.
            blocks: Number of blocks in which the sample of each layer was drawn, 0 for single
                elements. Empty for layers of single elements alone.

        Returns:
            The sums by layer and recipe.
        """
        layers, recipes, states = names
        counted = np.array([populations, sizes, blocks or [0] * len(sizes)], dtype=np.float64).T
        vectors = values.reshape(len(layers) * len(recipes), len(TwinColumns(tuple(states))))
        rows = iter(range(len(vectors)))
        return cls(
            TwinTable(states, vectors, counted.repeat(len(recipes), axis=0)),
            {layer: {recipe: next(rows) for recipe in recipes} for layer in layers},
        )

    @classmethod
    def read_parts(
        cls, parts: Sequence[TwinPart], averages: Mapping[str, Collection[str]] | None = None
    ) -> TwinValues | None:
        """Read the sums of a step's twins, of one rank or of all ranks together.

        A twin is a sample of a layer that is stored and stepped as a recipe says.

        Args:
            parts: The sums.
            averages: The `averages` attribute; None if all layers have all states.

        Returns:
            The sums by layer and recipe; None if there are no parts.
        """
        each = [
            cls.read(
                (part.layers, part.recipes, part.states),
                part.values,
                sizes=part.sizes,
                populations=part.populations,
                blocks=part.blocks,
            )
            for part in parts
        ]
        return replace(cls.join(each), averages=averages or {}) if each else None

    @classmethod
    def join(cls, parts: Sequence[TwinValues]) -> TwinValues:
        """Join the sums of several sets of twins.

        A twin is a sample of a layer that is stored and stepped as a recipe says.

        A layer may be in several sets, with other recipes in each.

        Args:
            parts: The sums of each set.

        Returns:
            The sums of all sets, with all recipes of each layer.
        """
        states, vectors, counted = _stack([(p.table, range(len(p.table.vectors))) for p in parts])
        rows: dict[str, dict[str, int]] = {}
        start = 0
        for part in parts:
            for layer, own in part.rows.items():
                rows.setdefault(layer, {}).update({name: start + row for name, row in own.items()})
            start += len(part.table.vectors)
        return cls(TwinTable(states, vectors, counted), rows)


class TwinFigures(Mapping[str, float]):
    """A mapping of figures, the values of metrics, of twins by key: ``metric/recipe``.

    A twin is a sample of a layer that is stored and stepped as a recipe says.

    It holds the figures of one layer, or those of a model. A figure is NaN if it has no value.
    `altgrad.measurement.catalogue` lists all metrics.

    Args:
        table: The table that has the figures.
        rows: For each recipe, by name, the row of the layer or model in the table.
        states: Names of those states of the table that the layer or model has; None for all.
    """

    def __init__(
        self, table: TwinTable, rows: Mapping[str, int], states: tuple[str, ...] | None = None
    ) -> None:
        self._table = table
        self._rows = rows
        self._states = table.states if states is None else states
        self._columns = _choose_columns(self._states, table.states)

    @property
    def recipes(self) -> tuple[str, ...]:
        """The names of the recipes, such as ``bf16-sr``, for which there are figures.

        A recipe says in which formats weights and optimizer states are stored. The figures (values
        of metrics) are of a *twin*: a sample of a layer that is stored and stepped so.
        """
        return tuple(self._rows)

    @property
    def states(self) -> tuple[str, ...]:
        """The names of the states, such as ``exp_avg_sq``, for which there are figures."""
        return self._states

    @property
    def keys_in_order(self) -> tuple[str, ...]:
        """The keys of all figures (values of metrics): ``metric/recipe``, recipe by recipe.

        A *recipe* says how weights and optimizer states are stored.
        """
        return twin_keys(self.recipes, self._states)

    @property
    def moved_elements(self) -> float:
        """The number of sampled elements that the twin in fp32 has moved since the start.

        The twin in fp32 is a sample of each layer with float32 weights and states.

        If recipes have different samples, as with different block sizes, this is the number of the
        sample with the most. NaN without recipes.
        """
        return max((self._table.moved[row] for row in self._rows.values()), default=math.nan)

    def __getitem__(self, key: str) -> float:
        """Return one figure, the value of a metric; NaN if it has no value.

        Args:
            key: ``metric/recipe``.

        Raises:
            KeyError: The metric or the recipe is unknown; the message lists those that are known.
        """
        row, column = self._find_place(key)
        value = self._table.figures[row, column].item()
        # math.nan itself: lists and tuples compare by identity first, so that equal figures compare
        # as equal also if they are NaN.
        return math.nan if math.isnan(value) else value

    def __contains__(self, key: object) -> bool:
        """Return True if there is a figure (value of a metric) with this key, ``metric/recipe``."""
        metric, _, recipe = str(key).partition("/")
        return recipe in self._rows and metric in self._columns

    def __iter__(self) -> Iterator[str]:
        """Iterate over the keys, ``metric/recipe``: those of each recipe in turn."""
        return iter(self.keys_in_order)

    def __len__(self) -> int:
        """Return the number of keys."""
        return len(self._rows) * len(self._columns)

    def standard_error(self, key: str) -> float:
        """Return the standard error of a figure, a metric's value, that comes from a sample.

        The sample is the *twin*: the elements of a layer that are stored in the formats of a recipe
        and stepped beside the training. The figure estimates that of the whole layer.

        Args:
            key: ``metric/recipe``, such as ``frozen_frac/bf16-sr``.

        Returns:
            The standard error, in the unit of the figure. NaN for ``drift``,
            ``moved_rms``, ``{state}_ratio`` and ``{state}_error``, which have none, and where the
            sample is too small; see `Figures.standard_error`. 0 if the sample is the whole layer.

        Raises:
            KeyError: The metric or the recipe is unknown.
        """
        row, _ = self._find_place(key)
        return float(self._table.estimate_errors(key.partition("/")[0])[row])

    def interval(self, key: str) -> tuple[float, float]:
        """Return the confidence interval of 95 % around a figure, a metric's value.

        Args:
            key: ``metric/recipe``.

        Returns:
            The lower and the upper end. Both are NaN where `standard_error` returns NaN.

        Raises:
            KeyError: The metric or the recipe is unknown.
        """
        return find_interval(key.partition("/")[0], self[key], self.standard_error(key))

    def in_order(self) -> Sequence[float]:
        """Return all figures, values of metrics, in the order of keys; faster than one by one."""
        rows = self._table.figures[[*self._rows.values()]]
        figures: list[float] = rows[:, [*self._columns.values()]].ravel().tolist()
        return figures

    def errors_in_order(self, metrics: Sequence[str]) -> Sequence[float]:
        """Return the standard errors of some metrics: all of a recipe, then those of the next.

        Args:
            metrics: Names of the metrics.

        Returns:
            The errors, faster than one by one.
        """
        rows = [*self._rows.values()]
        each = [self._table.estimate_errors(name)[rows].tolist() for name in metrics]
        return [error for by_metric in zip(*each, strict=True) for error in by_metric]

    def describe_keys(self, metric: str) -> str:
        """Describe the keys that a metric has, for the message of an error about another key.

        Args:
            metric: Name of a metric of twins.

        Returns:
            The end of a sentence that begins with "expected", such as "metric/recipe, with a recipe
            of …".
        """
        if not self._rows:
            return f"no {metric}, since no twins were measured; name recipes to measure some"
        if metric not in self._columns:
            return f"a state of {self._states}"
        return f"metric/recipe, with a recipe of {self.recipes}"

    def find_layers(self) -> Sequence[tuple[str, int]]:
        """Return the rows of `table` with the layers that these figures (values of metrics) cover.

        Returns:
            Pairs of recipe and row. A layer has one row for each recipe; a model has those of all
            its layers.
        """
        members, rows = self._table.members, self._rows.items()
        return [(recipe, own) for recipe, row in rows for own in members.get(row, (row,))]

    @property
    def table(self) -> TwinTable:
        """The table that computes these figures, and those of other layers, from sums.

        It has a row for each layer or model, and recipe. A row has sums over the elements of a
        *twin*: a sample of the layer that is stored and stepped as the recipe says.
        """
        return self._table

    @property
    def rows(self) -> Mapping[str, int]:
        """The row of `table` that has the figures of each recipe, a way to store weights."""
        return self._rows

    def _find_place(self, key: str) -> tuple[int, int]:
        """Find the row and the column of the table with the figure of a key, ``metric/recipe``."""
        metric, _, recipe = key.partition("/")
        if key not in self:
            raise KeyError(f"{key!r}: expected {self.describe_keys(metric)}")
        return self._rows[recipe], self._columns[metric]


def split_twins(
    values: TwinValues | None, layers: Iterable[str]
) -> tuple[Mapping[str, TwinFigures], TwinFigures]:
    """Return the figures of the twins of each layer, and of the model that the layers form.

    A twin is a sample of a layer that is stored and stepped as a recipe says. A figure is the value
    of a metric.

    Args:
        values: The sums of all twins of a step; None without twins.
        layers: Names of the layers that form the model.

    Returns:
        The figures of each layer that has twins, by name, and the figures of the model.
    """
    own = {} if values is None else {n: values.rows[n] for n in layers if n in values.rows}
    if values is None or not own:
        return {}, NO_TWINS
    pairs = [pair for rows in own.values() for pair in rows.items()]
    table, model = _tabulate([(values.table, pairs)])
    places = iter(range(len(pairs)))
    each = {name: {recipe: next(places) for recipe in rows} for name, rows in own.items()}
    layers_figures = {
        name: TwinFigures(table, rows, values.find_states(name)) for name, rows in each.items()
    }
    return layers_figures, TwinFigures(table, model)


def merge_twins(figures: Sequence[TwinFigures]) -> TwinFigures:
    """Combine the figures of the twins of layers into those of the model that the layers form.

    A twin is a sample of a layer that is stored and stepped as a recipe says. A figure is the value
    of a metric.

    Args:
        figures: Figures of layers or models, of one step or of several.

    Returns:
        The figures of the model, for each recipe of any of the layers. Those of a recipe are over
        the layers that have the recipe.
    """
    parts = [(each.table, each.find_layers()) for each in figures if each.recipes]
    if not parts:
        return NO_TWINS
    table, rows = _tabulate(parts)
    known = {state for each in figures for state in each.states}
    return TwinFigures(table, rows, tuple(state for state in table.states if state in known))


def _tabulate(
    parts: Sequence[tuple[TwinTable, Sequence[tuple[str, int]]]],
) -> tuple[TwinTable, Mapping[str, int]]:
    """Make one table from rows of several tables of twins, and add the model that they form.

    A twin is a sample of a layer that is stored and stepped as a recipe says.

    Args:
        parts: Tables, each with the rows to take from it: the name of the recipe, and the row.

    Returns:
        The table, which begins with these rows in order; and, by name of each recipe, the row of
        the model.
    """
    stacked = _stack([(table, [row for _, row in pairs]) for table, pairs in parts])
    return TwinTable.with_model(*stacked, [recipe for _, pairs in parts for recipe, _ in pairs])


def _stack(
    parts: Sequence[tuple[TwinTable, Sequence[int]]],
) -> tuple[tuple[str, ...], Numbers, Numbers]:
    """Put rows of several tables of twins below each other.

    A twin is a sample of a layer that is stored and stepped as a recipe says.

    Args:
        parts: Tables, each with the rows to take from it.

    Returns:
        The `TwinTable` arguments `states`, `vectors` and `counted` for all these rows.
    """
    states = tuple(dict.fromkeys(state for table, _ in parts for state in table.states))
    vectors = [table.convert_rows(states, rows) for table, rows in parts]
    counted = [table.counted[[*rows]] for table, rows in parts]
    return states, np.concatenate(vectors), np.concatenate(counted)


@lru_cache(maxsize=64)
def _choose_columns(states: tuple[str, ...], all_states: tuple[str, ...]) -> Mapping[str, int]:
    """Return by metric its column in a `TwinTable`, for a layer that lacks some optimizer states.

    Args:
        states: Names of the states that the layer has.
        all_states: Names of the states that the table has.

    Returns:
        The columns of the metrics of `states`, and of the metrics that need no state.
    """
    columns = {name: column for column, name in enumerate(twin_metrics(all_states))}
    return {name: columns[name] for name in twin_metrics(states)}


NO_TWINS = TwinFigures(TwinTable((), np.zeros((0, len(TwinColumns()))), np.zeros((0, 3))), {})
"""The `TwinFigures` of a layer of which no sample is stepped as a recipe says: an empty mapping."""
