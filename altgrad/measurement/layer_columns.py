"""`LayerColumns`: the figures of the layers of one observed step as columns, a number per layer.

A verdict, a chart or a picture reads the same few figures of every layer. Whole columns are read in
one operation, where a look-up by key is one for each layer and figure.

`figures` makes columns of the table of a step, and `gather_columns` of a run file's rows. This file
imports neither torch nor NumPy, so that reports start fast.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from altgrad.measurement.figures import Figures

Numbers = Mapping[str, float]
Columns = Mapping[str, Sequence[float]]


class StandardErrors(Mapping[str, float]):
    """The standard errors of a layer's figures by key, computed when they are read.

    Args:
        figures: Figures of one layer in one step.
    """

    def __init__(self, figures: Figures) -> None:
        self._figures = figures

    def __getitem__(self, key: str) -> float:
        """Return the standard error of a figure by its key, such as ``stall_frac/bf16``."""
        return self._figures.standard_error(key)

    def __contains__(self, key: object) -> bool:
        """Return True if there is a figure with this key."""
        return key in self._figures

    def __iter__(self) -> Iterator[str]:
        """Iterate over the keys of the figures."""
        return iter(self._figures)

    def __len__(self) -> int:
        """Return the number of figures."""
        return len(self._figures)


class LayerRow(NamedTuple):
    """The figures of one layer in one observed step.

    Attributes:
        layer: Name of the layer.
        figures: The figures, values of metrics, by key.
        errors: Standard errors by the same keys. Some or all may be missing.
    """

    layer: str
    figures: Numbers
    errors: Numbers


class LayerColumns(NamedTuple):
    """The figures of layers with equal keys in one observed step, as columns.

    Attributes:
        rows: The figures of each layer.
        figures: For each key the figures of all layers, in the order of `rows`.
        errors: For each key the standard errors of all layers. A key may be missing.
    """

    rows: Sequence[LayerRow]
    figures: Columns
    errors: Columns

    @property
    def layers(self) -> list[str]:
        """The names of the layers."""
        return [row.layer for row in self.rows]

    def list_names(self, metric: str) -> list[str]:
        """Return the names of the formats or recipes for which there are figures of a metric.

        A *recipe* says how weights and optimizer states are stored.
        """
        start = f"{metric}/"
        return [key[len(start) :] for key in self.figures if key.startswith(start)]


class _Gathered(Mapping[str, Sequence[float]]):
    """A mapping from keys to columns, which are made from a mapping per layer when they are read.

    Args:
        rows: One or more mappings with equal keys.
    """

    def __init__(self, rows: Sequence[Numbers]) -> None:
        self._rows = rows

    def __getitem__(self, key: str) -> Sequence[float]:
        return [row[key] for row in self._rows]

    def __contains__(self, key: object) -> bool:
        return key in self._rows[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows[0])

    def __len__(self) -> int:
        return len(self._rows[0])


def gather_columns(rows: Iterable[LayerRow]) -> list[LayerColumns]:
    """Return the figures of layers as columns, layers with equal keys together.

    Args:
        rows: The figures of the layers of one observed step.
    """
    groups: dict[object, list[LayerRow]] = {}
    for row in rows:
        groups.setdefault((tuple(row.figures), tuple(row.errors)), []).append(row)
    return [
        LayerColumns(
            own,
            _Gathered([row.figures for row in own]),
            _Gathered([row.errors for row in own]),
        )
        for own in groups.values()
    ]
