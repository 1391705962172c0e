"""`History`: a metric by format, layer and step, in bounded memory: what a heat map shows."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from typing import TYPE_CHECKING

from altgrad.report import heat_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class History:
    """The values of a run, averaged over more and more observed steps as it gets longer.

    2,000 layers under 4 formats take 13 MB at most.

    Args:
        metric: A share, of a format.
        most_columns: When there would be more columns, each two of them become one.

    Attributes:
        per_column: How many observed steps a column is the mean of.
    """

    def __init__(self, metric: str = "stall_frac", most_columns: int = 200) -> None:
        self.metric = metric
        self.per_column = 1
        self._most = most_columns
        self._columns: list[_Column] = []
        self._positions: dict[str, dict[str, int]] = {}  # by format and layer

    def add(self, step: int, layers: Mapping[str, Mapping[str, float]]) -> None:
        """The figures of an observed step: by layer those by ``metric/format``."""
        if self._is_full and len(self._columns) == self._most:
            self._halve()
        if self._is_full:
            self._columns.append(_Column(step))
        column = self._columns[-1]
        column.steps += 1
        for layer, figures in layers.items():
            for format, key in self._keys(figures):
                column.add(self._position(format, layer), figures[key])

    def values(self, format: str) -> dict[str, dict[int, float]]:
        """By layer and the first step of each column, where the layer was observed in it."""
        return {
            layer: {
                column.step: mean
                for column in self._columns
                if (mean := column.mean(position)) is not None
            }
            for layer, position in self._positions.get(format, {}).items()
        }

    def heat_maps(self) -> dict[str, Figure]:
        """By ``{metric}_map/{format}``, a heat map of layers by steps."""
        mean = f", means of {self.per_column} observed steps" if self.per_column > 1 else ""
        return {
            f"{self.metric}_map/{format}": heat_map(
                self.values(format), title=f"{self.metric} in {format}{mean}", label=self.metric
            )
            for format in self._positions
        }

    @property
    def _is_full(self) -> bool:
        return not self._columns or self._columns[-1].steps == self.per_column

    def _keys(self, figures: Mapping[str, float]) -> list[tuple[str, str]]:
        formats = getattr(figures, "formats", None)
        if formats is None:
            prefix = f"{self.metric}/"
            formats = [key[len(prefix) :] for key in figures if key.startswith(prefix)]
        return [(format, f"{self.metric}/{format}") for format in formats]

    def _position(self, format: str, layer: str) -> int:
        of_format = self._positions.setdefault(format, {})
        if layer not in of_format:
            of_format[layer] = sum(map(len, self._positions.values()))
        return of_format[layer]

    def _halve(self) -> None:
        self.per_column *= 2
        pairs = zip(self._columns[::2], self._columns[1::2], strict=False)
        odd = self._columns[len(self._columns) // 2 * 2 :]
        self._columns = [first.merged(second) for first, second in pairs] + odd


class _Column:
    """Means over some observed steps, by position."""

    def __init__(self, step: int) -> None:
        self.step = step  # the first
        self.steps = 0
        self.sums = array("f")
        self.counts = array("f")  # NaN: not observed

    def add(self, position: int, value: float, count: float = 1) -> None:
        """So many values of that mean; NaN is none, and says that it was observed."""
        missing = position + 1 - len(self.sums)
        if missing > 0:
            self.sums.extend([0.0] * missing)
            self.counts.extend([math.nan] * missing)
        if math.isnan(self.counts[position]):
            self.counts[position] = 0
        if math.isfinite(value):
            self.sums[position] += count * value
            self.counts[position] += count

    def mean(self, position: int) -> float | None:
        """None: not observed; NaN: observed, without a value."""
        if position >= len(self.counts) or math.isnan(self.counts[position]):
            return None
        count = self.counts[position]
        return self.sums[position] / count if count else math.nan

    def merged(self, later: _Column) -> _Column:
        """This one and the next as one."""
        self.steps += later.steps
        for position, count in enumerate(later.counts):
            if not math.isnan(count):
                mean = later.sums[position] / count if count else math.nan
                self.add(position, mean, count)
        return self
