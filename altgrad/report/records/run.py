"""`Run` and `Row`: what a run file says, to be looked at."""

from __future__ import annotations

import functools
import importlib
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from altgrad.measurement.histogram import Histogram
from altgrad.quantization.formats import Scaling
from altgrad.report.records.schema import FormatInfo, LayerInfo


class FloatsByKey(Mapping[str, float]):
    """Numbers by key, in little memory: rows share the table of their keys.

    Args:
        positions: From a key to where its number is.
        numbers: In that order.
    """

    __slots__ = ("_numbers", "_positions")

    def __init__(self, positions: Mapping[str, int], numbers: Sequence[float]) -> None:
        self._positions = positions
        self._numbers = array("d", numbers)

    def __getitem__(self, key: str) -> float:
        return self._numbers[self._positions[key]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._positions)

    def __len__(self) -> int:
        return len(self._positions)

    def __repr__(self) -> str:
        return repr(dict(self))


@dataclass(frozen=True, eq=False, slots=True)
class Row:
    """One layer, or the model, in one observed step.

    Attributes:
        step: Its number.
        layer: Name; None for the model.
        figures: As in `altgrad.Figures`.
        errors: Standard errors of some figures, where elements were sampled.
        elements: How many were measured; None in the row of a layer (see `LayerInfo`).
        own_seconds, training_seconds: As in `altgrad.StepRecord`; NaN in the row of a layer.
        skipped: How many steps were none so far, by reason; empty in the row of a layer.
        histograms: Of the model, by key; empty in the row of a layer.
    """

    step: int
    layer: str | None
    figures: Mapping[str, float]
    errors: Mapping[str, float]
    elements: int | None = None
    own_seconds: float = math.nan
    training_seconds: float = math.nan
    skipped: Mapping[str, int] = field(default_factory=dict)
    histograms: Mapping[str, Histogram] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Run:
    """A run, with those that it goes on from.

    Attributes:
        path: Of its file.
        formats: Those that were judged, by name.
        scaling: As in `altgrad.measure`.
        layers: Those that were watched, by name.
        rows: In the order in which they were written; superseded ones are not among them.
        notes: What a reader is to know, a sentence each: a torn line, a file that is missing.
        predecessors: Files of the runs before it that were read, the last one first.
        versions: Of what wrote the file.
        created: When.
    """

    path: Path
    formats: Mapping[str, FormatInfo]
    scaling: Scaling | None
    layers: Mapping[str, LayerInfo]
    rows: Sequence[Row]
    notes: Sequence[str]
    predecessors: Sequence[Path]
    versions: Mapping[str, str]
    created: str

    @functools.cached_property
    def steps(self) -> tuple[int, ...]:
        """All that were observed, in ascending order."""
        return tuple(sorted({row.step for row in self.rows}))

    def series(self, key: str, layer: str | None = None) -> dict[int, float]:
        """One figure by step, where there is one; of the model, if no layer is named.

        Where several rows are of one step (several optimizers), the last counts.

        Raises:
            KeyError: No such layer.
        """
        if layer is not None and layer not in self.layers and layer not in self._rows_of:
            raise KeyError(f"{layer!r}: expected a layer of the run, such as {[*self.layers][:3]}")
        rows = self._rows_of.get(layer, [])
        return {row.step: row.figures[key] for row in rows if key in row.figures}

    def to_pandas(self) -> Any:
        """A DataFrame: a line for each row, its figures in columns.

        Columns are ``step``, ``layer`` (None for the model), the keys of the figures, and of the
        standard errors with ``_error`` after the name of the metric.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            pandas = importlib.import_module("pandas")
        except ImportError as error:
            raise ImportError("to_pandas() needs pandas: pip install pandas") from error
        keys = dict.fromkeys(key for row in self.rows for key in row.figures)
        of_errors = dict.fromkeys(key for row in self.rows for key in row.errors)
        columns: dict[str, list[Any]] = {
            "step": [row.step for row in self.rows],
            "layer": [row.layer for row in self.rows],
        }
        columns |= {key: [row.figures.get(key, math.nan) for row in self.rows] for key in keys}
        columns |= {
            key.replace("/", "_error/", 1): [row.errors.get(key, math.nan) for row in self.rows]
            for key in of_errors
        }
        return pandas.DataFrame(columns)

    @functools.cached_property
    def _rows_of(self) -> dict[str | None, list[Row]]:
        rows: dict[str | None, list[Row]] = {}
        for row in self.rows:
            rows.setdefault(row.layer, []).append(row)
        return rows
