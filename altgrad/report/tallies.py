"""Summaries of the observed steps of one layer in one recipe, from which verdicts follow.

`TwinTally` summarizes the figures of a *twin*, a sample of the layer that is stored and stepped as
the recipe says. `StepTally` summarizes figures of single steps, for a number format that no twin
stores. Both are plain numbers, which a checkpoint can hold.

Read `calibration` first, which has the thresholds; `step_rules` comes next.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from altgrad.measurement.catalogue import FORMAT_METRICS
from altgrad.measurement.intervals import find_share_error
from altgrad.report.calibration import calibration
from altgrad.report.records.schema import LayerInfo
from altgrad.report.verdicts import NOW

_LIMITS = calibration().thresholds

KEPT, STALL, NEVER_MOVED = "kept_update_ratio", "stall_frac", "never_moved_frac"
RANGE = ("underflow_frac", "saturated_frac")
STEP_METRICS = (KEPT, STALL, NEVER_MOVED, *RANGE)
"""Metrics of single steps on which a verdict and its reason rest, each with a standard error."""
PROGRESS, FROZEN, STILL = "progress_kept", "frozen_frac", "still_frac"
MOVED, BROKEN = "moved_rms", "twin_nonfinite_frac"
TWIN_METRICS = (PROGRESS, FROZEN, STILL)
"""Metrics of twins on which a verdict and its reason rest, each with a standard error."""
_ALSO_OF_TWINS = (MOVED, BROKEN, "drift", "window_progress_kept", "moved_since_start_frac")
_STATE_ENDS = ("_ratio", "_zero_frac")
_MEANS = (KEPT, STALL, *RANGE)
_SIZE = "update_rms"


def _is_about_state(metric: str) -> bool:
    """Return True for the ``{state}_ratio`` and ``{state}_zero_frac`` of an optimizer state."""
    return metric.endswith(_STATE_ENDS) and metric not in FORMAT_METRICS


@dataclass
class TwinTally:
    """A summary of what became of a twin: a sample of a layer, stored as a recipe says.

    Attributes:
        step: Number of the last observed step.
        figures: The last figures, by metric. Figures since the start cover the whole run.
        errors: Standard errors of some of these figures, by metric.
        weight_rms: Root mean square of the layer's weights at the last observed step.
        broken: Largest share of the sample that was NaN or inf by the recipe: in observed steps in
            which the run itself was finite, or any share of ``now``, the run itself.
        nonfinite: Largest share of the layer that was NaN or inf in the run itself.
        still_since: Number of the observed step since which nearly no weight has moved; None if
            weights moved until the last observed step, or if none ever did.
        still_steps: Number of observed steps since then.
        kept_before: The progress_kept at `still_since`.
    """

    step: int = -1
    figures: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    weight_rms: float = math.nan
    broken: float = 0.0
    nonfinite: float = 0.0
    still_since: int | None = None
    still_steps: int = 0
    kept_before: float = math.nan

    def add_step(
        self, step: int, figures: Mapping[str, float], errors: Mapping[str, float], recipe: str
    ) -> None:
        """Add an observed step.

        Args:
            step: Number of the step.
            figures: Figures of the layer, those of the twin by ``metric/recipe``.
            errors: Standard errors by the same keys; a missing one is unknown.
            recipe: Name of the recipe.
        """
        end = f"/{recipe}"
        own = {
            metric: figures.get(metric + end, math.nan)
            for metric in (*TWIN_METRICS, *_ALSO_OF_TWINS)
        }
        own |= {
            metric: value
            for key, value in figures.items()
            if key.endswith(end) and _is_about_state(metric := key[: -len(end)])
        }
        self._add_window(own)
        self.step, self.figures = step, own
        self.errors = {m: errors.get(m + end, math.nan) for m in TWIN_METRICS}
        self.weight_rms = figures.get("weight_rms", math.nan)
        nonfinite = figures.get("nonfinite_frac", 0.0)
        if recipe == NOW or not nonfinite > 0:
            self.broken = max(self.broken, own[BROKEN])  # of NaN, max returns the former
        own_share = own[BROKEN] if recipe == NOW else 0.0
        self.nonfinite = max(self.nonfinite, nonfinite, own_share)

    def _add_window(self, figures: Mapping[str, float]) -> None:
        """Note whether the weights stood still since the last observed step."""
        still = figures[STILL]
        if math.isnan(still):
            return  # nothing was to be moved
        if still < _LIMITS.frozen:
            self.still_since, self.still_steps = None, 0
            return
        if self.still_since is None:
            self.still_since = self.step
            self.kept_before = self.figures.get(PROGRESS, math.nan)
        self.still_steps += 1

    @property
    def weight_error(self) -> float:
        """The distance of the weights from those in float32, as a share of the size of these.

        NaN without a value, as of a layer that float32 has not moved.
        """
        moved = self.figures.get(MOVED, math.nan)
        distance = self.figures.get("drift", math.nan) * moved
        return distance / self.weight_rms if self.weight_rms else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Return all attributes, as plain numbers by name."""
        return {**vars(self), "figures": dict(self.figures), "errors": dict(self.errors)}


@dataclass
class StepTally:
    """A summary of the observed steps of one layer in one number format, step by step.

    Attributes:
        sums: Sums of figures by metric, over the steps in which the metric has a value, and sums of
            standard errors by ``error of {metric}``. Each step of kept_update_ratio is weighted by
            the mean square of its update.
        counts: Numbers of steps in these sums, or sums of their weights, by the same keys.
            ``stated {metric}`` has the number of steps whose figures came with a standard error.
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

    def add_step(
        self, figures: Mapping[str, float], errors: Mapping[str, float], name: str
    ) -> None:
        """Add an observed step.

        Args:
            figures: Figures of the layer, those of the format by ``metric/format``.
            errors: Standard errors by the same keys; NaN is an error that cannot be trusted. A
                missing error counts as 0, as if all elements were measured, but for shares of
                weights out of range.
            name: Name of the format.
        """
        square = figures.get(_SIZE, 1.0) ** 2
        if math.isfinite(square):
            self.update_squares += square
            self.updates += 1
        for metric in _MEANS:
            key = f"{metric}/{name}"
            if not math.isfinite(figures[key]):
                continue
            weight = square if metric == KEPT and math.isfinite(square) else 1.0
            self._add(metric, figures[key], weight)
            if key in errors or metric not in RANGE:
                self.counts[f"stated {metric}"] += 1
                self._add(f"error of {metric}", errors.get(key, 0.0), weight)
        never_moved = f"{NEVER_MOVED}/{name}"
        if math.isfinite(figures[never_moved]):
            self.never_moved = figures[never_moved]
            self.never_moved_error = errors.get(never_moved, 0.0)
        self.broken = max(self.broken, figures.get("nonfinite_frac", 0.0))

    def _add(self, key: str, value: float, weight: float) -> None:
        if math.isfinite(value):
            # typeshed's Counter holds int only
            self.sums[key] += weight * value  # type: ignore[assignment]
            self.counts[key] += weight  # type: ignore[assignment]
            self.counts[f"steps of {key}"] += 1

    @property
    def update_rms(self) -> float:
        """The root mean square of the updates over the observed steps; NaN without steps."""
        return math.sqrt(self.update_squares / self.updates) if self.updates else math.nan

    def find_figures(self) -> dict[str, float]:
        """Return the mean of each metric over the steps, and the last never_moved_frac."""
        return {metric: self._mean(metric) for metric in _MEANS} | {NEVER_MOVED: self.never_moved}

    def find_errors(self, layer: LayerInfo | None) -> dict[str, float]:
        """Return the mean standard error of each metric; NaN unless most steps have one.

        Args:
            layer: The layer. For a share of weights out of range, the size of its sample gives an
                estimate if no step came with an error.
        """
        return {metric: self._find_error(metric, layer) for metric in STEP_METRICS}

    def _find_error(self, metric: str, layer: LayerInfo | None) -> float:
        if metric == NEVER_MOVED:
            return self.never_moved_error
        if metric in RANGE and not self.counts[f"stated {metric}"]:
            return _estimate_share_error(self._mean(metric), layer)
        known, steps = (self.counts[f"steps of {key}"] for key in (f"error of {metric}", metric))
        return self._mean(f"error of {metric}") if known * 2 > steps else math.nan

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
        """Restore a tally from a checkpoint of 0.1.0; the mean of kept_update_ratio begins anew."""
        # Each step of that mean is weighted by its size, which version 0.1.0 did not save.
        sums, counts = Counter(state["sums"]), Counter(state["counts"])
        for metric in (STALL, *RANGE):
            error = f"error of {metric}"
            counts[f"stated {metric}"] = counts[error]
            counts |= {f"steps of {key}": counts[key] for key in (metric, error)}
        for key in (KEPT, f"error of {KEPT}"):
            del sums[key], counts[key]
        return cls(
            sums,
            counts,
            state["never_moved"],
            state["never_moved_error"],
            state.get("nonfinite", 0.0),
        )


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
