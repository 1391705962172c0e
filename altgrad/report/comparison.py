"""`Comparison`: what differs between two runs, of the model and of each layer and format."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from altgrad._messages import few
from altgrad.report.run_report import RunReport
from altgrad.report.verdicts import Advice

_OF_MODEL = ("kept_update_ratio", "stall_frac", "never_moved_frac", "visible_frac")
_OF_MODEL_ALONE = ("update_weight_ratio", "ulp_zero_frac")


@dataclass(frozen=True)
class Comparison:
    """Two runs beside each other.

    Attributes:
        runs: Both, in the order in which they were named.
    """

    runs: tuple[RunReport, RunReport]

    @property
    def formats(self) -> list[str]:
        """Judged in both, in the order of the first."""
        return [name for name in self.runs[0].formats if name in self.runs[1].run.formats]

    @cached_property
    def of_model(self) -> list[tuple[str, float, float]]:
        """Key, and the means over the observed steps of each run, where both have one."""
        keys = [*_OF_MODEL_ALONE]
        keys += [f"{metric}/{format}" for format in self.formats for metric in _OF_MODEL]
        means = ((key, _mean(self.runs[0], key), _mean(self.runs[1], key)) for key in keys)
        return [row for row in means if not any(map(math.isnan, row[1:]))]

    @cached_property
    def changes(self) -> list[tuple[Advice, Advice]]:
        """Of each layer and format in both, the advice in each; those that differ most first."""
        pairs = [*self._pairs()]
        return sorted(pairs, key=lambda pair: (pair[0].verdict is pair[1].verdict, -_change(*pair)))

    @property
    def summary(self) -> str:
        """In one sentence."""
        pairs = zip("AB", self.runs, strict=True)
        if empty := [letter for letter, each in pairs if not each.run.rows]:
            return f"There is no observed step in {' and '.join(empty)}: nothing to compare."
        if not self.changes:
            return "They have no layer and format in common, so there is nothing to compare."
        other = sum(a.verdict is not b.verdict for a, b in self.changes)
        of = f"{len(self.changes):,} layers and formats"
        return (
            f"The verdict is the same for all {of}."
            if not other
            else (f"The verdict is another one for {other:,} of {of}.")
        )

    @property
    def notes(self) -> list[str]:
        """What is only in one of them, and what was noted when they were read."""
        notes = [note for report in self.runs for note in report.run.notes]
        for letter, mine, others in (("A", *self.runs), ("B", *self.runs[::-1])):
            for what in ("formats", "layers"):
                alone = [n for n in getattr(mine.run, what) if n not in getattr(others.run, what)]
                if alone:
                    notes.append(f"{what} only in {letter}: {len(alone):,} ({few(alone)})")
        a, b = (report.run.scaling for report in self.runs)
        if a != b:
            notes.append(f"scaling is {a!r} in A and {b!r} in B, so that their grids differ")
        return notes

    def _pairs(self) -> Iterator[tuple[Advice, Advice]]:
        first, second = (report.assessment.by_layer for report in self.runs)
        for layer, by_format in first.items():
            for format, advice in by_format.items():
                if format in second.get(layer, {}):
                    yield advice, second[layer][format]


def _mean(report: RunReport, key: str) -> float:
    values = [value for value in report.run.series(key).values() if math.isfinite(value)]
    return math.fsum(values) / len(values) if values else math.nan


def _change(a: Advice, b: Advice) -> float:
    """Of what is kept; from or to nothing that is known, the largest."""
    if math.isnan(a.kept) and math.isnan(b.kept):
        return 0
    change = abs(b.kept - a.kept)
    return math.inf if math.isnan(change) else change
