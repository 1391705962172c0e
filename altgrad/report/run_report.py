"""`RunReport`: a judged run, as the terminal, the page and the exports show it.

A report has the texts, shares and pictures of a run.

The modules `terminal`, `web_page` and `exports` come next and arrange them.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from altgrad._messages import few, format_count
from altgrad.measurement.catalogue import NOW
from altgrad.measurement.histogram import Histogram
from altgrad.report.answers import is_low, write_answer
from altgrad.report.applying import write_code
from altgrad.report.cells import UNMOVED, UNMOVED_MEANING, Meaning, list_legend
from altgrad.report.drawings import ranges, steps_histogram
from altgrad.report.judging.calibration import calibration
from altgrad.report.judging.judge import judge_run
from altgrad.report.judging.verdicts import Advice, Assessment
from altgrad.report.maps import heat_map, kept_map
from altgrad.report.means import average_finite
from altgrad.report.no_steps import explain_no_step
from altgrad.report.ranking import LOST, find_frozen, rank_layers
from altgrad.report.records.run import Run
from altgrad.report.records.steps import ObservedStep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STILL = calibration().thresholds.frozen  # unmoved_frac of a layer that stands still
_UNMOVED, _NONFINITE = "unmoved_frac", "nonfinite_frac"
_MOST_SETS = 3  # sets of layers whose sizes are named


@dataclass(frozen=True)
class RunReport:
    """A training run together with its verdicts, which give the texts and pictures of a report.

    Attributes:
        run: The run, as `altgrad.report.read` returns it.
        assessment: Verdicts: whether the run, and each layer, would still train if each recipe
            stored its weights.
    """

    run: Run
    assessment: Assessment

    @classmethod
    def from_run(cls, run: Run) -> RunReport:
        """Return the report of a run, with verdicts on it and its layers for each recipe.

        A *recipe* says how weights and optimizer states are stored.
        """
        stalls = [f"stall_frac/{format}" for format in run.formats]
        return cls(run, judge_run(run, [_UNMOVED, _NONFINITE, *stalls]))

    def __repr__(self) -> str:
        """Return the run and its verdicts, in a line."""
        return f"RunReport({self.run!r}, {self.assessment!r})"

    def _repr_html_(self) -> str:
        """Return the first screen of the report for a notebook."""
        # Looked up when it is called: the page is made of a report, and not the other way round.
        return str(
            importlib.import_module("altgrad.report.web_page").first_screen(self.assessment, self)
        )

    @property
    def formats(self) -> list[str]:
        """Names of the judged formats, in the order of the run."""
        return [*self.run.formats]

    @property
    def recipes(self) -> list[str]:
        """Names of all judged ways to store the run: ``now`` for the run itself, recipes, formats.

        A format is among them if no recipe of its name was tried.
        """
        return [*self.assessment.runs]

    @functools.cached_property
    def unmoved(self) -> dict[str, float]:
        """Mean unmoved_frac by layer, if weights are stored below float32; otherwise empty.

        It is the share of updates that moved no weight. With stochastic rounding or Kahan summation
        it is high, and yet nothing is lost.
        """
        if not is_low(self.run.layers, self.assessment.runs):
            return {}
        series = self.run.layer_series(_UNMOVED)
        means = {layer: average_finite(each.values()) for layer, each in series.items()}
        return {layer: mean for layer, mean in means.items() if not math.isnan(mean)}

    @functools.cached_property
    def nonfinite(self) -> dict[str, float]:
        """Largest share of NaN or inf elements in any observed step, by layer; 0 is left out."""
        series = self.run.layer_series(_NONFINITE)
        return {
            layer: max(shares)
            for layer, each in series.items()
            if (shares := [share for share in each.values() if share > 0])
        }

    @property
    def visible(self) -> dict[str, float]:
        """Mean visible_frac of the model by format, if weights are stored in float32."""
        if is_low(self.run.layers, self.assessment.runs):
            return {}
        series = {name: self.run.series(f"visible_frac/{name}") for name in self.formats}
        return {name: average_finite(each.values()) for name, each in series.items()}

    @property
    def answer(self) -> str:
        """The heading of the report: which recipes are fine, or why there is no verdict.

        A *recipe* says how weights and optimizer states are stored.
        """
        return write_answer(self.assessment.runs) if self.run.steps else explain_no_step(self.run)

    @property
    def legend(self) -> list[Meaning]:
        """Meanings of the verdicts and of the other words that occur in the tables."""
        unmoved = [Meaning(UNMOVED, UNMOVED_MEANING)] if self.unmoved else []
        return [*list_legend(self.assessment), *unmoved]

    @functools.cached_property
    def by_layer(self) -> dict[str, dict[str, Advice]]:
        """The verdicts by name of the layer and of the recipe: frozen and NaN layers first.

        Without twins, which would tell what a run in 16 bits loses, layers come first whose weights
        no update moved.
        """
        by_layer = rank_layers(self.assessment)
        if NOW in self.assessment.runs:
            return by_layer
        still = {name for name, share in self.unmoved.items() if share >= _STILL}
        return {name: by_layer[name] for name in sorted(by_layer, key=lambda n: n not in still)}

    @property
    def steps(self) -> str:
        """Number and range of the observed (measured) steps, in words."""
        steps = self.run.steps
        if not steps:
            return "no step observed"
        which = f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
        return f"{format_count(len(steps), 'step')} observed, {which}"

    @property
    def measured(self) -> str:
        """Number of measured elements in the layers that were measured at all, in words."""
        if not self._seen:
            return "no element measured"
        layers = [layer for name, layer in self.run.layers.items() if name in self._seen]
        elements = sum(layer.elements for layer in layers)
        population = sum(math.prod(layer.shape) for layer in layers)
        measured = "all" if elements == population else f"{elements:,} of"
        words = (
            f"{measured} {format_count(population, 'element')} in "
            f"{format_count(len(layers), 'layer')}"
        )
        # Files of version 0.1.0 do not describe layers that appeared in mid-run.
        unknown = len(self._seen) - len(layers)
        return (
            f"{words}, and {format_count(unknown, 'layer')} of unknown size" if unknown else words
        )

    @property
    def notes(self) -> list[str]:
        """Sentences on the run file, layers not measured, and steps that measured other layers."""
        notes = [*self.run.notes]
        unseen = [name for name in self.run.layers if name not in self._seen]
        if unseen and self._seen:
            notes.append(
                f"without an observed step: {format_count(len(unseen), 'layer')} ({few(unseen)}), "
                "which had no step, or none that was observed"
            )
        sets = {layers: None for layers in self._layer_sets if layers}
        if len(sets) > 1:
            sizes = ", ".join(str(len(layers)) for layers in [*sets][:_MOST_SETS])
            more = ", …" if len(sets) > _MOST_SETS else ""
            notes.append(
                f"{len(sets):,} sets of layers ({sizes}{more}) were observed in different steps, "
                "and the model's figures are those of the layers in each step: compare the figures "
                "of single layers"
            )
        return notes

    @functools.cached_property
    def _seen(self) -> set[str]:
        """Names of the measured layers: those of which the run file has values of metrics."""
        return {layer for step in self.run.observed for layer in step.layers if layer is not None}

    @functools.cached_property
    def _layer_sets(self) -> list[frozenset[str]]:
        """The names of the measured layers, one set for each observed step, in order."""
        steps = self.run.observed
        return [
            frozenset(layer for layer in step.layers if layer is not None)
            for step in steps
            if None in step.layers
        ]

    @property
    def skipped(self) -> Mapping[str, int]:
        """Number of steps that moved no weight, by reason."""
        # Counts only grow, so the row with the largest total is the latest.
        return max((step.skipped for step in self._list_steps()), key=_sum_counts, default={})

    @property
    def to_apply(self) -> str:
        """Lines of Python that keep each layer's weights in the smallest format that is fine."""
        return write_code(self.run, self.assessment)

    @property
    def own_share(self) -> float:
        """Share of the run's time that observing took; NaN if the time is unknown."""
        steps = self._list_steps()
        # A resumed run or a second optimizer repeats steps; these intervals are left out.
        own = math.fsum(step.own_seconds for step in steps if math.isfinite(step.own_seconds))
        training = math.fsum(
            step.training_seconds * (step.step - before.step)
            for before, step in itertools.pairwise(steps)
            if math.isfinite(step.training_seconds) and step.step > before.step
        )
        return own / (own + training) if training > 0 else math.nan

    def pictures(self) -> dict[str, Figure]:
        """Draw the pictures for which the run has values of metrics.

        Returns:
            Pictures by name, the most informative first: ``kept`` (`kept_map`), ``steps``
            (`steps_histogram`), ``ranges``, and ``stalls-0``, ``stalls-1``, … (`heat_map`), one for
            each format.
        """
        by_layer = self.by_layer
        pictures: dict[str, Figure] = {}
        if any(by_layer.values()):
            names = [name for name in self.run.layers if name in by_layer]
            pictures["kept"] = kept_map(
                {n: {f: a.kept for f, a in by_layer[n].items()} for n in names},
                {
                    n: {f: a.verdict.short for f, a in by_layer[n].items() if a.verdict in LOST}
                    for n in names
                },
                title="What is left of the progress, stored in …",
            )
        histograms = self._find_last_histograms()
        steps = {format: histograms.get(f"steps/{format}") for format in self.formats}
        if known := {format: each for format, each in steps.items() if each is not None}:
            pictures["steps"] = steps_histogram(known)
        if "weights" in histograms:
            pictures["ranges"] = ranges(histograms["weights"], [*self.run.formats.values()])
        for k, format in enumerate(self.formats if self.run.steps else ()):
            key = f"stall_frac/{format}"
            judged = [name for name, layer in self.run.layers.items() if format in layer.formats]
            series = self.run.layer_series(key)
            values = {name: series.get(name, {}) for name in judged}
            frozen = find_frozen(self.assessment, format)
            pictures[f"stalls-{k}"] = heat_map(
                values, title=f"stall_frac in {format}", frozen=frozen
            )
        return pictures

    def _list_steps(self) -> list[ObservedStep]:
        """Return the observed steps that have a row of the model."""
        return [step for step in self.run.observed if None in step.layers]

    def _find_last_histograms(self) -> dict[str, Histogram]:
        """Return the model's last histogram of each kind, by name: ``weights``, ``steps/bf16``, ….

        ``weights`` counts weights by magnitude. ``steps/bf16`` counts updates by their size in
        spacings of bf16, the distance between neighbouring numbers at the weight.
        """
        last = {key: step for step in self.run.observed for key in step.histograms}
        found = {step: step.find_histograms() for step in dict.fromkeys(last.values())}
        return {key: found[step][key] for key, step in last.items()}


def _sum_counts(counts: Mapping[str, int]) -> int:
    return sum(counts.values())
