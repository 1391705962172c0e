"""`split_columns`: read the figures of the layers of a step as columns of the step's table.

Read `layer_columns` first, which says what columns are. `step_record` comes next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from altgrad.measurement.figures import Figures
from altgrad.measurement.layer_columns import LayerColumns, LayerRow, StandardErrors
from altgrad.measurement.numbers import Numbers


class _Places(NamedTuple):
    """The rows of a step's tables that have the figures of layers with equal keys.

    Attributes:
        first: The figures of one of the layers.
        rows: The rows of the layers for each format; under None, for metrics without a format.
        twin_rows: The rows of the layers for each recipe, in the table of the twins: samples that
            are stored and stepped as recipes say.
    """

    first: Figures
    rows: Mapping[str | None, Sequence[int]]
    twin_rows: Mapping[str, Sequence[int]]


class _TableColumns(Mapping[str, Sequence[float]]):
    """A mapping from keys to columns of the tables that layers with equal keys share.

    Args:
        places: The rows of the tables that have the figures of the layers.
        read: Method of a `StepTable` that returns its column for a key ``metric/format``.
        read_twins: Method of a `TwinTable` that returns its column for a metric of twins, samples
            that are stored and stepped as recipes say.
    """

    def __init__(
        self,
        places: _Places,
        read: Callable[[str], Numbers],
        read_twins: Callable[[str], Numbers],
    ) -> None:
        self._places = places
        self._read = read
        self._read_twins = read_twins

    def __getitem__(self, key: str) -> Sequence[float]:
        first, rows, twin_rows = self._places
        metric, _, name = key.partition("/")
        if key in first.twins:
            column = self._read_twins(metric)[[*twin_rows[name]]]
        elif key in first:
            column = self._read(key)[[*rows[name or None]]]
        else:
            raise KeyError(key)
        numbers: list[float] = column.tolist()
        return numbers

    def __contains__(self, key: object) -> bool:
        return key in self._places.first

    def __iter__(self) -> Iterator[str]:
        return iter(self._places.first)

    def __len__(self) -> int:
        return len(self._places.first)


def split_columns(layers: Mapping[str, Figures]) -> list[LayerColumns]:
    """Return the figures (values of metrics) of layers as columns, those with equal keys together.

    Args:
        layers: Figures of the layers of one observed step, by name.
    """
    groups: dict[object, dict[str, Figures]] = {}
    for name, figures in layers.items():
        tables = id(figures.table), id(figures.twins.table)
        keys = figures.formats, figures.recipes, figures.twins.states
        groups.setdefault((tables, keys), {})[name] = figures
    return [_read_group(own) for own in groups.values()]


def _read_group(layers: Mapping[str, Figures]) -> LayerColumns:
    """Return the columns of layers that have the same tables and keys."""
    each = [*layers.values()]
    table, twins = each[0].table, each[0].twins.table
    places = _Places(
        each[0],
        {name: [figures.rows[name] for figures in each] for name in each[0].rows},
        {name: [figures.twins.rows[name] for figures in each] for name in each[0].recipes},
    )
    rows = [LayerRow(name, own, StandardErrors(own)) for name, own in layers.items()]
    figures = _TableColumns(places, table.read_column, twins.read_column)
    errors = _TableColumns(places, table.read_errors, twins.estimate_errors)
    return LayerColumns(rows, figures, errors)
