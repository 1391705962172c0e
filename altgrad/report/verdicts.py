"""What to do, per layer and format: a verdict, the figures it rests on, its reason, its evidence.

Thresholds and evidence are those of `altgrad.report.calibration`: of runs that really stored their
weights in a format, with rounding to nearest.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from altgrad._messages import few, percent
from altgrad.report.calibration import calibration
from altgrad.report.records.run import Run
from altgrad.report.records.schema import FormatInfo, LayerInfo

_LIMITS = calibration().thresholds

_KEPT, _STALL, _NEVER_MOVED = "kept_update_ratio", "stall_frac", "never_moved_frac"
_OF_RANGE = ("underflow_frac", "saturated_frac")
_MEANS = (_KEPT, _STALL, *_OF_RANGE)
RESTS_ON = (_KEPT, _STALL, _NEVER_MOVED)
"""Metrics whose standard errors count."""
_WIDTH = 2  # standard errors to either side


class Verdict(str, Enum):
    """What a format would do to a layer."""

    STORES_FINE = "stores fine"
    WATCH = "watch: prefer stochastic rounding or Kahan"
    NEEDS_REMEDY = "needs stochastic rounding, Kahan or fp32 master weights"
    FROZEN = "frozen"
    RANGE = "range: needs a finer scale"
    UNCERTAIN = "uncertain: raise max_elements"
    NOT_JUDGED = "not judged"

    def __str__(self) -> str:
        return self.value

    @property
    def short(self) -> str:
        """One or two words, for tables."""
        return _SHORT[self]


_SHORT = {
    Verdict.STORES_FINE: "fine",
    Verdict.WATCH: "watch",
    Verdict.NEEDS_REMEDY: "remedy",
    Verdict.FROZEN: "frozen",
    Verdict.RANGE: "range",
    Verdict.UNCERTAIN: "unsure",
    Verdict.NOT_JUDGED: "–",
}


class Advice(NamedTuple):
    """A verdict on one layer in one format.

    Attributes:
        layer: Its name.
        format: The format's name.
        verdict: What the format would do.
        figures: What it rests on: metrics by name, NaN where one has no value.
        errors: Standard errors of these, where there are any.
        reason: In one sentence.
        evidence: In one sentence, what became of runs of which this was said; empty where the
            verdict claims nothing.
    """

    layer: str
    format: str
    verdict: Verdict
    figures: Mapping[str, float]
    errors: Mapping[str, float]
    reason: str
    evidence: str = ""

    @property
    def kept(self) -> float:
        """kept_update_ratio; NaN where it has no value."""
        return self.figures.get(_KEPT, math.nan)


@dataclass(frozen=True)
class Assessment:
    """What to do about a model.

    Attributes:
        advice: Of each layer and each format that it was judged for, as they were recorded.
        suggestions: For each layer the smallest format that stores it fine; None where none does.
        summary: One paragraph.
    """

    advice: Sequence[Advice]
    suggestions: Mapping[str, str | None]
    summary: str

    @functools.cached_property
    def by_layer(self) -> dict[str, dict[str, Advice]]:
        """By layer and format, the layers that keep least of their update first."""
        by_layer: dict[str, dict[str, Advice]] = {}
        for advice in self.advice:
            by_layer.setdefault(advice.layer, {})[advice.format] = advice
        return dict(sorted(by_layer.items(), key=lambda item: _least_kept(item[1].values())))


@dataclass
class _Tally:
    """Of one layer and format: sums over its observed steps, and what was seen last."""

    sums: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    never_moved: float = math.nan
    never_moved_error: float = math.nan

    def add_step(self, figures: Mapping[str, float], errors: Mapping[str, float]) -> None:
        for metric in _MEANS:
            self._add(metric, figures[metric])
        for metric in (_KEPT, _STALL):
            if math.isfinite(figures[metric]):
                self._add(f"error of {metric}", errors[metric])
        if math.isfinite(figures[_NEVER_MOVED]):
            self.never_moved = figures[_NEVER_MOVED]
            self.never_moved_error = errors[_NEVER_MOVED]

    def _add(self, key: str, value: float) -> None:
        if math.isfinite(value):
            self.sums[key] += value  # type: ignore[assignment]
            self.counts[key] += 1

    def mean(self, key: str) -> float:
        """NaN without a value."""
        return self.sums[key] / self.counts[key] if self.counts[key] else math.nan

    def error(self, metric: str) -> float:
        """NaN where in most steps none could be trusted."""
        if metric == _NEVER_MOVED:
            return self.never_moved_error
        trusted = self.counts[f"error of {metric}"] * 2 > self.counts[metric]
        return self.mean(f"error of {metric}") if trusted else math.nan


class Judge:
    """Gathers the figures of a run, step by step, and judges them.

    `kept_update_ratio`, `stall_frac` and what concerns the range are means over the observed steps
    in which they have a value, each step counting alike; their standard errors are means, too,
    since the same elements are observed throughout. Of `never_moved_frac` the last value counts.

    Args:
        formats: Those that were judged, by name.
        layers: Those that were watched, by name: of one that is not here, the shares of weights
            that are out of range are taken as exact.
    """

    def __init__(
        self, formats: Mapping[str, FormatInfo], layers: Mapping[str, LayerInfo] | None = None
    ) -> None:
        self._formats = formats
        self._layers = layers or {}
        self._tallies: dict[str, dict[str, _Tally]] = {}

    def add(self, layer: str, figures: Mapping[str, float], errors: Mapping[str, float]) -> None:
        """The figures of one layer in one observed step.

        Args:
            layer: Its name.
            figures: By ``metric/format``, of the formats that it is judged for; one of which
                figures are missing is not.
            errors: Standard errors likewise: none for a layer that is measured whole, NaN where
                one cannot be trusted.
        """
        tallies = self._tallies.setdefault(layer, {})
        for format in self._formats:
            keys = {metric: f"{metric}/{format}" for metric in (*_MEANS, _NEVER_MOVED)}
            if all(key in figures for key in keys.values()):
                tally = tallies.setdefault(format, _Tally())
                tally.add_step(
                    {metric: figures[key] for metric, key in keys.items()},
                    {metric: errors.get(keys[metric], 0.0) for metric in RESTS_ON},
                )

    def assessment(self) -> Assessment:
        """The verdicts as they stand now."""
        advice = [
            _advice(layer, format, tally, self._layers.get(layer))
            for layer, tallies in self._tallies.items()
            for format, tally in tallies.items()
        ]
        fine: dict[str, list[str]] = {layer: [] for layer in self._tallies}
        for each in advice:
            if each.verdict is Verdict.STORES_FINE:
                fine[each.layer].append(each.format)
        suggestions = {layer: smallest(formats, self._formats) for layer, formats in fine.items()}
        return Assessment(advice, suggestions, _summary(advice))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on."""
        return {
            layer: {
                format: {**vars(tally), "sums": dict(tally.sums), "counts": dict(tally.counts)}
                for format, tally in tallies.items()
            }
            for layer, tallies in self._tallies.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._tallies = {
            layer: {
                format: _Tally(
                    **{**tally, "sums": Counter(tally["sums"]), "counts": Counter(tally["counts"])}
                )
                for format, tally in tallies.items()
            }
            for layer, tallies in state.items()
        }


def smallest(names: Iterable[str], formats: Mapping[str, FormatInfo]) -> str | None:
    """Return the format of the fewest bits, of equally small ones the first; None of none."""
    return min(names, key=lambda name: formats[name].bits, default=None)


def judge_run(run: Run) -> Assessment:
    """The assessment of a run that has been read."""
    judge = Judge(run.formats, run.layers)
    for row in run.rows:
        if row.layer is not None:
            judge.add(row.layer, row.figures, row.errors)
    return judge.assessment()


def _least_kept(advice: Iterable[Advice]) -> float:
    """In any format; inf where none has a value."""
    return min((a.kept for a in advice if not math.isnan(a.kept)), default=math.inf)


def _advice(layer: str, format: str, tally: _Tally, info: LayerInfo | None) -> Advice:
    figures = {metric: tally.mean(metric) for metric in _MEANS}
    figures[_NEVER_MOVED] = tally.never_moved
    errors = {metric: tally.error(metric) for metric in RESTS_ON}
    of_range = {metric: _error_of_share(figures[metric], info) for metric in _OF_RANGE}
    verdict, reason = _judged(figures, errors | of_range)
    evidence = calibration().evidence(verdict.name)
    return Advice(layer, format, verdict, figures, errors, reason, evidence)


def _judged(figures: Mapping[str, float], errors: Mapping[str, float]) -> tuple[Verdict, str]:
    """The verdict, and why."""
    kept, never_moved = figures[_KEPT], figures[_NEVER_MOVED]
    error, width = errors[_KEPT], _WIDTH * errors[_NEVER_MOVED]
    if math.isnan(kept):
        return Verdict.NOT_JUDGED, (
            "no observed step had an update that the format could lose: nothing moved, or the "
            "weights are stored no finer than that (then read unmoved_frac)"
        )
    spans = never_moved + width >= _LIMITS.frozen > never_moved - width
    if spans or (never_moved >= _LIMITS.frozen and math.isnan(width)):
        return Verdict.UNCERTAIN, (
            f"{_share(never_moved, errors[_NEVER_MOVED])} of the weights that had updates would "
            "never have moved, which could be “frozen” or not"
        )
    if never_moved >= _LIMITS.frozen:
        return Verdict.FROZEN, (
            f"{percent(never_moved)} of the weights that had updates would never have moved"
        )
    if kept < _LIMITS.stores_fine and (verdict := _range_verdict(figures, errors)):
        shares = (_share_in_percent(figures[metric], errors[metric]) for metric in _OF_RANGE)
        stored_as_0, beyond = shares
        return verdict, (
            f"{stored_as_0} of the weights are stored as 0 and {beyond} lie beyond the top, and "
            f"{_share(kept, error)} of the update is kept"
        )
    return _by_kept(kept, error, figures[_STALL])


def _range_verdict(figures: Mapping[str, float], errors: Mapping[str, float]) -> Verdict | None:
    """Whether the range is at fault, or whether that is uncertain; None if it is not."""
    limits = (_LIMITS.underflow, _LIMITS.saturated)
    is_so, may_be_so = (
        any(
            figures[metric] + side * _WIDTH * errors[metric] >= threshold
            for metric, threshold in zip(_OF_RANGE, limits, strict=True)
        )
        for side in (-1, 1)
    )
    return Verdict.RANGE if is_so else Verdict.UNCERTAIN if may_be_so else None


def _error_of_share(share: float, layer: LayerInfo | None) -> float:
    """The standard error of a share of a layer's elements, drawn without replacement."""
    population = math.prod(layer.shape) if layer is not None else 0
    if layer is None or layer.elements >= population or not 0 < share < 1:
        return 0.0
    return math.sqrt(share * (1 - share) / layer.elements * (1 - layer.elements / population))


def _by_kept(kept: float, error: float, stall: float) -> tuple[Verdict, str]:
    if math.isnan(error):
        return Verdict.UNCERTAIN, (
            f"the sample keeps {kept:.3g} of the update, but too few of its elements carry that to "
            "say how far it is off"
        )
    low, high = _class_of(kept - _WIDTH * error), _class_of(kept + _WIDTH * error)
    share = f"{_share(kept, error)} of the update is kept and {percent(stall)} of updates vanish"
    if low is not high:
        return Verdict.UNCERTAIN, f"{share}, which could be “{low.short}” or “{high.short}”"
    return low, f"{share} on average"


def _class_of(kept: float) -> Verdict:
    if kept >= _LIMITS.stores_fine:
        return Verdict.STORES_FINE
    return Verdict.WATCH if kept >= _LIMITS.needs_remedy else Verdict.NEEDS_REMEDY


def _summary(advice: Sequence[Advice]) -> str:
    """A sentence or two for each format, and what is uncertain."""
    if not advice:
        return "No step was observed, so there is nothing to say."
    formats = dict.fromkeys(each.format for each in advice)
    return " ".join(
        _summary_of(format, [each for each in advice if each.format == format])
        for format in formats
    )


def _summary_of(format: str, advice: Sequence[Advice]) -> str:
    counts = Counter(each.verdict for each in advice)
    judged = len(advice) - counts[Verdict.NOT_JUDGED]
    if not judged:
        return f"{format} could not be judged for any layer."
    if counts[Verdict.STORES_FINE] == len(advice):
        return f"{format} would store every layer fine."
    parts = [
        f"{counts[verdict]:,} {words}"
        for verdict, words in _SUMMARY_WORDS.items()
        if counts[verdict]
    ]
    text = f"{format}, of {len(advice):,} layers: {', '.join(parts)}"
    if frozen := [each.layer for each in advice if each.verdict is Verdict.FROZEN]:
        text += f"; frozen: {few(frozen)}"
    return f"{text}."


_SUMMARY_WORDS = {
    Verdict.STORES_FINE: "fine",
    Verdict.WATCH: "to watch",
    Verdict.NEEDS_REMEDY: "need a remedy",
    Verdict.FROZEN: "frozen",
    Verdict.RANGE: "out of range",
    Verdict.UNCERTAIN: "uncertain (raise max_elements)",
    Verdict.NOT_JUDGED: "not judged",
}


def _share_in_percent(share: float, error: float) -> str:
    return f"{percent(share)} ± {200 * error:.1g}" if error > 0 else percent(share)


def _share(value: float, error: float) -> str:
    """With two standard errors, where it was sampled."""
    return f"{value:.3g} ± {_WIDTH * error:.1g}" if error > 0 else f"{value:.3g}"
