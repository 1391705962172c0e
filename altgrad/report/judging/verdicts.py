"""Verdicts on recipes: on a whole run, and on each of its layers, with figures and reasons.

A *recipe* says how weights and optimizer states are stored and stepped. A verdict says whether the
training would still make its progress if it followed the recipe. `Assessment.runs` has the verdict
on the run for each recipe, `Assessment.advice` those on single layers. A run whose weights are
stored in 16 bits or less already has a recipe named ``now``: what the run itself loses.

These are the types. Read `calibration` first; `tallies` comes next, and `judge` makes the
verdicts.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

from altgrad._messages import format_count
from altgrad.measurement.catalogue import NOW
from altgrad.measurement.intervals import find_interval
from altgrad.report.frames import make_frame
from altgrad.report.judging.calibration import Outcome

PROGRESS, STEP_KEPT = "progress_kept", "kept_update_ratio"
FEW_STEPS = 10
"""Number of observed steps below which a verdict is early."""

Interval = tuple[float, float]
"""The lower and the upper end of a confidence interval."""


class Verdict(str, Enum):
    """A judgement of how a recipe would store a run or a layer; the value is a phrase for users."""

    STORES_FINE = "stores fine"
    WATCH = "watch: prefer stochastic rounding or Kahan"
    NEEDS_REMEDY = "needs stochastic rounding, Kahan or fp32 master weights"
    FROZEN = "frozen"
    STUCK = "stuck: moved at first, and no longer does"
    OVERSHOOTS = "overshoots: moves too far, store states or weights in more bits"
    BREAKS = "breaks: becomes NaN or inf"
    RANGE = "range: needs a scale"
    UNCERTAIN = "uncertain: raise twin_elements or max_elements"
    NOT_JUDGED = "not judged"

    def __str__(self) -> str:
        return self.value

    @property
    def short(self) -> str:
        """Name of the verdict in one word, for tables."""
        return _SHORT[self]


_SHORT = {
    Verdict.STORES_FINE: "fine",
    Verdict.WATCH: "watch",
    Verdict.NEEDS_REMEDY: "remedy",
    Verdict.FROZEN: "frozen",
    Verdict.STUCK: "stuck",
    Verdict.OVERSHOOTS: "over",
    Verdict.BREAKS: "breaks",
    Verdict.RANGE: "range",
    Verdict.UNCERTAIN: "unsure",
    Verdict.NOT_JUDGED: "–",
}


class Advice(NamedTuple):
    """A verdict on how well one recipe would store one layer, with its reason.

    Attributes:
        layer: Name of the layer.
        recipe: Name of the recipe; ``now`` for the run itself. A format without a twin of its name
            is judged, too, from single steps.
        verdict: The verdict.
        figures: Figures on which the verdict rests, by metric; NaN if a metric has no value. With a
            *twin*, a sample of the layer that was stored as the recipe says, they are those of the
            last observed step, such as ``progress_kept`` since the start. Otherwise they are means
            over single steps, such as ``kept_update_ratio``.
        errors: Standard errors of these figures, by metric, as a sample of the layer has them; NaN
            if an error cannot be trusted.
        reason: Why the verdict was given, in one sentence.
        evidence: Outcome of layers of real runs with this verdict, in one sentence. Empty for
            `Verdict.UNCERTAIN` and `Verdict.NOT_JUDGED`.
        nonfinite: Largest share of the layer's elements that were NaN or inf in an observed step of
            the run itself. No figure counts these elements, so that the verdict is on the others.
        is_lost: True if the run itself has made the layer NaN or inf, so that the verdict is on the
            steps before.
    """

    layer: str
    recipe: str
    verdict: Verdict
    figures: Mapping[str, float]
    errors: Mapping[str, float]
    reason: str
    evidence: str = ""
    nonfinite: float = 0.0
    is_lost: bool = False

    @property
    def has_twin(self) -> bool:
        """True if the verdict rests on a twin, False if it rests on single steps.

        A *twin* is a sample of the layers that is stored and stepped as a recipe says.
        """
        return PROGRESS in self.figures

    @property
    def kept(self) -> float:
        """The share of the progress that the recipe keeps; NaN without a value.

        It is progress_kept, or the mean kept_update_ratio of single steps.
        """
        return self.figures.get(PROGRESS if self.has_twin else STEP_KEPT, math.nan)

    def interval(self, metric: str) -> Interval:
        """Return the confidence interval of 95 % around a figure.

        Args:
            metric: Name of a metric of `errors`.

        Returns:
            The lower and the upper end. Both equal the figure if all elements were measured, and
            are NaN if the error cannot be trusted.
        """
        return find_interval(metric, self.figures[metric], self.errors[metric])


class RunAdvice(NamedTuple):
    """A verdict on what one recipe would make of a whole run, or on what the run loses now.

    Attributes:
        recipe: Name of the recipe; ``now`` for the run itself.
        verdict: The verdict.
        kept: Share of the progress kept: progress_kept of all layers together, each weighted by all
            of its elements; NaN without a value.
        interval: Lower and upper end between which the share of a real run lies in 8 of 10 cases.
            These are `kept` plus the 10th and the 90th percentile of the errors of such
            predictions, widened by the error of the sample. Without a twin, it is that error alone.
        weight_error: Distance of the weights from those in float32, as a share of the size of
            these; NaN without a value.
        frozen_frac: Share of the weights, moved in float32, that would never move: the mean over
            the layers, each weighted by its number of elements.
        frozen: Names of the layers with the verdicts frozen and stuck.
        frozen_share: Share of the judged weights that these layers have.
        behind_share: Share of the judged weights in layers of which less than half of the progress
            is kept, and that float32 moved. A layer that moves far can hide these in `kept`.
        layers: Number of judged layers.
        outcome: What became of real runs of the recipe's family that had this verdict; None if no
            such run was done.
        to_do: What to do, in one sentence.
        has_twin: True if the verdict rests on twins, False if it rests on single steps.
        steps: Number of observed steps; 0 if unknown.
        saved_share: Share that the recipe saves of the memory of weights and optimizer states in
            float32; below 0 if it takes more, NaN if unknown.
        others: Names of the judged layers that are not in `frozen`.
    """

    recipe: str
    verdict: Verdict
    kept: float
    interval: Interval
    weight_error: float
    frozen_frac: float
    frozen: Sequence[str]
    frozen_share: float
    behind_share: float
    layers: int
    outcome: Outcome | None
    to_do: str
    has_twin: bool
    steps: int = 0
    saved_share: float = math.nan
    others: Sequence[str] = ()

    @property
    def is_early(self) -> bool:
        """True if the verdict rests on few observed steps, so that more may change it."""
        return 0 < self.steps < FEW_STEPS and self.verdict is not Verdict.NOT_JUDGED

    @property
    def evidence(self) -> str:
        """A phrase on real runs with this verdict: “8 of 66 such runs lost over 10 %”.

        Real runs are trainings that stored their weights as a similar recipe says. Some lost over
        10 % of the fall in loss. The phrase is empty if the verdict is uncertain or missing, or
        rests on single steps instead of twins, samples that were stored so.
        """
        if not self.has_twin or self.verdict in (Verdict.UNCERTAIN, Verdict.NOT_JUDGED):
            return ""
        if self.outcome is None:
            return "no such run was tested"
        if not self.outcome.runs:
            return "no real run had this verdict"
        return f"{self.outcome.lost} of {self.outcome.runs} such runs lost over 10 %"


@dataclass(frozen=True)
class Assessment:
    """The verdicts on a run and its layers: what each recipe keeps of the training's progress.

    Attributes:
        runs: By name of the recipe, the verdict on the whole run. The run itself, ``now``, comes
            first.
        advice: Verdict, with its reason, on each layer in each recipe that the layer is judged for.
            The layers are in the order in which they were first observed.
        suggestions: By name of the layer, the name of the smallest format that stores the layer
            fine if weights are rounded to nearest; None without one.
        summary: The result in one paragraph.
    """

    runs: Mapping[str, RunAdvice]
    advice: Sequence[Advice]
    suggestions: Mapping[str, str | None]
    summary: str

    def __repr__(self) -> str:
        """Return the verdict on the run by recipe, in a line."""
        runs = ", ".join(f"{name}: {each.verdict.short}" for name, each in self.runs.items())
        return f"Assessment({runs}; {format_count(len(self.by_layer), 'layer')})"

    def _repr_html_(self) -> str:
        """Return a table of the verdicts on the run, and what to do, for a notebook."""
        # Looked up when it is called: the page is made of verdicts, and not the other way round.
        return str(importlib.import_module("altgrad.report.web_page").first_screen(self))

    @functools.cached_property
    def nonfinite(self) -> dict[str, float]:
        """The largest share of NaN and inf in the run itself, by name of each layer with any."""
        return {each.layer: each.nonfinite for each in self.advice if each.nonfinite}

    @functools.cached_property
    def by_layer(self) -> dict[str, dict[str, Advice]]:
        """The verdicts by name of the layer and of the recipe.

        First come layers that stand still now, and then the layer that would keep the smallest part
        of its progress in any recipe.
        """
        by_layer: dict[str, dict[str, Advice]] = {}
        for advice in self.advice:
            by_layer.setdefault(advice.layer, {})[advice.recipe] = advice
        return dict(sorted(by_layer.items(), key=lambda item: _rank(item[1])))

    def to_pandas(self) -> Any:
        """Return the verdicts on layers as a pandas DataFrame, with one line for each.

        Returns:
            A DataFrame with the columns ``layer``, ``recipe``, ``verdict`` (a name of `Verdict`),
            ``kept`` (the share of the progress), ``has_twin``, ``nonfinite`` and ``suggestion``.
            Then come one for each figure, by metric, one for its error, such as
            ``stall_frac_error``, ``reason`` and ``evidence``. Missing figures are NaN.

        Raises:
            ImportError: pandas is missing.
        """
        metrics = dict.fromkeys(metric for each in self.advice for metric in each.figures)
        with_errors = dict.fromkeys(metric for each in self.advice for metric in each.errors)
        columns: dict[str, list[Any]] = {
            "layer": [each.layer for each in self.advice],
            "recipe": [each.recipe for each in self.advice],
            "verdict": [each.verdict.name for each in self.advice],
            "kept": [each.kept for each in self.advice],
            "has_twin": [each.has_twin for each in self.advice],
            "nonfinite": [each.nonfinite for each in self.advice],
            "suggestion": [self.suggestions.get(each.layer) for each in self.advice],
            **{m: [each.figures.get(m, math.nan) for each in self.advice] for m in metrics},
            **{
                f"{m}_error": [each.errors.get(m, math.nan) for each in self.advice]
                for m in with_errors
            },
            "reason": [each.reason for each in self.advice],
            "evidence": [each.evidence for each in self.advice],
        }
        return make_frame(columns, "to_pandas")

    def runs_to_pandas(self) -> Any:
        """Return the verdicts on the run as a pandas DataFrame, with one line for each recipe.

        Returns:
            A DataFrame with the columns ``recipe``, ``verdict`` (a name of `Verdict`), ``kept``,
            ``low`` and ``high`` (the ends of `RunAdvice.interval`), ``weight_error``,
            ``frozen_frac``, ``frozen_layers`` (their number), ``frozen_share``, ``behind_share``,
            ``layers``, ``has_twin``, ``evidence`` and ``to_do``.

        Raises:
            ImportError: pandas is missing.
        """
        runs = [*self.runs.values()]
        columns: dict[str, list[Any]] = {
            "recipe": [each.recipe for each in runs],
            "verdict": [each.verdict.name for each in runs],
            "kept": [each.kept for each in runs],
            "low": [each.interval[0] for each in runs],
            "high": [each.interval[1] for each in runs],
            "weight_error": [each.weight_error for each in runs],
            "frozen_frac": [each.frozen_frac for each in runs],
            "frozen_layers": [len(each.frozen) for each in runs],
            "frozen_share": [each.frozen_share for each in runs],
            "behind_share": [each.behind_share for each in runs],
            "layers": [each.layers for each in runs],
            "has_twin": [each.has_twin for each in runs],
            "evidence": [each.evidence for each in runs],
            "to_do": [each.to_do for each in runs],
        }
        return make_frame(columns, "runs_to_pandas")


def _rank(advice: Mapping[str, Advice]) -> tuple[float, float]:
    """Return a key that sorts layers: the share kept now, then the smallest share by a recipe."""
    now = [advice[NOW]] if NOW in advice else []
    return _find_least_kept(now), _find_least_kept(advice.values())


def _find_least_kept(advice: Iterable[Advice]) -> float:
    """Return the smallest share of the progress kept among verdicts; inf if all are NaN."""
    return min((a.kept for a in advice if not math.isnan(a.kept)), default=math.inf)
