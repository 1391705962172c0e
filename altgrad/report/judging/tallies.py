"""Summaries of the observed steps of one layer in one recipe, from which verdicts follow.

`TwinTally` summarizes the figures of a *twin*, a sample of the layer that is stored and stepped as
the recipe says. `StepTally` summarizes figures of single steps, for a number format that no twin
stores. Both are plain numbers, which a checkpoint can hold. A step adds the figures of all layers
at once: `list_twin_steps` has the figures of a recipe, `add_format_step` adds those of a format.

Read `calibration` first, which has the thresholds; `step_rules` comes next.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from altgrad.measurement.catalogue import FORMAT_METRICS, NOW
from altgrad.measurement.intervals import find_share_error
from altgrad.measurement.layer_columns import LayerColumns, LayerRow
from altgrad.report.judging.calibration import calibration
from altgrad.report.records.schema import LayerInfo

_LIMITS = calibration().thresholds

KEPT, STALL, NEVER_MOVED = "kept_update_ratio", "stall_frac", "never_moved_frac"
RANGE = ("underflow_frac", "saturated_frac")
STEP_METRICS = (KEPT, STALL, NEVER_MOVED, *RANGE)
"""Metrics of single steps on which a verdict and its reason rest, each with a standard error."""
PROGRESS, FROZEN, STILL = "progress_kept", "frozen_frac", "still_frac"
MOVED, BROKEN = "moved_rms", "twin_nonfinite_frac"
TWIN_METRICS = (PROGRESS, FROZEN, STILL)
"""Metrics of twins on which a verdict and its reason rest, each with a standard error.

A *twin* is a sample of the layers that is stored and stepped as a recipe says.
"""
_OTHER_TWIN_METRICS = (MOVED, BROKEN, "drift", "window_progress_kept", "moved_since_start_frac")
_STATE_ENDS = ("_ratio", "_zero_frac")
MEANS = (KEPT, STALL, *RANGE)
SIZE = "update_rms"


@lru_cache(maxsize=256)
def _list_metrics(recipe: str, keys: tuple[str, ...]) -> tuple[str, ...]:
    """Return the metrics of a recipe on which verdicts rest, and those of states among `keys`."""
    end = f"/{recipe}"  # most layers have the same keys
    metrics = (key[: -len(end)] for key in keys if key.endswith(end))
    return (*TWIN_METRICS, *_OTHER_TWIN_METRICS, *filter(_is_about_state, metrics))


def _is_about_state(metric: str) -> bool:
    """Return True for the ``{state}_ratio`` and ``{state}_zero_frac`` of an optimizer state."""
    return metric.endswith(_STATE_ENDS) and metric not in FORMAT_METRICS


class TwinStep(NamedTuple):
    """The figures of a twin, a sample of a layer, that count at every step and not only the last.

    Attributes:
        progress: The progress_kept.
        still: The still_frac; NaN if nothing was to be moved, or if it is unknown.
        broken: The twin_nonfinite_frac; NaN if it is unknown.
        nonfinite: The nonfinite_frac of the layer itself.
    """

    progress: float
    still: float
    broken: float
    nonfinite: float


def list_twin_steps(recipe: str, columns: LayerColumns) -> list[TwinStep]:
    """Return the figures of the twin of each layer that count at every step.

    A *twin* is a sample of a layer that is stored and stepped as the recipe says.

    Args:
        recipe: Name of the recipe.
        columns: The figures of layers in an observed step, progress_kept of the recipe among them.
    """
    unknown, zeros = [math.nan] * len(columns.rows), [0.0] * len(columns.rows)
    figures = columns.figures
    each = zip(
        figures[f"{PROGRESS}/{recipe}"],
        figures.get(f"{STILL}/{recipe}", unknown),
        figures.get(f"{BROKEN}/{recipe}", unknown),
        figures.get("nonfinite_frac", zeros),
        strict=True,
    )
    return [*map(TwinStep._make, each)]


class TwinTally:
    """A summary of what became of a twin: a sample of a layer, stored as a recipe says.

    Figures since the start cover the whole run, so that only the last ones are kept. They are read
    when a verdict is asked for, and not at each observed step.

    Args:
        recipe: Name of the recipe.

    Attributes:
        recipe: The `recipe` argument.
        step: Number of the observed step that has the figures: the last one, or the last one before
            the run became NaN or inf.
        broken: Largest share of the sampled weights that became NaN or inf because of the recipe.
            Steps in which the run itself had NaN or inf do not count. For ``now``, it is the share
            in the last observed step.
        nonfinite: Largest share of the layer that was NaN or inf in the run itself.
        is_lost: True if the run itself has made the layer NaN or inf, so that the last observed
            step had no figures.
        still_since: Number of the observed step since which nearly no weight has moved; None if
            weights moved until the last observed step.
        still_steps: Number of observed steps since then.
        kept_before: The progress_kept at `still_since`; NaN if none was observed before.
    """

    def __init__(self, recipe: str) -> None:
        self.recipe = recipe
        self.step = -1
        self.broken = 0.0
        self.nonfinite = 0.0
        self.is_lost = False
        self.still_since: int | None = None
        self.still_steps = 0
        self.kept_before = math.nan
        self._latest: Mapping[str, float] = {}
        self._errors: Mapping[str, float] = {}

    def add_step(self, step: int, twin: TwinStep, row: LayerRow) -> None:
        """Add an observed step.

        Args:
            step: Number of the step.
            twin: The figures that count at every step.
            row: All figures of the layer, those of the twin by ``metric/recipe``, which are read if
                a verdict is asked for and the step is the last one. A missing standard error is
                unknown.
        """
        self._add_window(twin.still)
        is_run, nonfinite, broken = self.recipe == NOW, twin.nonfinite, twin.broken
        # A run that becomes NaN has no figures any more: the last ones before count.
        self.is_lost = nonfinite > 0 and math.isnan(twin.progress)
        if not (self.is_lost and self._latest):
            self.step, self._latest, self._errors = step, row.figures, row.errors
        # Of a number and NaN, in this order, max returns the number.
        if is_run:
            self.broken = max(0.0, broken)  # a run may go on from an earlier checkpoint
        elif not nonfinite > 0:
            self.broken = max(self.broken, broken)
        self.nonfinite = max(self.nonfinite, nonfinite, broken if is_run else 0.0)

    def _add_window(self, still: float) -> None:
        """Note which share of the weights stood still since the last observed step."""
        if math.isnan(still):
            return  # nothing was to be moved
        if still < _LIMITS.frozen:
            self.still_since, self.still_steps = None, 0
            return
        if self.still_since is None:
            self.still_since, self.kept_before = self.step, self.figure(PROGRESS)
        self.still_steps += 1

    def figure(self, metric: str) -> float:
        """Return the last figure of the twin, by its metric; NaN if it has no value."""
        return self._latest.get(f"{metric}/{self.recipe}", math.nan)

    @property
    def figures(self) -> dict[str, float]:
        """The last figures of the twin on which verdicts rest, by metric, and of its states."""
        return {m: self.figure(m) for m in _list_metrics(self.recipe, tuple(self._latest))}

    @property
    def errors(self) -> dict[str, float]:
        """The standard errors of the figures in `TWIN_METRICS`; NaN if unknown."""
        return {m: self._errors.get(f"{m}/{self.recipe}", math.nan) for m in TWIN_METRICS}

    @property
    def weight_rms(self) -> float:
        """The root mean square of the layer's weights at the last observed step."""
        return self._latest.get("weight_rms", math.nan)

    @property
    def weight_error(self) -> float:
        """The distance of the weights from those in float32, as a share of the size of these.

        NaN without a value, as of a layer that float32 has not moved.
        """
        distance = self.figure("drift") * self.figure(MOVED)
        return distance / self.weight_rms if self.weight_rms else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Return the summary as plain numbers, for a checkpoint."""
        end = f"/{self.recipe}"
        return {
            **{name: value for name, value in vars(self).items() if not name.startswith("_")},
            "latest": {m + end: v for m, v in self.figures.items()}
            | {"weight_rms": self.weight_rms},
            "errors": {m + end: v for m, v in self.errors.items()},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> TwinTally:
        """Restore a tally from the result of `state_dict`."""
        tally = cls(state["recipe"])
        for name in vars(tally):
            if (key := name.removeprefix("_")) in state:  # an earlier version had fewer
                setattr(tally, name, state[key])
        return tally


@dataclass
class StepTally:
    """A summary of the observed steps of one layer in one number format, step by step.

    Attributes:
        sums: Sums of figures by metric, over the steps in which the metric has a value, and sums of
            standard errors by ``error of {metric}``.
        counts: Numbers of steps in these sums, by the same keys. ``stated {metric}`` has the number
            of steps whose figures came with a standard error.
        never_moved: Last figure of never_moved_frac, which covers the whole run.
        never_moved_error: Standard error of `never_moved`.
        broken: Largest share of NaN and inf in a step.
    """

    sums: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    never_moved: float = math.nan
    never_moved_error: float = math.nan
    broken: float = 0.0
    update_squares: float = 0.0
    updates: int = 0

    @property
    def update_rms(self) -> float:
        """The root mean square of the updates over the observed steps; NaN without steps."""
        return math.sqrt(self.update_squares / self.updates) if self.updates else math.nan

    def find_figures(self) -> dict[str, float]:
        """Return the mean of each metric over the steps, and the last never_moved_frac."""
        return {metric: self._mean(metric) for metric in MEANS} | {NEVER_MOVED: self.never_moved}

    def find_errors(self, layer: LayerInfo | None) -> dict[str, float]:
        """Return the mean standard error of each metric; NaN unless most steps have one.

        Args:
            layer: The layer. For a share of weights out of range, the size of its sample gives an
                estimate if no step came with an error.

        Returns:
            Standard errors of the metrics in `STEP_METRICS`, by metric.
        """
        return {metric: self._find_error(metric, layer) for metric in STEP_METRICS}

    def _find_error(self, metric: str, layer: LayerInfo | None) -> float:
        if metric == NEVER_MOVED:
            return self.never_moved_error
        if metric in RANGE and not self.counts[f"stated {metric}"]:
            return _estimate_share_error(self._mean(metric), layer)
        trusted = self.counts[f"error of {metric}"] * 2 > self.counts[metric]
        return self._mean(f"error of {metric}") if trusted else math.nan

    def _mean(self, key: str) -> float:
        return self.sums[key] / self.counts[key] if self.counts[key] else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Return all attributes, as plain numbers by name."""
        return {**vars(self), "sums": dict(self.sums), "counts": dict(self.counts)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> StepTally:
        """Restore a tally from the result of `state_dict`."""
        return cls(**{**state, "sums": Counter(state["sums"]), "counts": Counter(state["counts"])})

    @classmethod
    def from_old_state(cls, state: Mapping[str, Any]) -> StepTally:
        """Restore a tally from a checkpoint of 0.1.0, which had no sizes of updates."""
        known = {name: value for name, value in state.items() if name != "nonfinite"}
        return cls.from_state(known | {"broken": state.get("nonfinite", 0.0)})


def add_format_step(tallies: Sequence[StepTally], columns: LayerColumns, name: str) -> None:
    """Add an observed step to the summaries of layers in a number format.

    Args:
        tallies: The summaries of the layers, in the order of `columns`.
        columns: The figures of the layers, those of the format by ``metric/format``. An error of
            NaN cannot be trusted. A missing error counts as 0, as if all elements were measured,
            but for shares of weights out of range.
        name: Name of the format.
    """
    figures, errors = columns.figures, columns.errors
    zeros = [0.0] * len(tallies)
    for metric in MEANS:
        key = f"{metric}/{name}"
        known = errors.get(key, None if metric in RANGE else zeros)
        _add_mean(tallies, metric, figures[key], known)
    key = f"{NEVER_MOVED}/{name}"
    last = zip(tallies, figures[key], errors.get(key, zeros), strict=True)
    for tally, never_moved, error in last:
        if math.isfinite(never_moved):
            tally.never_moved, tally.never_moved_error = never_moved, error
    sizes, nonfinite = (
        figures.get(SIZE, [1.0] * len(tallies)),
        figures.get("nonfinite_frac", zeros),
    )
    for tally, size, share in zip(tallies, sizes, nonfinite, strict=True):
        square = size * size
        if math.isfinite(square):
            tally.update_squares += square
            tally.updates += 1
        tally.broken = max(tally.broken, share)


def _add_mean(
    tallies: Sequence[StepTally],
    metric: str,
    values: Sequence[float],
    errors: Sequence[float] | None,
) -> None:
    """Add the figures of a metric to the sums of layers, and their errors if there are any."""
    isfinite, error_key, stated = math.isfinite, f"error of {metric}", f"stated {metric}"
    for tally, value, error in zip(tallies, values, errors or values, strict=True):
        if not isfinite(value):
            continue
        sums, counts = tally.sums, tally.counts
        sums[metric] += value  # type: ignore[assignment] # typeshed's Counter holds int only
        counts[metric] += 1
        if errors is None:
            continue
        counts[stated] += 1
        if isfinite(error):
            sums[error_key] += error  # type: ignore[assignment]
            counts[error_key] += 1


def _estimate_share_error(share: float, layer: LayerInfo | None) -> float:
    """Estimate the standard error of a share of a layer's elements, if a run file lacks the error.

    Args:
        share: The share, 0 to 1.
        layer: The layer, for the size of its sample and its population.

    Returns:
        The error: 0 if all elements were measured, or if `layer` is None.
    """
    population = math.prod(layer.shape) if layer is not None else 0
    if layer is None or layer.elements >= population:
        return 0.0
    # So many elements of an infinite population say as much.
    return find_share_error(share, layer.elements / (1 - layer.elements / population))
