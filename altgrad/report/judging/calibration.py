"""The thresholds of the verdicts, and the outcomes of the real runs that set the thresholds.

A verdict says whether a training, or one of its layers, would still make its progress if it were
stored as a *recipe* says. The real runs are small trainings that were really stored so; what they
lost of their progress set the thresholds. `calibration` reads calibration.json, which
benchmarks/calibration in the repository regenerates.

The module `verdicts` comes next.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Thresholds:
    """The figures of twins at which one verdict ends and the next begins.

    A *twin* is a sample of a layer that is stored as a recipe says. Its progress_kept is the share
    of the progress that the recipe keeps; frozen_frac is the share of the weights, moved in
    float32, that it never moved.

    Attributes:
        stores_fine: Least progress_kept of a recipe that stores fine.
        needs_remedy: Least progress_kept with which no remedy is needed.
        weight_error: Largest error of the weights of a recipe that stores fine: their distance from
            those in float32, as a share of the size of these.
        overshoots: Largest progress_kept of a recipe that does not overshoot.
        frozen: Least frozen_frac of a frozen layer.
        frozen_kept: The progress_kept below which a layer or run can be frozen.
        moved: Least movement in float32 of a frozen layer, as a share of the size of its weights.
        stuck_loss: Least loss of progress_kept since a layer stands still, for “stuck”.
        run_frozen: Least share of the weights in layers that stand still, of a frozen run.
        left_behind: Largest share of the weights in layers that keep less than half of their
            progress, of a run that is fine or “watch”.
    """

    stores_fine: float
    needs_remedy: float
    weight_error: float
    overshoots: float
    frozen: float
    frozen_kept: float
    moved: float
    stuck_loss: float
    run_frozen: float
    left_behind: float


@dataclass(frozen=True)
class StepThresholds:
    """The figures of single steps, all 0 to 1, at which one verdict ends and the next begins.

    They judge a number format that no twin, a sample of the layer, tries. The metric
    kept_update_ratio is how much of the layer's updates the format keeps, never_moved_frac the
    share of the weights with updates that would never have moved.

    Attributes:
        stores_fine: Least kept_update_ratio of a format that stores a layer fine.
        needs_remedy: Least kept_update_ratio with which a layer needs no remedy.
        frozen: Least never_moved_frac of a frozen layer.
        underflow: Least share of weights stored as 0 for the verdict “range”.
        saturated: Least share of weights beyond the format's largest value for the verdict “range”.
    """

    stores_fine: float
    needs_remedy: float
    frozen: float
    underflow: float
    saturated: float


class Offset(NamedTuple):
    """The distance between the predicted and the real share of progress kept, in 8 of 10 runs.

    It was measured on real runs, whose predictions fell into one range of shares.

    Attributes:
        below: Upper end of the range of predicted shares. Its lower end is the upper end of the
            range before.
        low: The 10th percentile of real − predicted, over the runs in the range.
        high: The 90th percentile of real − predicted, over the runs in the range.
    """

    below: float
    low: float
    high: float


class Outcome(NamedTuple):
    """The number of real runs of one family of recipes that had one verdict.

    Attributes:
        runs: Number of these runs.
        lost: Number of those that lost more than 10 % of the fall in loss that float32 had.
    """

    runs: int
    lost: int


@dataclass(frozen=True)
class Calibration:
    """The content of calibration.json: thresholds of verdicts, and outcomes of real runs.

    Attributes:
        thresholds: Figures of twins at which one verdict ends, and the next begins.
        step_thresholds: Figures of single steps at which one verdict ends, and the next begins.
        rules: By name of the threshold, the rule in words by which the threshold was found.
        offsets: Offsets of the progress kept by real runs, by increasing `Offset.below`.
        runs: Outcomes of real runs by family of the recipe and name of the verdict. They have
            the number of ``runs``, and the number that ``lost_10_percent`` of the fall in loss. The
            quartiles of their final loss over that in float32 are ``loss_ratios``.
        layers: Outcomes of layers of these runs by family and verdict: number of ``layers``, how
            many were ``frozen`` in truth, and the quartiles of the progress they kept, ``kept``.
        held_out: Outcomes in the form of `runs` and `layers`, for tasks and optimizers that set no
            threshold.
    """

    thresholds: Thresholds
    step_thresholds: StepThresholds
    rules: Mapping[str, str]
    offsets: Sequence[Offset]
    runs: Mapping[str, Mapping[str, Mapping[str, Any]]]
    layers: Mapping[str, Mapping[str, Mapping[str, Any]]]
    held_out: Mapping[str, Any]

    def find_offsets(self, kept: float) -> tuple[float, float]:
        """Return the lower and upper offset of a real run from the predicted progress_kept."""
        found = next((each for each in self.offsets if kept < each.below), self.offsets[-1])
        return found.low, found.high

    def count_runs(self, family: str | None, verdict: str) -> Outcome | None:
        """Count the real runs of a family of recipes that had a verdict, and what they lost.

        Args:
            family: Family of the recipe; None for one of which no real run was done.
            verdict: Name of the verdict, such as ``"WATCH"``.

        Returns:
            The numbers of runs; None if no run of the family was done.
        """
        if family is None:
            return None
        counts = self.runs.get(family, {}).get(verdict)
        return Outcome(counts["runs"], counts["lost_10_percent"]) if counts else Outcome(0, 0)

    def describe_layers(self, family: str | None, verdict: str) -> str:
        """Return a phrase on layers of real runs of a family of recipes that had a verdict.

        Args:
            family: Family of the recipe; None for one of which no real run was done.
            verdict: Name of the verdict, such as ``"FROZEN"``.
        """
        if verdict in ("UNCERTAIN", "NOT_JUDGED"):
            return ""
        counts = self.layers.get(family or "", {}).get(verdict)
        if not counts:
            return "no layer had this verdict" if family else "no such layer was tested"
        if verdict == "FROZEN":
            return (
                f"{counts['frozen']} of {counts['layers']:,} such layers were frozen in real runs"
            )
        low, _, high = counts["kept"]
        return (
            f"the middle half of {counts['layers']:,} such layers kept {low:.2g} to {high:.2g} of "
            "their progress in real runs"
        )


@functools.cache
def calibration() -> Calibration:
    """Return the thresholds of verdicts, and outcomes of the real trainings that set these.

    The trainings really stored their weights and states as recipes say. Thresholds and outcomes
    come from the file calibration.json of the package, which is read once.
    """
    content = json.loads(
        files("altgrad.report.judging").joinpath("calibration.json").read_text(encoding="utf-8")
    )
    return Calibration(
        Thresholds(**content["thresholds"]),
        StepThresholds(**content["step_thresholds"]),
        content["rules"],
        [Offset(*each) for each in content["offsets"]],
        content["runs"],
        content["layers"],
        content["held_out"],
    )
