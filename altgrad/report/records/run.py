"""`Run` and `Row`: the content of a run file in memory.

A run file has a line for each layer and for the model in each measured step. Most users need
`Run.series` and `Run.to_pandas`.

`reading` makes a `Run`, and `altgrad.report.judging.verdicts` judges it.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from altgrad._messages import format_count
from altgrad.measurement.catalogue import FORMAT_METRICS, LAYER_METRICS
from altgrad.measurement.histogram import Histogram
from altgrad.measurement.intervals import find_interval
from altgrad.quantization.formats import Scaling
from altgrad.report.frames import make_frame
from altgrad.report.records.schema import FormatInfo, LayerInfo, RecipeInfo, Unobserved


@dataclass(frozen=True, eq=False, slots=True)
class Row:
    """A line of a run file: the figures of one layer, or of the model, in one observed step.

    Attributes:
        step: Number of the step.
        layer: Name of the layer; None for the model.
        figures: Figures by key, as in `altgrad.Figures`: ``metric``, ``metric/format``, and
            ``metric/recipe`` for a twin, a sample of the layer that is trained as a recipe says.
        errors: Standard errors of some figures, by the same keys: half the width of `interval`,
            divided by 1.96. Those of formats are missing if every element was measured.
        elements: Number of measured elements of the model. None in the row of a layer, whose
            number is in `LayerInfo`.
        own_seconds: Host time in seconds to observe the previous observed step, as in
            `altgrad.StepRecord`. NaN in the row of a layer.
        training_seconds: Mean time in seconds of a training step without the observation, as in
            `altgrad.StepRecord`. NaN in the row of a layer.
        skipped: Number of steps so far that moved no weight, by reason. Empty in the row of a
            layer.
        histograms: Histograms of the model, by key, such as ``weights`` or ``steps/bf16``. Empty
            in the row of a layer.
        moved_elements: Number of elements of the twins' sample that the float32 twin has moved;
            NaN without twins.
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
    moved_elements: float = math.nan

    @property
    def twins(self) -> dict[str, dict[str, float]]:
        """Figures of the twins, samples trained as a recipe says, by name of recipe and metric."""
        found: dict[str, dict[str, float]] = {}
        for key, figure in self.figures.items():
            if _belongs_to_twin(key):
                metric, _, recipe = key.partition("/")
                found.setdefault(recipe, {})[metric] = figure
        return found

    def __repr__(self) -> str:
        """Return the step and the layer, and the number of figures, in a line."""
        return f"Row(step={self.step}, layer={self.layer!r}: {len(self.figures):,} figures)"

    def interval(self, key: str) -> tuple[float, float]:
        """Return the confidence interval of 95 % around a figure.

        Args:
            key: Key of the figure, such as ``"stall_frac/bf16"``.

        Returns:
            The lower and the upper end. Both equal the figure if all elements were measured, and
            are NaN if the error of the figure is missing or cannot be trusted. Twins have a sample
            of their own, so that a figure of a twin without an error has no interval.

        Raises:
            KeyError: The row has no such figure.
        """
        figure, error = self.figures[key], self.errors.get(key)
        if error is None:
            is_whole = not _belongs_to_twin(key) and all(map(_belongs_to_twin, self.errors))
            error = 0.0 if is_whole else math.nan
        return find_interval(key.partition("/")[0], figure, error)


def _belongs_to_twin(key: str) -> bool:
    """Return True for a key ``metric/recipe``, False for ``metric`` and ``metric/format``.

    Keys with a recipe belong to figures of twins, samples that are trained as the recipe says.
    """
    # A recipe may have the name of a format, so that the metric tells them apart.
    metric, _, recipe = key.partition("/")
    return bool(recipe) and metric not in LAYER_METRICS and metric not in FORMAT_METRICS


@dataclass(frozen=True, eq=False)
class Run:
    """A run that was read from its file, with the earlier runs that it continues.

    Attributes:
        path: Path of the run file.
        formats: Judged formats, by name.
        scaling: Which weights share a scale in the formats, as in `altgrad.measure`.
        layers: Observed layers (parameter tensors), by name.
        rows: Rows in the order in which they were written, without rows of steps that a resumed run
            did again.
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
    def steps(self) -> tuple[int, ...]:
        """Numbers of the observed steps, in ascending order."""
        return tuple(sorted({row.step for row in self.rows}))

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
        """
        if layer is not None and layer not in self.layers and layer not in self._rows_by_layer:
            known = [*self.layers][:3]
            raise KeyError(f"layer={layer!r}: expected a layer of the run, such as {known}")
        rows = self._rows_by_layer.get(layer, [])
        return {row.step: row.figures[key] for row in rows if key in row.figures}

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
        keys = dict.fromkeys(key for row in self.rows for key in row.figures)
        error_keys = dict.fromkeys(key for row in self.rows for key in row.errors)
        columns: dict[str, list[Any]] = {
            "step": [row.step for row in self.rows],
            "layer": [row.layer for row in self.rows],
        }
        columns |= {key: [row.figures.get(key, math.nan) for row in self.rows] for key in keys}
        if self.recipes:
            columns["moved_elements"] = [row.moved_elements for row in self.rows]
        columns |= {
            key.replace("/", "_error/", 1): [row.errors.get(key, math.nan) for row in self.rows]
            for key in error_keys
        }
        return make_frame(columns, "to_pandas")

    @functools.cached_property
    def _rows_by_layer(self) -> dict[str | None, list[Row]]:
        rows: dict[str | None, list[Row]] = {}
        for row in self.rows:
            rows.setdefault(row.layer, []).append(row)
        return rows
