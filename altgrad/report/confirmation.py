"""`Confirmation`: what one run predicted of a recipe, beside what happened in a run stored so.

A *recipe* says how weights and optimizer states are stored and stepped. The predicting run tried it
on a *twin*, a sample of each layer. The real run is stored in this way itself, and compares itself
with a twin in float32, under the name ``now``.

`find_confirmation` is the function to begin with. The modules `terminal`, `web_page` and `exports`
show the result.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from altgrad._messages import few, format_count
from altgrad.measurement.catalogue import NOW
from altgrad.report.matching import SHARES, find_match
from altgrad.report.records.floats import FloatsByKey
from altgrad.report.records.run import Run

FROZEN = 0.99
"""Share of weights that never moved from which on a layer is called frozen."""

MEANING = (
    "Predicted: a sample of each layer of A, stored as the recipe says and stepped with the "
    "gradients of A. Real: B itself, which is stored so. Each stands beside float32 with the same "
    "gradients."
)
"""A text above a table: what “predicted” and “real” mean in it."""

_NO_FIGURES = (
    "No layer can be compared: float32 moved none, or weights are NaN or inf in A or in B (see "
    "altgrad report)."
)
_CLOSE = 0.1
"""Largest difference between a predicted and a real share that counts as predicted correctly.

Samples of 256 elements alone make shares differ by 0.05.
"""
_SECOND_MOMENT = "exp_avg_sq"
"""The optimizer state that is compared if both runs have it, since in bf16 it often cannot fall."""


_SHORT = {"frozen_frac": "frozen", "progress_kept": "kept"}
_MEANINGS = {
    "frozen_frac": "frozen_frac: share of weights that never moved, of those that float32 moved",
    "progress_kept": "progress_kept: share of the way of float32 that was made: 1 all, 0 nothing",
}


class Pair(NamedTuple):
    """A figure that was predicted, and the one that was measured in a real run.

    Attributes:
        predicted: The figure of the twin, a sample that was stored as a recipe says.
        real: The figure of the run that was stored so itself.
        difference: The distance between both: absolute for shares, and in octaves for a ratio. NaN
            if a figure has no value.
    """

    predicted: float
    real: float
    difference: float

    @property
    def is_known(self) -> bool:
        """True if both figures have a value."""
        return not (math.isnan(self.predicted) or math.isnan(self.real))


class ConfirmedLayer(NamedTuple):
    """A layer, or the model, with its figures as predicted and as measured.

    Attributes:
        name: Name of the layer; None for the model.
        step: The last step at which both runs were observed and have these figures.
        pairs: The figures by metric, in the order of `Confirmation.metrics`.
    """

    name: str | None
    step: int
    pairs: Mapping[str, Pair]

    @property
    def difference(self) -> float:
        """The largest difference of `frozen_frac` and `progress_kept`; -1 if none has a value."""
        found = [self.pairs[metric].difference for metric in SHARES if metric in self.pairs]
        return max((each for each in found if not math.isnan(each)), default=-1.0)


class FrozenCounts(NamedTuple):
    """Numbers of layers of which at least 0.99 of the weights never moved.

    Attributes:
        predicted: Number of layers of which this was predicted.
        real: Number of layers of which it is true.
        both: Number of layers of which it was predicted and is true.
        layers: Number of layers of which both are known.
    """

    predicted: int
    real: int
    both: int
    layers: int


@dataclass(frozen=True)
class Confirmation:
    """A prediction beside what happened: two runs, of which one tried how the other is stored.

    Attributes:
        predicting: The run that tried the recipe, a way to store weights, on samples: A.
        real: The run that is stored as the recipe says: B.
        recipe: Name of the recipe in the predicting run.
        is_swapped: True if the runs were given in the other order.
    """

    predicting: Run
    real: Run
    recipe: str
    is_swapped: bool = False

    @functools.cached_property
    def metrics(self) -> tuple[str, ...]:
        """Names of the compared metrics: two shares, and the ratio of one optimizer state.

        The state is the second moment, ``exp_avg_sq``, if both runs have it, or else the first that
        both have.
        """
        states = _list_ratios(self.real, NOW)
        both = [name for name in _list_ratios(self.predicting, self.recipe) if name in states]
        second = f"{_SECOND_MOMENT}_ratio"
        return (*SHARES, *([second] if second in both else both[:1]))

    @functools.cached_property
    def layers(self) -> Sequence[ConfirmedLayer]:
        """The layers of both runs, those with the largest difference first; ties by name."""
        names = [name for name in self._predicted if name is not None and name in self._real]
        found = [layer for name in names if (layer := self._confirm(name)) is not None]
        return sorted(found, key=lambda layer: (-layer.difference, layer.name))

    @functools.cached_property
    def model(self) -> ConfirmedLayer | None:
        """The figures of the whole model; None if the runs differ in layers or share no step."""
        return None if self._describe_other_layers() else self._confirm(None)

    @functools.cached_property
    def mean_errors(self) -> dict[str, float]:
        """The mean difference over the layers, by metric; NaN if no layer has a value."""
        return {
            metric: _average(layer.pairs[metric].difference for layer in self.layers)
            for metric in self.metrics
        }

    @functools.cached_property
    def frozen(self) -> FrozenCounts:
        """Numbers of layers that are frozen as predicted: 0.99 of their weights never moved."""
        pairs = [layer.pairs["frozen_frac"] for layer in self.layers]
        known = [(p.predicted >= FROZEN, p.real >= FROZEN) for p in pairs if p.is_known]
        predicted, real = (sum(each[k] for each in known) for k in range(2))
        return FrozenCounts(predicted, real, sum(map(all, known)), len(known))

    @property
    def heading(self) -> str:
        """The line above a table: the recipe, what stands beside what, and the step."""
        steps = {layer.step for layer in self.layers}
        when = f"at step {max(steps):,}" if steps else "at no step that both observed"
        return f"{self.recipe}: what A predicts, and what really happens in B, {when}"

    @property
    def summary(self) -> list[str]:
        """Sentences: by how much the figures are off, and how many layers are frozen."""
        if not self.layers:
            return ["No layer has figures of both runs at the same step: nothing to compare."]
        count = format_count(len(self.layers), "layer")
        errors = ", ".join(
            f"{metric} {error:.3f}{'' if metric in SHARES else ' octaves'}"
            for metric, error in self.mean_errors.items()
            if not math.isnan(error)
        )
        known = self.frozen
        if not known.layers:
            return [_NO_FIGURES]
        frozen = (
            f"Frozen, of {format_count(known.layers, 'layer')}: {known.predicted:,} as A predicts, "
            f"{known.real:,} in B, {known.both:,} in both (at least {100 * FROZEN:g} % of their "
            "weights never moved)."
        )
        close = [each for each in self.layers if 0 <= each.difference <= _CLOSE]
        kept = f"As predicted (both shares within {_CLOSE:g}): {len(close):,} of {count}."
        return [kept, *([f"Mean difference over {count}: {errors}."] if errors else []), frozen]

    @property
    def notes(self) -> list[str]:
        """Sentences on the order and lengths of the runs, and on layers without a counterpart."""
        notes = [*self.predicting.notes, *self.real.notes]
        if self.is_swapped:
            notes.insert(0, "the runs were given in the other order: the first one is B")
        return [*notes, *self._describe_lengths(), *self._describe_other_layers()]

    def _describe_lengths(self) -> list[str]:
        """Return notes on a run that was observed longer, and on layers at an earlier step."""
        notes = []
        ends = [max(rows.get(None, ()), default=0) for rows in (self._predicted, self._real)]
        if ends[0] != ends[1]:
            notes.append(
                f"A was last observed at step {ends[0]:,}, and B at step {ends[1]:,}: they are "
                "compared at the last step that both have"
            )
        notes += self._describe_lost_figures()
        steps = {layer.step for layer in self.layers}
        earlier = [str(layer.name) for layer in self.layers if layer.step < max(steps)]
        if earlier:
            count = format_count(len(earlier), "layer")
            notes.append(
                f"compared at earlier steps, down to {min(steps):,}: {count} ({few(earlier)})"
            )
        return notes

    def _describe_lost_figures(self) -> list[str]:
        """Return a note if later steps of both runs have no value, as after NaN in the weights."""
        steps = [
            max(self._predicted[layer.name].keys() & self._real[layer.name].keys())
            for layer in self.layers
        ]
        used = max((layer.step for layer in self.layers), default=0)
        if max(steps, default=0) <= used:
            return []
        ends = f"figures end at step {used:,}, though both runs go on to step {max(steps):,}"
        return [f"{ends}: weights may have become NaN or inf (see altgrad report)"]

    def _describe_other_layers(self) -> list[str]:
        """Return notes on layers that have figures in one run alone."""
        notes = []
        for letter, mine, other, others, run, recipe in (
            ("A", self._predicted, "B", self._real, self.real, NOW),
            ("B", self._real, "A", self._predicted, self.predicting, self.recipe),
        ):
            alone = [name for name in mine if name is not None and name not in others]
            if missing := [name for name in alone if name not in run.layers]:
                notes.append(f"layers only in {letter}: {len(missing):,} ({few(missing)})")
            if bare := [name for name in alone if name in run.layers]:
                why = "not stored low" if recipe == NOW else f"without figures of {recipe}"
                notes.append(f"layers {why} in {other}: {len(bare):,} ({few(bare)})")
        if notes:
            notes.append(
                "A and B have figures of other layers, so that those of the model are left out"
            )
        return notes

    def _confirm(self, name: str | None) -> ConfirmedLayer | None:
        """Return a layer, or the model, at the last step of both runs; None without a common step.

        Steps at which both have values come first: weights may become NaN later.
        """
        predicted, real = self._predicted.get(name, {}), self._real.get(name, {})
        steps = predicted.keys() & real.keys()
        if not steps:
            return None
        step = max(
            steps,
            key=lambda each: (
                _has_value(predicted[each], self.recipe) and _has_value(real[each], NOW),
                each,
            ),
        )
        both = predicted[step], real[step]
        pairs = {}
        for metric in self.metrics:
            one = both[0].get(f"{metric}/{self.recipe}", math.nan)
            other = both[1].get(f"{metric}/{NOW}", math.nan)
            pairs[metric] = Pair(one, other, _measure_difference(metric, one, other))
        return ConfirmedLayer(name, step, pairs)

    @functools.cached_property
    def _predicted(self) -> dict[str | None, dict[int, Mapping[str, float]]]:
        return _group_figures(self.predicting, self.recipe)

    @functools.cached_property
    def _real(self) -> dict[str | None, dict[int, Mapping[str, float]]]:
        return _group_figures(self.real, NOW)


def find_confirmation(a: Run, b: Run, recipe: str | None = None) -> Confirmation | None:
    """Find out which of two runs predicted the other, and put prediction and reality together.

    A *recipe* says how weights and optimizer states are stored and stepped. One run predicts the
    other if it tried, on samples of its layers, the recipe by which the other run is stored.

    Args:
        a: A run, as `altgrad.report.read` returns it.
        b: Another one. If `b` predicts `a`, the runs change places.
        recipe: Name of a recipe that one of the runs predicts. None for the one by which the other
            run is stored.

    Returns:
        The confirmation; None if `recipe` is None and neither run is stored as the other predicts.

    Raises:
        ValueError: No run tried `recipe`, or the other run did not measure what it loses itself.
            Or `recipe` is None, and several recipes say how the other run is stored.
    """
    match = find_match(a, b, recipe)
    if match is None:
        return None
    runs = (b, a) if match.is_swapped else (a, b)
    return Confirmation(*runs, match.recipe, match.is_swapped)


def shorten_metric(metric: str) -> str:
    """Return a word for a metric of a confirmation, for the heading of a column."""
    return _SHORT.get(metric, "ratio")


def explain_metric(metric: str) -> str:
    """Return what a metric of a confirmation means, in a line for the legend of a table."""
    state = metric.removesuffix("_ratio")
    ratio = f"{metric}: {state} over that in float32; diff. in octaves, 1 is a factor of 2"
    return _MEANINGS.get(metric, ratio)


def _group_figures(run: Run, recipe: str) -> dict[str | None, dict[int, Mapping[str, float]]]:
    """Return the figures of a recipe, by name of the layer (None: model) and by step."""
    found: dict[str | None, dict[int, Mapping[str, float]]] = {}
    shares = {f"{metric}/{recipe}" for metric in SHARES}
    wanted = {key for key in run.figure_keys if key.partition("/")[2] == recipe}
    for table in run.tables():
        places = {key: p for key, p in table.columns.figure_places.items() if key in wanted}
        positions = {key: position for position, key in enumerate(places)}
        numbers = table.numbers[[*places.values()]]
        tried = [places[key] for key in shares & places.keys()]
        for row, layer in enumerate(table.columns.layers):
            if not table.is_absent[tried, row].all():
                own = FloatsByKey(positions, numbers[:, row].tolist())
                found.setdefault(layer, {})[table.step] = own
    return found


def _has_value(figures: Mapping[str, float], recipe: str) -> bool:
    """Return True if `frozen_frac` or `progress_kept` of a recipe is there, and not NaN."""
    return any(not math.isnan(figures.get(f"{metric}/{recipe}", math.nan)) for metric in SHARES)


def _list_ratios(run: Run, recipe: str) -> list[str]:
    """Return the metrics ``{state}_ratio`` that a run has for a recipe, in order of the file."""
    parts = (key.partition("/") for key in run.figure_keys)
    return [metric for metric, _, name in parts if name == recipe and metric.endswith("_ratio")]


def _average(values: Iterable[float]) -> float:
    """Return the mean of the values that are not NaN: inf counts; NaN without values."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _measure_difference(metric: str, predicted: float, real: float) -> float:
    """Return the distance of two figures: absolute for shares, in octaves for ratios."""
    if predicted == real:
        return 0.0
    if metric in SHARES:
        return abs(predicted - real)
    if math.isnan(predicted) or math.isnan(real):
        return math.nan
    if min(predicted, real) <= 0 or max(predicted, real) == math.inf:
        return math.inf
    return abs(math.log2(predicted) - math.log2(real))
