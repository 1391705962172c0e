"""`Run`: a run file that was read.

Numbers of observed steps stay in the file until they are needed. Most users need `Run.series` and
`Run.to_pandas`.

`reading` makes a `Run`, and `altgrad.report.judging.verdicts` judges it.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from altgrad._messages import format_count
from altgrad.measurement.numbers import Numbers
from altgrad.quantization.formats import Scaling
from altgrad.report.frames import make_frame
from altgrad.report.records.columns import Columns
from altgrad.report.records.rows import Row
from altgrad.report.records.schema import FormatInfo, LayerInfo, RecipeInfo, Unobserved
from altgrad.report.records.steps import ObservedStep, StepRows, StepTable, decode_steps, group_rows


class _Values(NamedTuple):
    """A figure of all layers in one observed step.

    Attributes:
        step: Number of the step.
        columns: The columns of the step, which name the layers.
        figures: The figures, float64 (layers).
        is_here: True for layers that have the figure, bool (layers).
    """

    step: int
    columns: Columns
    figures: Numbers
    is_here: NDArray[np.bool_]


@dataclass
class _Memory:
    """The figures that were read once and are kept.

    Attributes:
        model: Those of the model by key, with the number of each observed step; None if unread.
        layers: Those of layers, by key.
    """

    model: list[tuple[int, Mapping[str, float]]] | None = None
    layers: dict[str, list[_Values]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Run:
    """A run that was read from its file, with the earlier runs that it continues.

    Attributes:
        path: Path of the run file.
        formats: Judged formats, by name.
        scaling: Which weights share a scale in the formats, as in `altgrad.measure`.
        layers: Observed layers (parameter tensors), by name.
        rows: Rows in the order in which they were written, without rows of steps that a resumed run
            did again. They are decoded when they are read, a step at a time.
        notes: Sentences for the reader, such as a skipped line or a missing file.
        predecessors: Paths of the files of earlier runs that were read, the latest run first.
        versions: Versions of the packages that wrote the file, by name.
        created: Time at which the file was created, in ISO 8601.
        loggers: Name, id and version of the run in each logger, as in `altgrad.report.Header`.
        recipes: By name, the recipes for storing weights that were tried on samples (twins).
        now: How the run itself stores its weights, as in `altgrad.report.Header`; None if unknown.
        optimizers: The number of optimizers of each class, as in `altgrad.report.Header`.
        verdicts: The last verdicts that the run wrote on itself, by name of the recipe, ``now`` for
            what it lost itself. Each has the keys of docs/run-file.md, such as ``verdict``. Empty
            if the run wrote none.
        unobserved: What the run wrote at its end if no step was observed; otherwise None.
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
    loggers: Sequence[Mapping[str, str | None]] = ()
    recipes: Mapping[str, RecipeInfo] = field(default_factory=dict)
    now: RecipeInfo | None = None
    optimizers: Mapping[str, int] = field(default_factory=dict)
    verdicts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    unobserved: Unobserved | None = None

    def __repr__(self) -> str:
        """Return the path of the run file and how much is in it, in a line."""
        counts = [
            format_count(len(self.steps), "observed step"),
            format_count(len(self.layers), "layer"),
            format_count(len(self.recipes), "recipe"),
        ]
        return f"Run({str(self.path)!r}: {', '.join(counts)})"

    def _repr_html_(self) -> str:
        """Return the first screen of the run's report for a notebook."""
        # Looked up when it is called: a report is made of a run, and not the other way round.
        report = importlib.import_module("altgrad.report.run_report").RunReport.from_run(self)
        return str(report._repr_html_())

    @functools.cached_property
    def observed(self) -> Sequence[ObservedStep]:
        """The observed steps, whose numbers are read from the file when they are needed."""
        rows = self.rows
        return rows.steps if isinstance(rows, StepRows) else group_rows(rows)

    @functools.cached_property
    def steps(self) -> tuple[int, ...]:
        """Numbers of the observed steps, in ascending order."""
        return tuple(sorted({step.step for step in self.observed}))

    def tables(self, remember: Sequence[str] = ()) -> Iterator[StepTable]:
        """Yield the numbers of one observed step after the other, as matrices.

        Args:
            remember: Keys of figures that are kept in memory for all layers, so that `series` finds
                them there. Those of the model are always kept. Each takes 8 bytes for a layer and
                step.

        Raises:
            RunFileError: A file is missing or has changed since it was read.
        """
        model: list[tuple[int, Mapping[str, float]]] = []
        layers: dict[str, list[_Values]] = {key: [] for key in remember}
        for table in decode_steps(self.observed):
            if (row := table.columns.rows.get(None)) is not None:
                model.append((table.step, table.list_numbers(row)[0]))
            for key, values in layers.items():
                figures, is_here = table.find_figures(key)
                values.append(_Values(table.step, table.columns, figures.copy(), is_here))
            yield table
        # Not before the end: the loop over these tables may stop early.
        self._memory.model = model
        self._memory.layers |= layers

    @functools.cached_property
    def figure_keys(self) -> Collection[str]:
        """Keys of the figures that any layer or the model has in any step."""
        # Most steps have the same columns, and so the same object.
        sets = {id(keys): keys for step in self.observed if (keys := step.figure_keys)}
        return dict.fromkeys(key for keys in sets.values() for key in keys)

    def last_rows(self, keys: Collection[str]) -> dict[str | None, Row]:
        """Return the last row of each layer that has a figure under one of some keys.

        Args:
            keys: The keys.

        Returns:
            The rows by layer; None stands for the model.

        Raises:
            RunFileError: A file is missing or has changed since it was read.
        """
        found: dict[str | None, Row] = {}
        missing = {layer for step in self.observed for layer in step.layers}
        for step in reversed(self.observed):
            if missing.isdisjoint(step.layers) or not any(key in step.figure_keys for key in keys):
                continue
            rows = [row for row in step.list_rows() if any(key in row.figures for key in keys)]
            found = {row.layer: row for row in rows} | found
            missing -= found.keys()
        return found

    def series(self, key: str, layer: str | None = None) -> dict[int, float]:
        """Return one figure of a layer or of the model, by step.

        If a step has several rows, as in a run with several optimizers, the last row counts.

        Args:
            key: Key of the figure, such as ``"update_rms"`` or ``"stall_frac/bf16"``.
            layer: Name of a layer; None for the model.

        Returns:
            The figure by number of the step. Steps without the figure are left out.

        Raises:
            KeyError: The run has no layer of this name.
            RunFileError: A file is missing or has changed since it was read.
        """
        if layer is not None and layer not in self.layers and layer not in self._seen:
            known = [*self.layers][:3]
            raise KeyError(f"layer={layer!r}: expected a layer of the run, such as {known}")
        if layer is None:
            return {step: own[key] for step, own in self._find_model_figures() if key in own}
        return self.layer_series(key).get(layer, {})

    def layer_series(self, key: str) -> dict[str, dict[int, float]]:
        """Return one figure of all layers, by step; faster than `series` for each of them.

        Args:
            key: Key of the figure.

        Returns:
            By name of the layer, the figure by number of the step.

        Raises:
            RunFileError: A file is missing or has changed since it was read.
        """
        if key not in self._memory.layers:
            for _ in self.tables(remember=[key]):
                pass
        found: dict[str, dict[int, float]] = {}
        for values in self._memory.layers[key]:
            each = zip(values.columns.layers, values.figures.tolist(), values.is_here, strict=True)
            for layer, figure, is_here in each:
                if is_here and layer is not None:
                    found.setdefault(layer, {})[values.step] = figure
        return found

    def to_pandas(self) -> Any:
        """Return the rows as a pandas DataFrame, with one line for each row.

        Returns:
            A DataFrame with the columns ``step`` and ``layer`` (None for the model), one column
            for each figure, and one for each standard error. The column of an error has
            ``_error`` after the name of the metric, as ``stall_frac_error/bf16``. A run with twins
            has the column ``moved_elements``.

        Raises:
            ImportError: pandas is missing.
        """
        rows = [*self.rows]
        keys = dict.fromkeys(key for row in rows for key in row.figures)
        error_keys = dict.fromkeys(key for row in rows for key in row.errors)
        columns: dict[str, list[Any]] = {
            "step": [row.step for row in rows],
            "layer": [row.layer for row in rows],
        }
        columns |= {key: [row.figures.get(key, math.nan) for row in rows] for key in keys}
        if self.recipes:
            columns["moved_elements"] = [row.moved_elements for row in rows]
        columns |= {
            key.replace("/", "_error/", 1): [row.errors.get(key, math.nan) for row in rows]
            for key in error_keys
        }
        return make_frame(columns, "to_pandas")

    @functools.cached_property
    def _seen(self) -> set[str | None]:
        """Names of the layers that have figures; None for the model."""
        return {layer for step in self.observed for layer in step.layers}

    def _find_model_figures(self) -> list[tuple[int, Mapping[str, float]]]:
        """Return the figures of the model by key, with the number of each observed step."""
        if self._memory.model is None:
            for _ in self.tables():
                pass
        return self._memory.model or []

    @functools.cached_property
    def _memory(self) -> _Memory:
        return _Memory()
