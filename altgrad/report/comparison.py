"""`Comparison`: the differences between two runs, for the model and for each layer and format.

`altgrad compare` shows a `Comparison` with `print_comparison` of the module `terminal`, which comes
next. `confirmation` compares two runs otherwise, if one predicted how the other is stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from altgrad._messages import few
from altgrad.measurement.catalogue import NOW
from altgrad.report.judging.verdicts import Advice
from altgrad.report.matching import SHARES, describe_no_match
from altgrad.report.means import average_finite
from altgrad.report.run_report import RunReport

_PER_FORMAT = ("kept_update_ratio", "stall_frac", "never_moved_frac", "visible_frac")
_PER_MODEL = ("update_weight_ratio", "ulp_zero_frac")


class TwinFigures(NamedTuple):
    """Figures of the whole model that twins of both runs have at one step.

    A *twin* is a sample of the layers that is stored as a recipe says. The run itself is one of
    the recipes, ``now``, if its weights are stored in low precision.

    Attributes:
        step: The last step at which both runs have figures of twins.
        rows: Triples of key, such as ``frozen_frac/bf16``, figure of run A, and figure of run B.
    """

    step: int
    rows: list[tuple[str, float, float]]


@dataclass(frozen=True)
class Comparison:
    """A comparison of two training runs, called A and B, by figures and by verdicts.

    A verdict says how well a number format would store a layer.

    Attributes:
        runs: Reports of the runs A and B.
    """

    runs: tuple[RunReport, RunReport]

    @property
    def formats(self) -> list[str]:
        """Names of the number formats judged in both runs, in the order of the first run."""
        return [name for name in self.runs[0].formats if name in self.runs[1].run.formats]

    @cached_property
    def model_means(self) -> list[tuple[str, float, float]]:
        """Triples on figures of the model: key, mean over the steps of run A, and of run B.

        Figures without a mean in one of the runs are left out.
        """
        keys = [*_PER_MODEL]
        keys += [f"{metric}/{format}" for format in self.formats for metric in _PER_FORMAT]
        means = ((key, _mean(self.runs[0], key), _mean(self.runs[1], key)) for key in keys)
        return [row for row in means if not any(map(math.isnan, row[1:]))]

    @cached_property
    def twins(self) -> TwinFigures | None:
        """Figures of the model that twins of both runs have, of the last common step.

        Twins are samples that are stored as a recipe says. Compared are `progress_kept` and
        `frozen_frac` of the recipes that both runs have, which may be that of the run itself,
        ``now``. None without a common step or recipe.
        """
        names = dict.fromkeys([*self.runs[0].run.recipes, NOW])
        keys = [f"{metric}/{name}" for name in names for metric in SHARES]
        first, second = (report.run for report in self.runs)
        both = [(key, first.series(key), second.series(key)) for key in keys]
        steps = {step for _, a, b in both for step in a.keys() & b.keys()}
        if not steps:
            return None
        last = max(steps)
        rows = [(key, a[last], b[last]) for key, a, b in both if last in a and last in b]
        return TwinFigures(last, rows)

    @cached_property
    def changes(self) -> list[tuple[Advice, Advice]]:
        """Pairs of a verdict from run A and one from run B, for each layer and format in both.

        Pairs with differing verdicts come first, then those that differ most in kept_update_ratio,
        how much of the updates the format keeps.
        """
        pairs = [*self._pair_advice()]
        # Differing verdicts are first (False < True), then the largest changes.
        return sorted(
            pairs, key=lambda pair: (pair[0].verdict is pair[1].verdict, -_measure_change(*pair))
        )

    @property
    def summary(self) -> str:
        """Number of pairs of layer and format whose verdicts differ, in one sentence."""
        pairs = [*zip("AB", self.runs, strict=True)]
        if empty := [letter for letter, each in pairs if not each.run.observed]:
            return f"No observed step in {' and '.join(empty)}: nothing to compare."
        if silent := [letter for letter, each in pairs if not each.assessment.advice]:
            return (
                f"Nothing was judged in {' and '.join(silent)}, for want of formats and recipes: "
                "nothing to compare."
            )
        if not self.changes:
            return "No layer and format in common: nothing to compare."
        differing = sum(a.verdict is not b.verdict for a, b in self.changes)
        return f"Differing verdicts: {differing:,} of {len(self.changes):,}."

    @property
    def notes(self) -> list[str]:
        """Notes of both reports, and sentences on differing formats, layers and scalings."""
        notes = [note for report in self.runs for note in report.notes]
        for letter, mine, others in (("A", *self.runs), ("B", *self.runs[::-1])):
            for what in ("formats", "layers"):
                alone = [n for n in getattr(mine.run, what) if n not in getattr(others.run, what)]
                if alone:
                    notes.append(f"{what} only in {letter}: {len(alone):,} ({few(alone)})")
        a, b = (report.run.scaling for report in self.runs)
        if a != b:
            notes.append(f"grids differ: scaling is {a!r} in A and {b!r} in B")
        return notes + describe_no_match(*(report.run for report in self.runs))

    def _pair_advice(self) -> Iterator[tuple[Advice, Advice]]:
        first, second = (report.assessment.by_layer for report in self.runs)
        for layer, by_format in first.items():
            for format, advice in by_format.items():
                if format in second.get(layer, {}):
                    yield advice, second[layer][format]


def _mean(report: RunReport, key: str) -> float:
    return average_finite(report.run.series(key).values())


def _measure_change(a: Advice, b: Advice) -> float:
    """Return by how much two verdicts differ in `kept`, how much of the updates a format keeps.

    The result is absolute: inf if one `kept` is NaN, 0 if both are.
    """
    if math.isnan(a.kept) and math.isnan(b.kept):
        return 0
    change = abs(b.kept - a.kept)
    return math.inf if math.isnan(change) else change
