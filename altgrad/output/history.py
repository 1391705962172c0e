"""`History`: keep one metric by format, layer and step in bounded memory, for heat maps.

A long run has more observed steps than a picture has columns. `History` merges neighbouring columns
if there are 200 columns, so that a column is the mean of 1, 2, 4, … observed steps.

Read this file after `charts`. The next file is `panels`; `loggers` shows the heat maps.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from altgrad.measurement.layer_columns import LayerColumns
from altgrad.measurement.numbers import Numbers
from altgrad.report.maps import heat_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class History:
    """The figures of one metric over a run by layer and format, as columns of heat maps.

    A column has the means over 1, 2, 4, … observed steps, so that the memory is bounded: 2,000
    layers under 4 formats take 13 MB at most.

    Args:
        metric: Name of a metric that has a figure for each format.
        most_columns: Maximum number of columns; before one more, pairs of columns are merged.

    Attributes:
        metric: Name of the metric.
        per_column: Number of observed steps in a column.
    """

    def __init__(self, metric: str = "stall_frac", most_columns: int = 200) -> None:
        self.metric = metric
        self.per_column = 1
        self._most_columns = most_columns
        self._columns: list[_Column] = []
        self._positions: dict[str, dict[str, int]] = {}  # by format and layer

    def add(self, step: int, layers: Iterable[LayerColumns]) -> None:
        """Add the figures of an observed (measured) step.

        Args:
            step: The step that the figures are logged at.
            layers: The figures of the layers, by ``{metric}/{format}``.
        """
        if self._is_full and len(self._columns) == self._most_columns:
            self._merge_pairs()
        if self._is_full:
            self._columns.append(_Column(step))
        column = self._columns[-1]
        column.steps += 1
        for columns in layers:
            for format in columns.list_names(self.metric):
                positions = self._find_positions(format, columns.layers)
                column.add(positions, columns.figures[f"{self.metric}/{format}"])

    def get_means(self, format: str) -> dict[str, dict[int, float]]:
        """Return the mean figures of each layer in a format, by column of a heat map.

        Args:
            format: Name of the format.

        Returns:
            By name of the layer, and then by first step of the column, the mean in the column.
            Columns in which the layer was not observed are left out.
        """
        positions = self._positions.get(format, {})
        if not positions:
            return {}
        places = np.array([*positions.values()])
        steps = [column.first_step for column in self._columns]
        each = [column.read_means(places) for column in self._columns]
        means, counts = (np.stack(part, axis=1).tolist() for part in zip(*each, strict=True))
        return {
            layer: {
                step: mean
                for step, mean, count in zip(steps, *row, strict=True)
                if not math.isnan(count)
            }
            for layer, *row in zip(positions, means, counts, strict=True)
        }

    def draw_heat_maps(
        self, frozen: Mapping[str, Collection[str]] | None = None
    ) -> dict[str, Figure]:
        """Draw a heat map of layers by steps for each format.

        Args:
            frozen: By format, the names of the layers that never move.

        Returns:
            The pictures, by ``{metric}_map/{format}``.
        """
        mean = f", means of {self.per_column} observed steps" if self.per_column > 1 else ""
        return {
            f"{self.metric}_map/{format}": heat_map(
                self.get_means(format),
                title=f"{self.metric} in {format}{mean}",
                label=self.metric,
                frozen=(frozen or {}).get(format, ()),
            )
            for format in self._positions
        }

    @property
    def _is_full(self) -> bool:
        return not self._columns or self._columns[-1].steps == self.per_column

    def _find_positions(self, format: str, layers: Sequence[str]) -> list[int]:
        """Return the position of each layer in a format, and give new layers the next ones."""
        positions = self._positions.setdefault(format, {})
        if not positions.keys() >= {*layers}:
            free = itertools.count(sum(map(len, self._positions.values())))
            positions |= {name: next(free) for name in layers if name not in positions}
        return [positions[name] for name in layers]

    def _merge_pairs(self) -> None:
        self.per_column *= 2
        pairs = zip(self._columns[::2], self._columns[1::2], strict=False)
        unpaired = self._columns[len(self._columns) // 2 * 2 :]
        self._columns = [first.merge(second) for first, second in pairs] + unpaired


class _Column:
    """The means over some observed steps, one for each layer and format: a column of a heat map.

    Each pair of a layer and a format has a position in the column. The arrays are float32: an entry
    takes 4 bytes, and a Python float would take 24.
    """

    def __init__(self, first_step: int) -> None:
        self.first_step = first_step
        self.steps = 0
        self.sums = array("f")
        self.counts = array("f")  # NaN marks a layer that was not observed

    def add(self, positions: Sequence[int], values: Sequence[float]) -> None:
        """Add a figure at each position of a layer and format.

        A value of NaN stands for an observed layer without a figure.
        """
        self._reach(max(positions, default=-1))
        sums, counts, isfinite = self.sums, self.counts, math.isfinite
        for position, value in zip(positions, values, strict=True):
            count = counts[position]
            if math.isnan(count):
                counts[position] = count = 0.0
            if isfinite(value):
                sums[position] += value
                counts[position] = count + 1

    def _reach(self, position: int) -> None:
        """Lengthen the arrays up to a position."""
        missing = position + 1 - len(self.sums)
        if missing > 0:
            self.sums.extend([0.0] * missing)
            self.counts.extend([math.nan] * missing)

    def read_means(self, places: npt.NDArray[np.int64]) -> tuple[Numbers, Numbers]:
        """Return the means at some positions, and the number of figures in each.

        Args:
            places: The positions of layers and formats.

        Returns:
            The means, which are NaN without a figure, and the numbers, NaN for a layer that was not
            observed, float64 (positions) each.
        """
        sums, counts = np.zeros(len(places)), np.full(len(places), np.nan)
        known = places < len(self.sums)
        sums[known] = np.array(self.sums, np.float64)[places[known]]
        counts[known] = np.array(self.counts, np.float64)[places[known]]
        with np.errstate(invalid="ignore"):  # 0 / 0
            return sums / counts, counts

    def merge(self, later: _Column) -> _Column:
        """Add the figures of a column of later steps to this column, and return this column."""
        self.steps += later.steps
        self._reach(len(later.counts) - 1)
        for position, count in enumerate(later.counts):
            if not math.isnan(count):
                mine = self.counts[position]
                self.counts[position] = count if math.isnan(mine) else mine + count
                self.sums[position] += later.sums[position]
        return self
