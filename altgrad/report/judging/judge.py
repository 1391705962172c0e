"""`Judge`: collect the figures of a run, step by step, and return its `Assessment`.

A *recipe* says how weights and optimizer states are stored. For each layer, the judge adds up the
figures of each recipe that the run tried, and of each number format that was not tried as a recipe.
`judge_run` judges a run that was read from its file.

Read `remedies` first; `run_report` comes next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from altgrad._messages import format_percent
from altgrad.measurement.catalogue import NOW
from altgrad.measurement.intervals import find_interval
from altgrad.measurement.layer_columns import (
    LayerColumns,
    LayerRow,
    StandardErrors,
    gather_columns,
)
from altgrad.quantization.block_formats import get_formats
from altgrad.report.judging.calibration import calibration
from altgrad.report.judging.decimals import format_kept
from altgrad.report.judging.families import as_recipe, find_family, is_stochastic
from altgrad.report.judging.remedies import add_remedies, find_format
from altgrad.report.judging.run_rules import LayerShare, judge_recipe
from altgrad.report.judging.run_tallies import tally_run
from altgrad.report.judging.step_rules import describe_range, judge_range, judge_steps
from altgrad.report.judging.summaries import summarize
from altgrad.report.judging.tallies import (
    FROZEN,
    KEPT,
    MOVED,
    PROGRESS,
    STEP_METRICS,
    StepTally,
    TwinTally,
    add_format_step,
    list_twin_steps,
)
from altgrad.report.judging.twin_rules import find_errors, judge_twin
from altgrad.report.judging.verdicts import Advice, Assessment, RunAdvice, Verdict
from altgrad.report.memory import measure_memory
from altgrad.report.records.run import Run
from altgrad.report.records.schema import FormatInfo, LayerInfo, RecipeInfo

__all__ = ["MOST_TWIN_ELEMENTS", "Judge", "StandardErrors", "find_smallest", "judge_run"]

MOST_TWIN_ELEMENTS = 256
"""Default of `twin_elements`: the most elements of a layer in a twin, the sample that is stepped.

It repeats a constant of `altgrad.observation.rules`, whose import would load torch.
"""
_Tally = TypeVar("_Tally", TwinTally, StepTally)
_FEW_BITS = 8
_NEAREST = ("nearest-16", "nearest-8")


class Judge:
    """A collector of a run's figures that judges what each recipe keeps of the training.

    A *recipe* says how weights and optimizer states are stored. Verdicts rest on *twins*: samples
    of the layers that are stored as a recipe says and stepped beside the training. Of a twin the
    last figures count, which cover the whole run. A number format without a twin is judged by means
    over the observed steps.

    Args:
        formats: Judged formats, by name.
        layers: Observed layers, by name. The size of a layer says how much it counts in the run; a
            layer that is missing counts as one element.
        recipes: Recipes with twins, by name.
        now: How the run itself is stored; None if unknown.
    """

    def __init__(
        self,
        formats: Mapping[str, FormatInfo],
        layers: Mapping[str, LayerInfo] | None = None,
        recipes: Mapping[str, RecipeInfo] | None = None,
        now: RecipeInfo | None = None,
    ) -> None:
        self._formats = formats
        self._layers = dict(layers or {})
        # The run itself, "now", is one of the recipes, and comes first.
        self._recipes = ({} if now is None else {NOW: as_recipe(now)}) | dict(recipes or {})
        self._twins: dict[str, dict[str, TwinTally]] = {}
        self._steps: dict[str, dict[str, StepTally]] = {}
        self._last_step: int | None = None
        self._observed = 0  # steps

    def add_layers(self, layers: Mapping[str, LayerInfo]) -> None:
        """Add layers that appear in mid-run to the observed layers."""
        self._layers |= layers

    def add(
        self,
        step: int,
        layer: str,
        figures: Mapping[str, float],
        errors: Mapping[str, float],
    ) -> None:
        """Add the figures of one layer in one observed step.

        Args:
            step: Number of the step.
            layer: Name of the layer.
            figures: Figures by ``metric/format`` and ``metric/recipe``, and those of the layer,
                such as ``nonfinite_frac``. A format is judged if `figures` has all its figures on
                which a verdict rests.
            errors: Standard errors by the same keys; NaN is an error that cannot be trusted. A
                missing error of a format counts as 0, as if all elements were measured. For
                underflow_frac and saturated_frac it is estimated, if the layer's sample is known.
        """
        for columns in gather_columns([LayerRow(layer, figures, errors)]):
            self.add_columns(step, columns)

    def add_columns(self, step: int, columns: LayerColumns) -> None:
        """Add the figures of some layers in one observed step.

        Args:
            step: Number of the step.
            columns: Figures and standard errors of the layers, by the keys that `add` explains.
        """
        self._observed += step != self._last_step
        self._last_step = step
        twins = [self._twins.setdefault(layer, {}) for layer in columns.layers]
        for name in self._list_twins():
            if f"{PROGRESS}/{name}" in columns.figures:
                _add_missing(twins, name, TwinTally)
                each = zip(twins, list_twin_steps(name, columns), columns.rows, strict=True)
                for own, twin, row in each:
                    own[name].add_step(step, twin, row)
        steps = [self._steps.setdefault(layer, {}) for layer in columns.layers]
        for name in self._formats:
            if all(f"{metric}/{name}" in columns.figures for metric in STEP_METRICS):
                _add_missing(steps, name, lambda _: StepTally())
                add_format_step([own[name] for own in steps], columns, name)

    def add_run(self, run: Run, remember: Sequence[str] = ()) -> None:
        """Add all observed steps of a run; nothing else may have been added before.

        Args:
            run: The run.
            remember: Keys of figures that the run keeps in memory, as in `Run.tables`.
        """
        tallies = tally_run(run, self._list_twins(), [*self._formats], remember)
        self._twins, self._steps, self._observed, self._last_step = tallies

    def _list_twins(self) -> list[str]:
        """Return the names of the recipes with twins, and ``now`` for the run itself.

        A *twin* is a sample of the layers that is stored and stepped as a recipe says. Without
        twins, ``now`` is left out: a run in 16 bits then has too few figures for a verdict.
        """
        return [*dict.fromkeys((NOW, *self._recipes))] if {*self._recipes} - {NOW} else []

    def assessment(self) -> Assessment:
        """Return the verdicts on the run and on all layers, judged by the steps added so far."""
        families = self._find_families()
        layers = {name: self._judge_layer(name, families) for name in self._twins}
        shares = {name: [own[name] for own in layers.values() if name in own] for name in families}
        if shares[NOW]:
            shares[NOW] += self._count_untouched(layers)
        runs = {
            name: judge_recipe(
                name, families[name], own, is_stochastic=is_stochastic(self._recipes.get(name))
            )
            for name, own in shares.items()
            if own
        }
        runs = self._complete(add_remedies(runs, self._recipes, shares))
        advice = [share.advice for own in layers.values() for share in own.values()]
        suggestions = {name: self._suggest(own) for name, own in layers.items()}
        return Assessment(runs, advice, suggestions, summarize(runs, advice))

    def _complete(self, runs: Mapping[str, RunAdvice]) -> dict[str, RunAdvice]:
        """Return the verdicts on the run, with the observed steps and the memory that is saved."""
        tried = {name: each for name, each in self._recipes.items() if name != NOW}
        memory = measure_memory(self._layers, tried)
        saved = {name: each.saved_share for name, each in memory.items()}
        return {
            name: each._replace(steps=self._observed, saved_share=saved.get(name, math.nan))
            for name, each in runs.items()
        }

    def _find_families(self) -> dict[str, str | None]:
        """Return the family of the run itself, of each recipe and of each format, by name."""
        dtypes = {layer.dtype for layer in self._layers.values()}
        names = dict.fromkeys((NOW, *self._recipes, *self._formats))
        return {name: find_family(name, self._recipes.get(name), dtypes) for name in names}

    def _judge_layer(self, layer: str, families: Mapping[str, str | None]) -> dict[str, LayerShare]:
        """Return the verdicts on a layer, by recipe or format, and how much each counts."""
        info = self._layers.get(layer)
        size = float(math.prod(info.shape)) if info is not None else 1.0
        twins, steps = self._twins[layer], self._steps[layer]
        found = {}
        for name, tally in twins.items():
            advice = self._judge_twin(layer, name, tally, families[name])
            found[name] = LayerShare(
                advice, size, tally.figure(MOVED), tally.weight_rms, tally.weight_error
            )
        for name, steps_tally in steps.items():
            # A twin without figures, such as that of an optimizer that it cannot copy, says less.
            if name not in found or found[name].advice.verdict is Verdict.NOT_JUDGED:
                advice = self._judge_steps(layer, name, steps_tally)
                found[name] = LayerShare(advice, size, steps_tally.update_rms)
        return found

    def _count_untouched(self, layers: Mapping[str, Mapping[str, LayerShare]]) -> list[LayerShare]:
        """Return the layers that the run stores in float32, as layers that keep all progress."""
        figures, errors = {PROGRESS: 1.0, FROZEN: 0.0}, {PROGRESS: 0.0}
        untouched = []
        for layer, twins in self._twins.items():
            if twins and NOW not in twins:
                advice = Advice(layer, NOW, Verdict.STORES_FINE, figures, errors, "")
                size = next(iter(layers[layer].values())).size
                tally = next(iter(twins.values()))
                moved, weights = tally.figure(MOVED), tally.weight_rms
                untouched.append(LayerShare(advice, size, moved, weights, 0.0))
        return untouched

    def _judge_twin(self, layer: str, name: str, tally: TwinTally, family: str | None) -> Advice:
        recipe = self._recipes.get(name)
        range_reason = self._explain_range(layer, recipe)
        drawn = self._count_drawn(layer) if is_stochastic(recipe) else 0
        verdict, reason = judge_twin(tally, range_reason, drawn=drawn)
        is_sample = tally.errors[FROZEN] != 0
        if verdict is Verdict.FROZEN and is_sample and (doubt := self._doubt_sample(layer, name)):
            verdict, reason = Verdict.UNCERTAIN, f"{reason}, but {doubt}"
        evidence = calibration().describe_layers(family, verdict.name)
        if tally.is_lost and verdict not in (Verdict.BREAKS, Verdict.NOT_JUDGED):
            reason = f"the layer became NaN or inf; until step {tally.step:,}, {reason}"
        elif name != NOW:
            reason = _mention_nonfinite(tally.nonfinite, verdict, reason)
        figures, errors = tally.figures, find_errors(tally, drawn)
        about = (evidence, tally.nonfinite, tally.is_lost)
        return Advice(layer, name, verdict, figures, errors, reason, *about)

    def _count_drawn(self, layer: str) -> int:
        """Return how many elements of a layer its twin, the sample stored by a recipe, has.

        Older run files do not say which `twin_elements` was set, so its default is assumed. If it
        was larger, the error by the chance of stochastic rounding is overestimated.
        """
        info = self._layers.get(layer)
        if info is None:
            return MOST_TWIN_ELEMENTS
        most = MOST_TWIN_ELEMENTS if info.twin_elements is None else info.twin_elements
        return max(min(math.prod(info.shape), most), 1)

    def _doubt_sample(self, layer: str, name: str) -> str:
        """Return a phrase if a twin stands still but single updates of the layer are kept; or "".

        A *twin* is a small sample of the layer. In an embedding, it may hold none of the few rows
        that batches use, while the larger sample of single updates does.
        """
        recipe = self._recipes.get(name)
        format = None if recipe is None else find_format(recipe)
        tally = self._steps[layer].get(format or "")
        kept = math.nan if tally is None else tally.find_figures()[KEPT]
        if not kept >= calibration().step_thresholds.needs_remedy:
            return ""
        share = f"{format_kept(kept)} of the update is kept, step by step"
        return f"{share}, in the sample of all figures"

    def _explain_range(self, layer: str, recipe: RecipeInfo | None) -> str:
        """Return a phrase on weights out of a format's range, if a scale would help; or ""."""
        format = self._formats.get(recipe.weights or "") if recipe is not None else None
        tally = self._steps[layer].get(format.name) if format is not None else None
        if format is None or tally is None or not _needs_scale(format):
            return ""
        figures = tally.find_figures()
        intervals = {
            metric: find_interval(metric, figures[metric], error)
            for metric, error in tally.find_errors(self._layers.get(layer)).items()
        }
        is_out = judge_range(figures, intervals) is Verdict.RANGE
        return describe_range(figures, intervals) if is_out else ""

    def _judge_steps(self, layer: str, name: str, tally: StepTally) -> Advice:
        figures, errors = tally.find_figures(), tally.find_errors(self._layers.get(layer))
        intervals = {m: find_interval(m, figures[m], error) for m, error in errors.items()}
        needs_scale = _needs_scale(self._formats[name])
        verdict, reason = judge_steps(figures, intervals, needs_scale=needs_scale)
        reason = _mention_nonfinite(tally.broken, verdict, reason)
        return Advice(layer, name, verdict, figures, errors, reason, nonfinite=tally.broken)

    def _suggest(self, layer: Mapping[str, LayerShare]) -> str | None:
        """Return the smallest format that stores a layer fine, rounded to nearest; or None."""
        formats = self._list_formats()
        fine = [
            name
            for name, share in layer.items()
            if name in formats and share.advice.verdict is Verdict.STORES_FINE
        ]
        return find_smallest(fine, formats)

    def _list_formats(self) -> dict[str, FormatInfo]:
        """Return the judged formats, and the formats of recipes that only round to nearest."""
        tried = [
            name
            for name, recipe in self._recipes.items()
            if name == recipe.weights and find_family(name, recipe) in _NEAREST
        ]
        return {each.name: FormatInfo.from_format(each, None) for each in get_formats(tried)} | {
            **self._formats
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the tallies of all steps added so far, for a checkpoint.

        Returns:
            Plain numbers by layer and name, under ``twins`` those of recipes, under ``steps`` those
            of formats. Under ``observed`` the number of these steps, and the last one.
        """
        return {
            "observed": (self._observed, self._last_step),
            "twins": _save_tallies(self._twins),
            "steps": _save_tallies(self._steps),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the tallies that `state_dict` returned, now or in version 0.1.0.

        Tallies of recipes and formats that are not judged here are left out.
        """
        if not {"twins", "steps"} <= {*state} <= {"twins", "steps", "observed"}:
            self._twins = {layer: {} for layer in state}
            self._steps = {
                layer: {
                    name: StepTally.from_old_state(each)
                    for name, each in own.items()
                    if name in self._formats
                }
                for layer, own in state.items()
            }
            return
        self._observed, self._last_step = state.get("observed", (0, None))
        recipes = self._list_twins()
        self._twins = {
            layer: {n: TwinTally.from_state(each) for n, each in own.items() if n in recipes}
            for layer, own in state["twins"].items()
        }
        self._steps = {
            layer: {n: StepTally.from_state(each) for n, each in own.items() if n in self._formats}
            for layer, own in state["steps"].items()
        }


def _mention_nonfinite(share: float, verdict: Verdict, reason: str) -> str:
    """Return the reason of a verdict that says which share of the run is NaN or inf, if any is."""
    if not share:
        return reason
    broken = (
        f"{format_percent(share)} of the elements were NaN or inf in a step, which no figure counts"
    )
    return broken if verdict is Verdict.NOT_JUDGED and share == 1 else f"{broken}; {reason}"


def _needs_scale(format: FormatInfo) -> bool:
    """Return True for a format that a scale would help: one of few bits that has none."""
    return format.bits <= _FEW_BITS and not format.scaled


def _add_missing(
    layers: Iterable[dict[str, _Tally]], name: str, make: Callable[[str], _Tally]
) -> None:
    """Add a new tally of a recipe or format to the layers that have none."""
    for own in layers:
        if name not in own:
            own[name] = make(name)


def _save_tallies(
    tallies: Mapping[str, Mapping[str, TwinTally | StepTally]],
) -> dict[str, dict[str, Any]]:
    return {
        layer: {name: tally.state_dict() for name, tally in own.items()}
        for layer, own in tallies.items()
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


def judge_run(run: Run, remember: Sequence[str] = ()) -> Assessment:
    """Judge what each recipe would make of a run, and of each of its layers.

    Args:
        run: The run, as `altgrad.report.read` returns it.
        remember: Keys of figures that the run keeps in memory, as in `Run.tables`.

    Returns:
        A verdict on the run for each recipe, and one, with its reason, on each layer.
    """
    judge = Judge(run.formats, run.layers, run.recipes, run.now)
    judge.add_run(run, remember)
    return judge.assessment()
