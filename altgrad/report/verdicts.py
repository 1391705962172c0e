"""Judge how well each format would store each layer: a verdict with figures and a reason.

A verdict says whether the layer would still train if its weights were stored in the format. `Judge`
collects the figures of a run, step by step, and returns an `Assessment`: one `Advice` for each
layer and format. `_judge` holds the rules, which docs/how-it-works.md explains. Thresholds and
evidence come from `altgrad.report.calibration`, which rests on runs that really stored their
weights in a format, rounded to nearest.

The module `run_report` comes next.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from altgrad._messages import few, format_count, format_percent
from altgrad.measurement.intervals import find_interval, find_share_error
from altgrad.report.calibration import calibration
from altgrad.report.records.run import Run
from altgrad.report.records.schema import FormatInfo, LayerInfo

_LIMITS = calibration().thresholds

_KEPT, _STALL, _NEVER_MOVED = "kept_update_ratio", "stall_frac", "never_moved_frac"
_RANGE = ("underflow_frac", "saturated_frac")
_NONFINITE = "nonfinite_frac"
# The interval of a share of 1 begins here for 35 elements, or 35 clusters of blocks. A sample of
# less than 381 has an interval that begins below 0.99, also if no weight of it ever moved.
_LEAST_UNANIMOUS = 0.9
_MEANS = (_KEPT, _STALL, *_RANGE)
RESTS_ON = (_KEPT, _STALL, _NEVER_MOVED, *_RANGE)
"""Metrics on which a verdict and its reason rest, each with a standard error."""


class Verdict(str, Enum):
    """A judgement of how a format would store a layer; the value is a sentence for users."""

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
        """Name of the verdict in one word, for tables."""
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
    """A verdict on how well one format would store one layer, with its reason.

    Attributes:
        layer: Name of the layer.
        format: Name of the format.
        verdict: The verdict.
        figures: Figures on which the verdict rests, by metric; NaN if a metric has no value.
        errors: Standard errors of these figures, by metric, as a sample of the layer has them; NaN
            if an error cannot be trusted.
        reason: Why the verdict was given, in one sentence.
        evidence: Outcome of real runs with this verdict, in one sentence. Empty for
            `Verdict.UNCERTAIN` and `Verdict.NOT_JUDGED`.
        nonfinite: Largest share of the layer's elements that were NaN or inf in an observed step.
            No figure counts these elements, so that the verdict is on the finite elements.
    """

    layer: str
    format: str
    verdict: Verdict
    figures: Mapping[str, float]
    errors: Mapping[str, float]
    reason: str
    evidence: str = ""
    nonfinite: float = 0.0

    @property
    def kept(self) -> float:
        """The kept_update_ratio, how much of the updates the format keeps; NaN without a value."""
        return self.figures.get(_KEPT, math.nan)

    def interval(self, metric: str) -> tuple[float, float]:
        """Return the confidence interval of 95 % around a figure.

        Args:
            metric: Name of a metric of `figures`.

        Returns:
            The lower and the upper end. Both equal the figure if all elements were measured, and
            are NaN if the error cannot be trusted.
        """
        return find_interval(metric, self.figures[metric], self.errors[metric])


@dataclass(frozen=True)
class Assessment:
    """The verdicts on all layers of a model: how well each format would store each layer.

    Attributes:
        advice: Verdict, with its reason, on each layer in each format that the layer is judged for.
            The layers are in the order in which they were first observed.
        suggestions: By name of the layer, the name of the smallest format that stores the layer
            fine; None if no judged format stores it fine.
        summary: The result in one paragraph.
    """

    advice: Sequence[Advice]
    suggestions: Mapping[str, str | None]
    summary: str

    @functools.cached_property
    def by_layer(self) -> dict[str, dict[str, Advice]]:
        """Verdicts by layer and format: would the layer still train if stored in the format?

        Rounding weights to a format loses a part of each update. First comes the layer that would
        keep the smallest part, its lowest kept_update_ratio in any format.
        """
        by_layer: dict[str, dict[str, Advice]] = {}
        for advice in self.advice:
            by_layer.setdefault(advice.layer, {})[advice.format] = advice
        return dict(sorted(by_layer.items(), key=lambda item: _find_least_kept(item[1].values())))


@dataclass
class _Tally:
    """A summary of the observed steps of one layer in one format, from which a verdict follows.

    Attributes:
        sums: Sums of figures by metric, over the steps in which the metric has a value, and sums of
            standard errors by ``error of {metric}``.
        counts: Numbers of steps in these sums, by the same keys. ``stated {metric}`` has the number
            of steps whose figures came with a standard error.
        never_moved: Last figure of never_moved_frac, which covers the whole run.
        never_moved_error: Standard error of `never_moved`.
        nonfinite: Largest share of NaN and inf in a step.
    """

    sums: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    never_moved: float = math.nan
    never_moved_error: float = math.nan
    nonfinite: float = 0.0  # the largest share in a step

    def add_step(self, figures: Mapping[str, float], errors: Mapping[str, float]) -> None:
        for metric in _MEANS:
            self._add(metric, figures[metric])
        for metric in _MEANS:
            if math.isfinite(figures[metric]) and metric in errors:
                self._add(f"error of {metric}", errors[metric])
                self.counts[f"stated {metric}"] += 1
        if math.isfinite(figures[_NEVER_MOVED]):
            self.never_moved = figures[_NEVER_MOVED]
            self.never_moved_error = errors[_NEVER_MOVED]

    def _add(self, key: str, value: float) -> None:
        if math.isfinite(value):
            self.sums[key] += value  # type: ignore[assignment] # typeshed's Counter holds int only
            self.counts[key] += 1

    def mean(self, key: str) -> float:
        """Return the mean of a metric, or of ``error of {metric}``, over the steps with a value.

        Without such steps the mean is NaN.
        """
        return self.sums[key] / self.counts[key] if self.counts[key] else math.nan

    def error(self, metric: str, layer: LayerInfo | None) -> float:
        """Return the mean standard error of a metric; NaN unless most steps have a finite error.

        Args:
            metric: Name of the metric.
            layer: The layer. For a share of weights out of range, the size of its sample gives an
                estimate if no step came with an error.
        """
        if metric == _NEVER_MOVED:
            return self.never_moved_error
        if metric in _RANGE and not self.counts[f"stated {metric}"]:
            return _estimate_share_error(self.mean(metric), layer)
        trusted = self.counts[f"error of {metric}"] * 2 > self.counts[metric]
        return self.mean(f"error of {metric}") if trusted else math.nan


class Judge:
    """A collector of a run's figures that judges how well each format would store each layer.

    Verdicts rest on means over the observed steps in which a figure has a value; each step has the
    same weight. Standard errors are averaged as well: every step measures the same elements, so
    that the error of the mean is as large as that of a step. The metric `never_moved_frac` covers
    the whole run, so that its last figure counts.

    Args:
        formats: Judged formats, by name.
        layers: Observed layers, by name, for the sizes of their samples. For a layer that is
            missing, shares of weights out of the format's range count as exact.
    """

    def __init__(
        self, formats: Mapping[str, FormatInfo], layers: Mapping[str, LayerInfo] | None = None
    ) -> None:
        self._formats = formats
        self._layers = dict(layers or {})
        self._tallies: dict[str, dict[str, _Tally]] = {}

    def add_layers(self, layers: Mapping[str, LayerInfo]) -> None:
        """Add layers that appear in mid-run to the observed layers."""
        self._layers |= layers

    def add(self, layer: str, figures: Mapping[str, float], errors: Mapping[str, float]) -> None:
        """Add the figures of one layer in one observed step.

        Args:
            layer: Name of the layer.
            figures: Figures by ``metric/format``, and ``nonfinite_frac``. A format is judged if
                `figures` has all its figures on which a verdict rests.
            errors: Standard errors by ``metric/format``; NaN is an error that cannot be trusted. A
                missing error counts as 0, as if all elements were measured. For underflow_frac and
                saturated_frac it is estimated, if the layer's sample is known.
        """
        tallies = self._tallies.setdefault(layer, {})
        for format in self._formats:
            keys = {metric: f"{metric}/{format}" for metric in (*_MEANS, _NEVER_MOVED)}
            if all(key in figures for key in keys.values()):
                tally = tallies.setdefault(format, _Tally())
                tally.add_step(
                    {metric: figures[key] for metric, key in keys.items()},
                    {
                        metric: errors.get(keys[metric], 0.0)
                        for metric in RESTS_ON
                        if metric not in _RANGE or keys[metric] in errors
                    },
                )
                tally.nonfinite = max(tally.nonfinite, figures.get(_NONFINITE, 0.0))

    def assessment(self) -> Assessment:
        """Return the verdicts on all layers in all formats, judged by the steps added so far."""
        advice = [
            _advise(layer, format, tally, self._layers.get(layer))
            for layer, tallies in self._tallies.items()
            for format, tally in tallies.items()
        ]
        fine: dict[str, list[str]] = {layer: [] for layer in self._tallies}
        for each in advice:
            if each.verdict is Verdict.STORES_FINE:
                fine[each.layer].append(each.format)
        suggestions = {
            layer: find_smallest(formats, self._formats) for layer, formats in fine.items()
        }
        return Assessment(advice, suggestions, _summarize(advice))

    def state_dict(self) -> dict[str, Any]:
        """Return the sums of all figures added so far, for a checkpoint.

        Returns:
            By layer and format: ``sums`` and ``counts`` of the steps by metric, the last
            ``never_moved`` with its ``never_moved_error``, and the largest share ``nonfinite``. All
            values are plain numbers.
        """
        return {
            layer: {
                format: {**vars(tally), "sums": dict(tally.sums), "counts": dict(tally.counts)}
                for format, tally in tallies.items()
            }
            for layer, tallies in self._tallies.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the sums of figures that `state_dict` returned."""
        self._tallies = {
            layer: {
                format: _Tally(
                    **{**tally, "sums": Counter(tally["sums"]), "counts": Counter(tally["counts"])}
                )
                for format, tally in tallies.items()
            }
            for layer, tallies in state.items()
        }


def find_smallest(names: Iterable[str], formats: Mapping[str, FormatInfo]) -> str | None:
    """Return the name of the format with the fewest bits.

    Args:
        names: Names of the candidates. The first of equally small formats is chosen.
        formats: Formats by name.

    Returns:
        The name; None if there is no candidate.
    """
    return min(names, key=lambda name: formats[name].bits, default=None)


def judge_run(run: Run) -> Assessment:
    """Judge whether the layers of a run would still train if formats stored their weights.

    Args:
        run: The run, as `altgrad.report.read` returns it.

    Returns:
        A verdict, with its reason, on each layer in each number format that it was measured for.
    """
    judge = Judge(run.formats, run.layers)
    for row in run.rows:
        if row.layer is not None:
            judge.add(row.layer, row.figures, row.errors)
    return judge.assessment()


def _find_least_kept(advice: Iterable[Advice]) -> float:
    """Return the smallest kept_update_ratio among verdicts on one layer in several formats.

    The kept_update_ratio is how much of the layer's updates a format keeps: 1 is all, 0 nothing.
    The result is inf if all are NaN.
    """
    return min((a.kept for a in advice if not math.isnan(a.kept)), default=math.inf)


def _advise(layer: str, format: str, tally: _Tally, info: LayerInfo | None) -> Advice:
    figures = {metric: tally.mean(metric) for metric in _MEANS}
    figures[_NEVER_MOVED] = tally.never_moved
    errors = {metric: tally.error(metric, info) for metric in RESTS_ON}
    intervals = {
        metric: find_interval(metric, figures[metric], errors[metric]) for metric in errors
    }
    verdict, reason = _judge(figures, intervals)
    if tally.nonfinite:
        share = format_percent(tally.nonfinite)
        broken = f"{share} of the elements are NaN or inf, and no figure counts them"
        is_gone = verdict is Verdict.NOT_JUDGED and tally.nonfinite == 1
        reason = broken if is_gone else f"{broken}; {reason}"
    evidence = calibration().evidence(verdict.name)
    return Advice(layer, format, verdict, figures, errors, reason, evidence, tally.nonfinite)


_Interval = tuple[float, float]


def _judge(figures: Mapping[str, float], intervals: Mapping[str, _Interval]) -> tuple[Verdict, str]:
    """Return the verdict on a layer in a format, and its reason, by the first rule that applies.

    Args:
        figures: Figures of the layer in the format, by metric.
        intervals: Confidence intervals of 95 % around the figures, by metric.
    """
    kept, never_moved = figures[_KEPT], figures[_NEVER_MOVED]
    if math.isnan(kept):
        return Verdict.NOT_JUDGED, (
            "no observed step had an update that the format could lose: no weight moved, or the "
            "weights are stored no finer than the format (then read unmoved_frac)"
        )
    low, high = intervals[_NEVER_MOVED]
    # The interval contains the threshold. A sample without any weight that ever moved is no reason
    # to doubt, unless it is tiny.
    is_unanimous = never_moved == 1 and low >= _LEAST_UNANIMOUS
    spans = low < _LIMITS.frozen <= high and not is_unanimous
    if spans or (never_moved >= _LIMITS.frozen and math.isnan(low)):
        return Verdict.UNCERTAIN, (
            f"{_write_percent(never_moved, (low, high))} of the weights that had updates would "
            "never have moved, which could be “frozen” or not"
        )
    if never_moved >= _LIMITS.frozen:
        return Verdict.FROZEN, (
            f"{_write_percent(never_moved, (low, high))} of the weights that had updates would "
            "never have moved"
        )
    if kept < _LIMITS.stores_fine and (verdict := _range_verdict(figures, intervals)):
        shares = (_write_percent(figures[metric], intervals[metric]) for metric in _RANGE)
        stored_as_0, beyond = shares
        return verdict, (
            f"{stored_as_0} of the weights are stored as 0 and {beyond} lie beyond the top, and "
            f"{_write_figure(kept, intervals[_KEPT])} of the update is kept"
        )
    return _judge_by_kept(kept, intervals[_KEPT], figures[_STALL])


def _range_verdict(
    figures: Mapping[str, float], intervals: Mapping[str, _Interval]
) -> Verdict | None:
    """Return RANGE if too many weights are stored as 0 or lie beyond a format's largest value.

    `figures` and their confidence `intervals` are by metric. The result is UNCERTAIN if the sample
    leaves open whether a share reaches its threshold, and None if both shares are below their
    thresholds.
    """
    limits = zip(_RANGE, (_LIMITS.underflow, _LIMITS.saturated), strict=True)
    found = None
    for metric, limit in limits:
        low, high = intervals[metric]
        if low >= limit:
            return Verdict.RANGE
        # A sample without any such element is no reason to doubt, however small it is.
        if figures[metric] > 0 and not high < limit:
            found = Verdict.UNCERTAIN
    return found


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


def _judge_by_kept(kept: float, interval: _Interval, stall: float) -> tuple[Verdict, str]:
    if math.isnan(interval[0]):
        return Verdict.UNCERTAIN, (
            f"the sample keeps {kept:.3g} of the update, but too few of its elements carry the "
            "update to estimate the error"
        )
    low, high = map(_classify, interval)
    stalled = format_percent(stall)
    share = f"{_write_figure(kept, interval)} of the update is kept and {stalled} of updates vanish"
    if low is not high:
        return Verdict.UNCERTAIN, f"{share}, which could be “{low.short}” or “{high.short}”"
    return low, f"{share} on average"


def _classify(kept: float) -> Verdict:
    if kept >= _LIMITS.stores_fine:
        return Verdict.STORES_FINE
    return Verdict.WATCH if kept >= _LIMITS.needs_remedy else Verdict.NEEDS_REMEDY


def _summarize(advice: Sequence[Advice]) -> str:
    """Return a paragraph with a sentence on each format, and on layers with NaN or inf."""
    if not advice:
        return "No step was observed: there are no verdicts."
    formats = dict.fromkeys(each.format for each in advice)
    sentences = [
        _summarize_format(format, [each for each in advice if each.format == format])
        for format in formats
    ]
    return " ".join([*sentences, *_mention_nonfinite(advice)])


def _mention_nonfinite(advice: Sequence[Advice]) -> list[str]:
    """Return a sentence on layers with NaN or inf elements; an empty list without such layers."""
    shares = {each.layer: each.nonfinite for each in advice if each.nonfinite}
    if not shares:
        return []
    layers = few([f"{layer} ({format_percent(share)})" for layer, share in shares.items()])
    return [f"NaN or inf in some elements, which no figure counts: {layers}."]


def _summarize_format(format: str, advice: Sequence[Advice]) -> str:
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
    text = f"{format}, of {format_count(len(advice), 'layer')}: {', '.join(parts)}"
    if frozen := [each.layer for each in advice if each.verdict is Verdict.FROZEN]:
        text += f"; frozen: {few(frozen)}"
    return f"{text}."


_SUMMARY_WORDS = {
    Verdict.STORES_FINE: "fine",
    Verdict.WATCH: "to watch",
    Verdict.NEEDS_REMEDY: "in need of a remedy",
    Verdict.FROZEN: "frozen",
    Verdict.RANGE: "out of range",
    Verdict.UNCERTAIN: "uncertain (raise max_elements)",
    Verdict.NOT_JUDGED: "not judged",
}


def _write_percent(share: float, interval: _Interval) -> str:
    """Return a share as text in percent, with its confidence interval if there is one."""
    if not interval[0] < interval[1]:
        return format_percent(share)
    low, high = (f"{100 * end:.3g}" for end in interval)
    return f"{format_percent(share)} ({low} to {high} %)"


def _write_figure(value: float, interval: _Interval) -> str:
    """Return a figure as text, with ``±`` half of its confidence interval, as ``0.5 ± 0.02``.

    A figure of which all elements were measured has an interval without a width, and stands alone.
    """
    half = (interval[1] - interval[0]) / 2
    return f"{value:.3g} ± {half:.1g}" if half > 0 else f"{value:.3g}"
