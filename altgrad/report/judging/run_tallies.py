"""The tallies of a whole run, from a matrix for each observed step.

`tally_run` comes to the same tallies as `Judge.add` for one row after the other, and is faster: all
layers, recipes and formats take one operation.

Read `tallies` first; `judge` comes next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from altgrad.measurement.catalogue import NOW
from altgrad.measurement.numbers import Numbers
from altgrad.report.judging.calibration import calibration
from altgrad.report.judging.tallies import (
    BROKEN,
    MEANS,
    NEVER_MOVED,
    PROGRESS,
    RANGE,
    SIZE,
    STEP_METRICS,
    STILL,
    StepTally,
    TwinTally,
)
from altgrad.report.records.columns import Columns
from altgrad.report.records.run import Run
from altgrad.report.records.steps import StepTable

_LIMITS = calibration().thresholds
_NONFINITE = "nonfinite_frac"

Flags = NDArray[np.bool_]
Places = NDArray[np.intp]
Axis = Places | slice
"""Places along an axis; a slice, which is faster, if each is one more than that before."""


class RunTallies(NamedTuple):
    """The tallies of a run.

    Attributes:
        twins: Those of recipes, by layer and recipe.
        steps: Those of formats, by layer and format.
        observed: Number of observed steps.
        last_step: Number of the last one; None without steps.
    """

    twins: dict[str, dict[str, TwinTally]]
    steps: dict[str, dict[str, StepTally]]
    observed: int
    last_step: int | None


def tally_run(
    run: Run, recipes: Sequence[str], formats: Sequence[str], remember: Sequence[str] = ()
) -> RunTallies:
    """Summarize all observed steps of a run, by layer and by recipe or format.

    Args:
        run: The run.
        recipes: Names of the recipes with twins: samples that are stored as recipes say.
        formats: Names of the judged formats.
        remember: Keys of figures that the run keeps in memory, as in `Run.tables`.

    Returns:
        The tallies. A layer has those of the recipes and formats of which it has figures.
    """
    layers: dict[str, int] = {}
    twins, steps = _Twins(recipes), _Steps(formats)
    plans: dict[Columns, _Plan] = {}
    observed, last_step = 0, None
    for index, table in enumerate(run.tables(remember)):
        plan = plans.get(table.columns)
        if plan is None:
            plan = plans[table.columns] = _make_plan(table.columns, layers, recipes, formats)
            _grow(twins, len(layers))
            _grow(steps, len(layers))
        if {*table.columns.layers} <= {None}:  # the model alone, or not even that
            continue
        observed += table.step != last_step
        last_step = table.step
        with np.errstate(over="ignore", invalid="ignore"):
            twins.add(index, table, plan)
            steps.add(table, plan)
    return RunTallies(
        twins.as_tallies(run, [*layers]), steps.as_tallies([*layers]), observed, last_step
    )


class _Plan(NamedTuple):
    """The places of the numbers on which verdicts rest, in steps with the same columns.

    Attributes:
        columns: The columns.
        rows: Rows of the layers.
        twins: Places in an array of (recipes, layers): those of the recipes with twins in these
            steps, and of the layers, as the run counts both.
        formats: Places in an array of (formats, layers): those of the formats that are judged in
            these steps, and of the layers.
        is_run: True for the recipe that is the run itself, bool (recipes, 1).
        progress: Columns of `progress_kept`, one for each recipe.
        still: Columns of `still_frac`.
        broken: Columns of `twin_nonfinite_frac`.
        metrics: Columns of `STEP_METRICS`, (metrics, formats).
        errors: Columns of their standard errors, (metrics, formats).
        size: Column of `update_rms`.
        nonfinite: Column of `nonfinite_frac`.

    Columns that are missing are −1.
    """

    columns: Columns
    rows: Axis
    twins: tuple[Axis, Axis]
    formats: tuple[Axis, Axis]
    is_run: Flags
    progress: Places
    still: Places
    broken: Places
    metrics: Places
    errors: Places
    size: Places
    nonfinite: Places

    def read(self, table: StepTable, places: Places) -> tuple[Numbers, Flags]:
        """Return numbers of all layers, and which of them are there.

        Args:
            table: The numbers of a step.
            places: Columns, −1 for those that are missing; of any shape.

        Returns:
            The numbers, float64 (*places, layers), NaN where there is none; and flags, bool.
        """
        is_here = ~table.is_absent[places][..., self.rows]
        is_missing = places < 0
        if is_missing.any():
            is_here[is_missing] = False
        return self.read_numbers(table, places), is_here

    def read_numbers(self, table: StepTable, places: Places) -> Numbers:
        """Return numbers of all layers as `read` does, without the flags."""
        numbers: Numbers = table.numbers[places][..., self.rows]
        is_missing = places < 0
        if is_missing.any():
            numbers = numbers.copy()
            numbers[is_missing] = np.nan
        return numbers


def _make_plan(
    columns: Columns, layers: dict[str, int], recipes: Sequence[str], formats: Sequence[str]
) -> _Plan:
    """Return the plan for steps with some columns, and number their layers in `layers`."""
    rows = {layer: row for layer, row in columns.rows.items() if layer is not None}
    for layer in rows:
        layers.setdefault(layer, len(layers))
    figures, errors = columns.figure_places, columns.error_places
    tried = [name for name in recipes if f"{PROGRESS}/{name}" in figures]
    judged = [
        name for name in formats if all(f"{metric}/{name}" in figures for metric in STEP_METRICS)
    ]

    def find(places: Mapping[str, int], metrics: Iterable[str], names: Sequence[str]) -> Places:
        found = [[places.get(f"{metric}/{name}", -1) for name in names] for metric in metrics]
        return np.array(found, np.intp)

    progress, still, broken = find(figures, (PROGRESS, STILL, BROKEN), tried)
    own = [layers[layer] for layer in rows]
    return _Plan(
        columns,
        _find_axis([*rows.values()]),
        _find_grid([recipes.index(name) for name in tried], own),
        _find_grid([formats.index(name) for name in judged], own),
        np.array([name == NOW for name in tried])[:, None],
        progress,
        still,
        broken,
        find(figures, STEP_METRICS, judged),
        find(errors, STEP_METRICS, judged),
        np.array(figures.get(SIZE, -1)),
        np.array(figures.get(_NONFINITE, -1)),
    )


def _find_axis(places: Sequence[int]) -> Axis:
    """Return places along an axis, as a slice if they follow each other."""
    if places and [*places] == [*range(places[0], places[0] + len(places))]:
        return slice(places[0], places[0] + len(places))
    return np.array(places, np.intp)


def _find_grid(rows: Sequence[int], columns: Sequence[int]) -> tuple[Axis, Axis]:
    """Return the index of all places in some rows and columns of an array."""
    first, second = _find_axis(rows), _find_axis(columns)
    if isinstance(first, slice) or isinstance(second, slice):
        return first, second
    return first[:, None], second[None]


_MEAN_ROWS = [STEP_METRICS.index(metric) for metric in MEANS]
_NEVER_ROW = STEP_METRICS.index(NEVER_MOVED)
_NEEDS_ERROR = np.array([metric in RANGE for metric in MEANS])[:, None, None]
"""True for metrics whose missing standard error is unknown, and not 0; bool (means, 1, 1)."""


def _grow(tallies: _Steps | _Twins, layers: int) -> None:
    """Make room in every array, whose last axis is that of layers; new places hold the default."""
    for name, default in tallies.DEFAULTS.items():
        array = getattr(tallies, name)
        if (more := layers - array.shape[-1]) > 0:
            new = np.full((*array.shape[:-1], more), default, array.dtype)
            setattr(tallies, name, np.concatenate([array, new], axis=-1))


class _Steps:
    """The numbers of every `StepTally`, in arrays of (formats, layers) or (means, formats, layers).

    Args:
        formats: Names of the judged formats.
    """

    DEFAULTS: Mapping[str, float] = {
        **dict.fromkeys(("sums", "error_sums", "update_squares", "broken"), 0.0),
        **dict.fromkeys(("counts", "error_counts", "stated", "updates", "is_judged"), 0),
        **dict.fromkeys(("never_moved", "never_moved_error"), np.nan),
    }

    def __init__(self, formats: Sequence[str]) -> None:
        self.formats = formats
        count = len(formats)
        self.sums, self.error_sums = np.zeros((2, len(MEANS), count, 0))
        self.counts, self.error_counts, self.stated = np.zeros((3, len(MEANS), count, 0), np.int64)
        self.update_squares, self.broken, self.never_moved, self.never_moved_error = np.zeros(
            (4, count, 0)
        )
        self.updates, self.is_judged = np.zeros((2, count, 0), np.int64)

    def add(self, table: StepTable, plan: _Plan) -> None:
        """Add an observed step, as `tallies.add_format_step` does."""
        own = plan.formats
        means = (slice(None), *own)
        figures, is_here = plan.read(table, plan.metrics)
        errors, has_error = plan.read(table, plan.errors)
        errors = np.where(has_error, errors, 0.0)
        judged = is_here.all(axis=0)
        self.is_judged[own] |= judged
        finite = np.isfinite(figures) & judged
        self.sums[means] += np.where(finite, figures, 0.0)[_MEAN_ROWS]
        self.counts[means] += finite[_MEAN_ROWS]
        stated = finite[_MEAN_ROWS] & (has_error[_MEAN_ROWS] | ~_NEEDS_ERROR)
        known = stated & np.isfinite(errors[_MEAN_ROWS])
        self.stated[means] += stated
        self.error_sums[means] += np.where(known, errors[_MEAN_ROWS], 0.0)
        self.error_counts[means] += known
        size, has_size = plan.read(table, plan.size)
        square = np.where(has_size, size * size, 1.0)
        is_known = judged & np.isfinite(square)
        self.update_squares[own] += np.where(is_known, square, 0.0)
        self.updates[own] += is_known
        last = finite[_NEVER_ROW]
        for name, new in (("never_moved", figures), ("never_moved_error", errors)):
            array = getattr(self, name)
            array[own] = np.where(last, new[_NEVER_ROW], array[own])
        nonfinite = plan.read_numbers(table, plan.nonfinite)
        self.broken[own] = np.where(judged, np.fmax(self.broken[own], nonfinite), self.broken[own])

    def as_tallies(self, layers: Sequence[str]) -> dict[str, dict[str, StepTally]]:
        """Return the tallies by layer and format."""
        return {
            layer: {
                name: self._make_tally(f, row)
                for f, name in enumerate(self.formats)
                if self.is_judged[f, row]
            }
            for row, layer in enumerate(layers)
        }

    def _make_tally(self, format: int, row: int) -> StepTally:
        sums: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        for m, metric in enumerate(MEANS):
            place = m, format, row
            if self.counts[place]:
                sums[metric] = float(self.sums[place])  # type: ignore[assignment]
                counts[metric] = int(self.counts[place])
            if self.error_counts[place]:
                sums[f"error of {metric}"] = float(self.error_sums[place])  # type: ignore[assignment]
                counts[f"error of {metric}"] = int(self.error_counts[place])
            if self.stated[place]:
                counts[f"stated {metric}"] = int(self.stated[place])
        return StepTally(
            sums,
            counts,
            float(self.never_moved[format, row]),
            float(self.never_moved_error[format, row]),
            float(self.broken[format, row]),
            float(self.update_squares[format, row]),
            int(self.updates[format, row]),
        )


class _Twins:
    """The numbers of every `TwinTally`, in arrays of (recipes, layers).

    A *twin* is a sample of a layer that is stored and stepped as a recipe says.

    Args:
        recipes: Names of the recipes.
    """

    DEFAULTS: Mapping[str, float] = {
        **dict.fromkeys(("step", "latest", "still_since"), -1),
        **dict.fromkeys(("still_steps", "is_lost", "is_still"), 0),
        **dict.fromkeys(("broken", "nonfinite"), 0.0),
        **dict.fromkeys(("kept", "kept_before"), np.nan),
    }

    def __init__(self, recipes: Sequence[str]) -> None:
        self.recipes = recipes
        count = len(recipes)
        self.step, self.latest, self.still_since, self.still_steps = np.zeros(
            (4, count, 0), np.int64
        )
        self.is_lost, self.is_still = np.zeros((2, count, 0), np.bool_)
        self.broken, self.nonfinite, self.kept, self.kept_before = np.zeros((4, count, 0))

    def add(self, index: int, table: StepTable, plan: _Plan) -> None:
        """Add an observed step, as `TwinTally.add_step` does.

        Args:
            index: Place of the step among all observed steps.
            table: The numbers of the step.
            plan: The places of the numbers.
        """
        own, is_run = plan.twins, plan.is_run
        progress, is_here = plan.read(table, plan.progress)
        self._add_window(own, is_here, plan.read_numbers(table, plan.still))
        nonfinite = plan.read_numbers(table, plan.nonfinite)
        broken = plan.read_numbers(table, plan.broken)
        is_lost = (nonfinite > 0) & np.isnan(progress)
        self._set("is_lost", own, is_here, is_lost)
        # A run that becomes NaN has no figures any more: the last ones before count.
        is_new = is_here & ~(is_lost & (self.latest[own] >= 0))
        self._set("step", own, is_new, table.step)
        self._set("latest", own, is_new, index)
        self._set("kept", own, is_new, progress)
        # A run may go on from an earlier checkpoint.
        now, before = np.fmax(0.0, broken), self.broken[own]
        worst = np.where(is_run, now, np.where(nonfinite > 0, before, np.fmax(before, broken)))
        self._set("broken", own, is_here, worst)
        seen = np.fmax(self.nonfinite[own], np.fmax(nonfinite, np.where(is_run, now, 0.0)))
        self._set("nonfinite", own, is_here, seen)

    def _add_window(self, own: tuple[Axis, Axis], is_here: Flags, still: Numbers) -> None:
        """Note which layers stood still since the last observed step."""
        stands, moves = is_here & (still >= _LIMITS.frozen), is_here & (still < _LIMITS.frozen)
        begins = stands & ~self.is_still[own]
        self._set("still_since", own, begins, self.step[own])
        self._set("kept_before", own, begins, self.kept[own])
        self._set("is_still", own, stands | moves, stands)
        self.still_steps[own] = np.where(moves, 0, self.still_steps[own] + stands)

    def _set(self, name: str, own: tuple[Axis, Axis], where: Flags, value: Any) -> None:
        array = getattr(self, name)
        array[own] = np.where(where, value, array[own])

    def as_tallies(self, run: Run, layers: Sequence[str]) -> dict[str, dict[str, TwinTally]]:
        """Return the tallies by layer and recipe.

        Args:
            run: The run, of which the rows with the last figures of twins are read.
            layers: Names of the layers.
        """
        last = {
            index: {row.layer: row for row in run.observed[index].list_rows()}
            for index in np.unique(self.latest[self.latest >= 0]).tolist()
        }
        found: dict[str, dict[str, TwinTally]] = {layer: {} for layer in layers}
        for r, name in enumerate(self.recipes):
            for place, layer in enumerate(layers):
                index = int(self.latest[r, place])
                if index < 0:
                    continue
                row = last[index][layer]
                is_still = bool(self.is_still[r, place])
                state = {
                    "recipe": name,
                    "step": int(self.step[r, place]),
                    "broken": float(self.broken[r, place]),
                    "nonfinite": float(self.nonfinite[r, place]),
                    "is_lost": bool(self.is_lost[r, place]),
                    "still_since": int(self.still_since[r, place]) if is_still else None,
                    "still_steps": int(self.still_steps[r, place]),
                    "kept_before": float(self.kept_before[r, place]),
                    "latest": row.figures,
                    "errors": row.errors,
                }
                found[layer][name] = TwinTally.from_state(state)
        return found
