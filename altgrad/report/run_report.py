"""`RunReport`: what there is to say of a run, whichever way it is shown."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from altgrad.measurement.histogram import Histogram
from altgrad.report.applying import applying
from altgrad.report.drawings import heat_map, kept_map, ranges, steps_histogram
from altgrad.report.records.run import Row, Run
from altgrad.report.verdicts import Assessment, Verdict, judge_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class RunReport:
    """A run, judged.

    Attributes:
        run: As it was read.
        assessment: The verdicts.
    """

    run: Run
    assessment: Assessment

    @classmethod
    def of(cls, run: Run) -> RunReport:
        """Judge a run."""
        return cls(run, judge_run(run))

    @property
    def formats(self) -> list[str]:
        """Names, in the order of the run."""
        return [*self.run.formats]

    @property
    def steps(self) -> str:
        """Which were observed, in words."""
        steps = self.run.steps
        if not steps:
            return "no step observed"
        if len(steps) == 1:
            return f"1 step observed, {steps[0]}"
        return f"{len(steps):,} steps observed, {steps[0]:,} to {steps[-1]:,}"

    @property
    def measured(self) -> str:
        """How many elements, in words."""
        layers = self.run.layers.values()
        elements = sum(layer.elements for layer in layers)
        population = sum(math.prod(layer.shape) for layer in layers)
        of = "all" if elements == population else f"{elements:,} of"
        return f"{of} {population:,} elements in {len(layers):,} layers"

    @property
    def skipped(self) -> Mapping[str, int]:
        """How many steps were none, by reason."""
        return max((row.skipped for row in self._of_model()), key=_total, default={})

    @property
    def to_apply(self) -> str:
        """Lines of Python that store each layer in the smallest format that stores it fine."""
        return applying(self.run, self.assessment)

    @property
    def own_share(self) -> float:
        """Of all time, what observing took; NaN where it is not known.

        The time of training is that from one observed step to the next.
        """
        rows = self._of_model()
        own = math.fsum(row.own_seconds for row in rows if math.isfinite(row.own_seconds))
        training = math.fsum(
            row.training_seconds * (row.step - before.step)
            for before, row in itertools.pairwise(rows)
            if math.isfinite(row.training_seconds) and row.step > before.step
        )
        return own / (own + training) if training > 0 else math.nan

    def pictures(self) -> dict[str, Figure]:
        """Those that there are figures for, by name; the one that says most is first."""
        of_layers = self.assessment.by_layer
        pictures: dict[str, Figure] = {}
        if any(of_layers.values()):
            names = [name for name in self.run.layers if name in of_layers]
            pictures["kept"] = kept_map(
                {n: {f: a.kept for f, a in of_layers[n].items()} for n in names},
                {
                    n: {f: a.verdict is Verdict.FROZEN for f, a in of_layers[n].items()}
                    for n in names
                },
                title="What would be left of the weight updates, stored in …",
            )
        if steps := self._histograms("steps/"):
            pictures["steps"] = steps_histogram(steps)
        if weights := self._histograms("weights"):
            pictures["ranges"] = ranges(weights[""], [*self.run.formats.values()])
        for k, format in enumerate(self.formats if self.run.steps else ()):
            key = f"stall_frac/{format}"
            judged = [name for name, layer in self.run.layers.items() if format in layer.formats]
            values = {name: self.run.series(key, name) for name in judged}
            pictures[f"stalls-{k}"] = heat_map(values, title=f"stall_frac in {format}")
        return pictures

    def _of_model(self) -> list[Row]:
        return [row for row in self.run.rows if row.layer is None]

    def _histograms(self, prefix: str) -> dict[str, Histogram]:
        """The last ones, by what follows the prefix."""
        found: dict[str, Histogram] = {}
        for row in self._of_model():
            for key, histogram in row.histograms.items():
                if key.startswith(prefix):
                    found[key.removeprefix(prefix)] = histogram
        return found


def _total(counts: Mapping[str, int]) -> int:
    return sum(counts.values())
