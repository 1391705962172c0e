"""`Charts`: turn the figures of observed steps into rows of numbers for loggers.

A logger with columns, such as CSVLogger, needs the same keys in every row. `Charts` therefore keeps
the charted layers, those with charts of their own. It adds some only when layers appear later, and
fills missing figures with NaN.

By default a row has at most 80 numbers; all other figures are in the run file. First comes the
headline: the progress kept, the frozen layers and what is lost. Then come the diagnostics DIAG-01
to 04, which docs/metrics.md explains, of the model and of the charted layers.

Read this file after `output`, which logs the rows. The next file is `history`, which keeps figures
for pictures.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from altgrad.measurement.catalogue import FORMAT_METRICS, LAYER_METRICS, NOW
from altgrad.measurement.figures import Figures
from altgrad.measurement.layer_columns import LayerColumns
from altgrad.observation.rules import SamplingRule
from altgrad.report.judging.calibration import calibration

MOST_SCALARS = 80
"""Maximum number of numbers in a row, if neither `charts` nor `layer_charts` ask for more."""
_MOST_LAYERS = 8  # charted by default, and none of them if 80 numbers leave no room

HEADLINE = frozenset({"progress_kept", "frozen_layers", "lost_now", "own_share"})
"""Metrics that sum up a run, and have a group of their own in TensorBoard."""
DIAGNOSTICS = ("ulp_mean", "ulp_zero_frac")
"""Metrics of the diagnostic DIAG-03: each row has them for the model and each charted layer."""
FORMAT_DIAGNOSTICS = ("stiffness_mean", "on_grid_frac", "grad_stiff_correlation")
"""Metrics of the diagnostics DIAG-01, 02 and 04: each row has them for every number format."""

PER_LAYER = ("update_rms", "update_weight_ratio", "unmoved_frac", *DIAGNOSTICS)
"""Metrics with one chart for each charted layer, if all are charted."""
PER_LAYER_AND_FORMAT = (
    *("kept_update_ratio", "stall_frac"),
    *(*FORMAT_DIAGNOSTICS, "grad_below_stiffness_frac"),
)
"""Metrics with a chart for each charted layer and each format, if all are charted."""
PER_LAYER_AND_RECIPE = ("progress_kept", "frozen_frac")
"""Metrics with a chart for each charted layer and each recipe tried on it, if all are charted.

A recipe says how weights are stored, and is tried on a sample of the layer, its twin.
"""
WITHOUT_CHART = frozenset({"moved_rms"})
"""Metrics of the model's twins without a chart: they say the same under every recipe.

A *twin* is a sample of the layers that is stored and stepped as a recipe says.
"""
# If it is not known in 20 rows what a layer keeps, the layers are chosen without that.
_MAX_WAITING_ROWS = 20
_NOW = f"progress_kept/{NOW}"  # of the run itself, if its weights are stored low
_NO_FIGURES: Mapping[str, float] = {}
_KINDS = ("default", "all")

ChartKind = Literal["default", "all"]


class Row(NamedTuple):
    """The numbers of one step that loggers show as charts.

    Attributes:
        step: The step to log at.
        model: Figures of the model by key: ``{metric}``, or ``{metric}/{format}``.
        monitor: Numbers on observing itself, by name.
        layers: Figures of charted layers by key, by name of the layer.
    """

    step: int
    model: dict[str, float]
    monitor: dict[str, float]
    layers: dict[str, dict[str, float]]

    def flatten(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return all numbers by their logged keys, which begin with ``altgrad/``.

        Returns:
            Those of the model, and all others.
        """
        others = {f"altgrad/monitor/{name}": value for name, value in self.monitor.items()}
        for layer, figures in self.layers.items():
            others |= {f"altgrad/{key}/{layer}": value for key, value in figures.items()}
        return {f"altgrad/{key}": value for key, value in self.model.items()}, others


class Charts:
    """A converter from the figures of observed steps to rows with the same keys, for loggers.

    A few layers, the charted layers, have charts of their own: those whose updates low precision
    harms most. They are chosen at the first step with figures of a layer, at the 20th step at the
    latest; until then `add` returns no rows and stores them. Layers that appear later, such as
    unfrozen ones, may be charted, too.

    Args:
        formats: Names of the judged formats.
        layers: The number of layers to chart, or patterns of the names of layers. A number charts
            the layers that keep least of their progress, and at most as many layers that appear
            later. None charts up to 8 such layers, and fewer if a row would have more than 80
            numbers. Layers stored below float32 come first, ranked by the progress that they keep
            in the run itself. The others are ranked by the recipe under which they keep least.
        kind: ``"default"`` for the headline and DIAG-01 to 04, ``"all"`` for all metrics.
        recipes: Names of the recipes, ways to store weights, that the run tries. Each is tried on
            a twin, a sample of each layer that is stored so and stepped beside the training.
        is_low: True if weights of the run are stored below float32.

    Attributes:
        charted: Names of the charted layers, each with the names of its formats; None before the
            layers are chosen.
    """

    def __init__(
        self,
        formats: Sequence[str],
        layers: int | Sequence[str] | None = None,
        kind: ChartKind = "default",
        *,
        recipes: Collection[str] = (),
        is_low: bool = False,
    ) -> None:
        self._formats = formats
        self._layers = layers
        self._has_all = kind == "all"
        self._expected = recipes
        self._is_low = is_low
        self.charted: dict[str, tuple[str, ...]] | None = None
        self._considered: set[str] = set()  # layers that were or were not chosen
        self._left = layers if isinstance(layers, int) else 0  # number of later layers to chart
        self._waiting: list[tuple[Row, Mapping[str, Mapping[str, float]]]] = []
        self._twin_keys: dict[str, None] = {}  # of the model, in any step so far
        self._recipes: dict[str, dict[str, None]] = {}  # of each layer, in any step so far
        self._frozen: dict[str, set[str]] = {}  # layers that never moved, by recipe or format

    @property
    def recipes(self) -> list[str]:
        """Names of the recipes, such as ``bf16-sr``, for which a layer has had a value of a metric.

        A *recipe* says in which formats weights and optimizer states would be stored; it is tried
        beside the training. A run in low precision is itself among them, under the name ``now``.
        """
        return [*dict.fromkeys(name for each in self._recipes.values() for name in each)]

    def add(
        self,
        step: int,
        model: Figures,
        layers: Mapping[str, Figures],
        columns: Iterable[LayerColumns],
        monitor: Mapping[str, float],
    ) -> list[Row]:
        """Add the figures of a step, and return the rows that can be logged now.

        Args:
            step: The step to log at.
            model: Figures of the model.
            layers: Figures of each layer, by name.
            columns: The same figures as columns.
            monitor: Numbers about observing itself, for keys ``altgrad/monitor/…``.

        Returns:
            No row until the layers with charts of their own are chosen; then all rows that were
            kept back, and the row of this step.
        """
        self._note_twins(model, layers)
        self._note_frozen(columns)
        shown = monitor if self._has_all else {k: monitor[k] for k in monitor if k in HEADLINE}
        self._waiting.append((Row(step, self._model_row(model), dict(shown), {}), layers))
        if self.charted is None:
            known = any(map(_is_known, layers.values()))
            if not known and len(self._waiting) < _MAX_WAITING_ROWS:
                return []
            self.charted = {name: layers[name].formats for name in self._choose(layers)}
            self._considered = {*layers}
        elif not layers.keys() <= self._considered:
            self._chart_later(layers)
        return self.take_waiting()

    def take_waiting(self) -> list[Row]:
        """Return the rows kept back until layers were chosen for charts, and forget these rows.

        The rows get the figures of the chosen layers.
        """
        waiting, self._waiting = self._waiting, []
        return [row._replace(layers=self._layer_rows(layers)) for row, layers in waiting]

    def state_dict(self) -> dict[str, Any]:
        """Return which layers have charts of their own, and the rows kept back, for a checkpoint.

        Returns:
            Plain data: the charted layers, all layers considered so far, and the number of later
            layers that may still be charted. Under ``waiting`` are the rows that are kept back,
            with the figures of their layers, and then the keys and recipes of twins so far.
        """
        return {
            "charted": self.charted,
            "considered": sorted(self._considered),
            "left": self._left,
            "waiting": [
                (*row[:3], {name: _select_charted(figures) for name, figures in layers.items()})
                for row, layers in self._waiting
            ],
            "twin_keys": [*self._twin_keys],
            "recipes": {name: [*recipes] for name, recipes in self._recipes.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the charted layers and the rows kept back, as `state_dict` returned them.

        Version 0.1.0 saved the charted layers alone.
        """
        self.charted = state["charted"]
        self._considered = {*state.get("considered", self.charted or ())}
        self._left = state.get("left", 0)
        self._waiting = [
            (Row(step, _shorten(model), _shorten(monitor), {}), layers)
            for step, model, monitor, layers in state.get("waiting", ())
        ]
        self._twin_keys = dict.fromkeys(state.get("twin_keys", ()))
        self._recipes = {
            name: dict.fromkeys(recipes) for name, recipes in state.get("recipes", {}).items()
        }

    # --- the model

    def _note_twins(self, model: Figures, layers: Mapping[str, Figures]) -> None:
        """Note the keys of figures of twins to chart, so that later rows have them, too.

        A twin, a sample of the layers trained as a recipe for storing weights says, may end early.
        """
        charted = (key for key in model.twin_keys if key.partition("/")[0] not in WITHOUT_CHART)
        self._twin_keys |= dict.fromkeys(charted)
        for name, figures in layers.items():
            if figures.recipes:
                self._recipes.setdefault(name, {}).update(dict.fromkeys(figures.recipes))

    def _note_frozen(self, columns: Iterable[LayerColumns]) -> None:
        """Update the sets of layers that have not moved so far, one set by recipe and format.

        A layer without figures in this step, which other steps observe, is left as it was.
        """
        for each in columns:
            recipes, formats = each.list_names("progress_kept"), each.list_names("never_moved_frac")
            for name in dict.fromkeys((*recipes, *formats)):
                is_frozen = (
                    _find_still(each, name) if name in recipes else _find_unmoved(each, name)
                )
                frozen = self._frozen.setdefault(name, set())
                for layer, is_still in zip(each.layers, is_frozen, strict=True):
                    (frozen.add if is_still else frozen.discard)(layer)

    def _model_row(self, model: Figures) -> dict[str, float]:
        """Return the figures of the model to log, by key; NaN where it has none."""
        headline = self._summarize(model)
        metrics, named = (DIAGNOSTICS, FORMAT_DIAGNOSTICS)
        keys = [*headline, *_join_keys(metrics, named, self._formats)]
        if self._has_all:
            keys += [*_join_keys([*LAYER_METRICS], [*FORMAT_METRICS], self._formats)]
            keys += self._twin_keys
        return {key: model.get(key, math.nan) for key in keys} | headline

    def _summarize(self, model: Figures) -> dict[str, float]:
        """Return the headline: the progress kept and the frozen layers, and what the run loses.

        The progress kept comes from twins, samples stored as a recipe says. A format that no twin
        tries has its kept_update_ratio instead, the share that it keeps of single updates.
        """
        recipes = [key[len("progress_kept/") :] for key in self._twin_keys if _is_progress(key)]
        tried = {*recipes, *self._expected}
        formats = [name for name in self._formats if name not in tried]
        kept = [f"progress_kept/{name}" for name in recipes]
        kept += [f"kept_update_ratio/{name}" for name in formats]
        frozen = {
            f"frozen_layers/{name}": float(len(self._frozen.get(name, ())))
            for name in (*recipes, *formats)
        }
        lost = 1 - model.get(_NOW, math.nan) if self._is_low or NOW in recipes else 0.0
        return {key: model.get(key, math.nan) for key in kept} | frozen | {"lost_now": lost}

    # --- charted layers

    def _chart_later(self, layers: Mapping[str, Figures]) -> None:
        """Choose the layers to chart among those that appear for the first time.

        They are chosen by the user's patterns, or else are those that keep least of their progress.
        If the user gave a number of layers, at most as many are added over the whole run.
        """
        assert self.charted is not None
        later = {
            name: figures
            for name, figures in layers.items()
            if name not in self._considered and _is_known(figures)
        }
        self._considered |= later.keys()
        chosen = self._choose(later)
        if isinstance(self._layers, int):
            chosen = chosen[: self._left]
            self._left -= len(chosen)
        self.charted = self.charted | {name: later[name].formats for name in chosen}

    def _choose(self, layers: Mapping[str, Figures]) -> list[str]:
        if self._layers is None or isinstance(self._layers, int):
            ranked = sorted(layers, key=lambda name: _rank_layer(layers[name]))
            return self._fit(ranked, layers) if self._layers is None else ranked[: self._layers]
        # An empty pattern, which matches nothing, is no rule.
        rules = [SamplingRule(pattern) for pattern in self._layers if pattern]
        return [name for name in layers if any(each.matches(name) for each in rules)]

    def _fit(self, ranked: Sequence[str], layers: Mapping[str, Figures]) -> list[str]:
        """Return the first layers, at most 8 and as many as a row of 80 numbers has room for.

        If no layer is charted yet, there is at least one. With ``kind="all"`` only the limit of 8
        holds.

        Args:
            ranked: Names of the layers, the most important first.
            layers: Figures of the layers, by name.
        """
        before = {**(self.charted or {})}
        chosen = [*ranked[: max(0, _MOST_LAYERS - len(before))]]
        if self._has_all:
            return chosen
        row, _ = self._waiting[-1]
        missing = sum(f"progress_kept/{name}" not in row.model for name in self._expected)
        # Each recipe has two numbers of the headline.
        room = MOST_SCALARS - len(row.model) - len(row.monitor) - 2 * missing
        room -= sum(len(self._list_keys(name, formats)) for name, formats in before.items())
        fitting: list[str] = []
        for name in chosen:
            room -= len(self._list_keys(name, layers[name].formats))
            if room >= 0 or not (before or fitting):
                fitting.append(name)
        return fitting

    def _layer_rows(self, layers: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
        return {
            name: {
                key: layers.get(name, _NO_FIGURES).get(key, math.nan)
                for key in self._list_keys(name, formats)
            }
            for name, formats in (self.charted or {}).items()
        }

    def _list_keys(self, layer: str, formats: Sequence[str]) -> list[str]:
        """Return the keys of the figures that a charted layer has in a row."""
        if not self._has_all:
            return _join_keys(DIAGNOSTICS, FORMAT_DIAGNOSTICS, formats)
        recipes = [*self._recipes.get(layer, ())]
        keys = _join_keys(PER_LAYER, PER_LAYER_AND_FORMAT, formats)
        return [*keys, *_join_keys((), PER_LAYER_AND_RECIPE, recipes)]


def check_charts(charts: object) -> ChartKind:
    """Check the argument `charts`: which figures are logged.

    Returns:
        ``"default"`` or ``"all"``, as given.

    Raises:
        ValueError: The argument is neither.
    """
    if charts not in _KINDS:
        raise ValueError(f"charts={charts!r}: expected one of {', '.join(map(repr, _KINDS))}")
    return "all" if charts == "all" else "default"


def check_layer_charts(layer_charts: int | Sequence[str] | None) -> int | tuple[str, ...] | None:
    """Check the argument `layer_charts`: which layers get charts of their own.

    Args:
        layer_charts: A number of layers, or a list of patterns of their names; None for as many
            layers as there is room for.

    Returns:
        The number, a copy of the patterns, or None.

    Raises:
        ValueError: The number is negative.
        TypeError: The argument is neither a number nor a list of strings nor None.
    """
    expected = "expected the number of layers, or a list of patterns"
    if layer_charts is None:
        return None
    if isinstance(layer_charts, int):
        if isinstance(layer_charts, bool):
            raise TypeError(f"layer_charts={layer_charts!r}: {expected}")
        if layer_charts < 0:
            raise ValueError(f"layer_charts={layer_charts}: expected 0 or more")
        return layer_charts
    # A string is itself a sequence of strings, whose characters would be taken for patterns.
    if isinstance(layer_charts, str) or not all(isinstance(each, str) for each in layer_charts):
        raise TypeError(f"layer_charts={layer_charts!r}: {expected}")
    return tuple(layer_charts)


def _join_keys(
    metrics: Sequence[str], named_metrics: Sequence[str], names: Sequence[str]
) -> list[str]:
    """Return the keys ``{metric}``, then ``{metric}/{name}`` of `named_metrics` for each name.

    Names are those of formats or recipes.
    """
    return [*metrics, *(f"{metric}/{name}" for metric in named_metrics for name in names)]


def _shorten(row: Mapping[str, float]) -> dict[str, float]:
    """Return numbers with the prefixes ``altgrad/`` and ``monitor/`` removed from their keys.

    Checkpoints of earlier versions have these prefixes.
    """
    shorter = (key.removeprefix("altgrad/").removeprefix("monitor/") for key in row)
    return dict(zip(shorter, row.values(), strict=True))


def _is_progress(key: str) -> bool:
    return key.startswith("progress_kept/")


def _find_still(columns: LayerColumns, recipe: str) -> list[bool]:
    """Return for each layer True if its twin, a sample stored as a recipe says, has not moved.

    Unlike a verdict, this ignores the sampling error.
    """
    limits, kept = calibration().thresholds, columns.figures[f"progress_kept/{recipe}"]
    frozen = columns.figures[f"frozen_frac/{recipe}"]
    return [
        share >= limits.frozen and progress < limits.frozen_kept
        for share, progress in zip(frozen, kept, strict=True)
    ]


def _find_unmoved(columns: LayerColumns, format: str) -> list[bool]:
    """Return for each layer True if no single update so far would have moved it in a format."""
    limit = calibration().step_thresholds.frozen
    return [share >= limit for share in columns.figures[f"never_moved_frac/{format}"]]


def _select_charted(figures: Mapping[str, float]) -> dict[str, float]:
    """Return the figures of a layer that a chart may show, by key."""
    metrics = {*PER_LAYER, *PER_LAYER_AND_FORMAT, *PER_LAYER_AND_RECIPE}
    return {key: value for key, value in figures.items() if key.partition("/")[0] in metrics}


def _rank_layer(figures: Figures) -> tuple[float, float, float]:
    """Return a key that sorts layers: the least share kept by the run, by twins, and by formats.

    A twin is a sample of the layer that is stored as a recipe says. Layers are compared by the
    first of the three, and by the next if they are equal, so that what a layer keeps now is not
    compared with what another one would keep. The number is inf where the layer has no value.
    """
    twins = [f"progress_kept/{recipe}" for recipe in figures.recipes]
    now = [key for key in twins if key == _NOW]
    formats = [f"kept_update_ratio/{format}" for format in figures.formats]
    return _find_least(figures, now), _find_least(figures, twins), _find_least(figures, formats)


def _find_least(figures: Figures, keys: Sequence[str]) -> float:
    kept = (figures.get(key, math.nan) for key in keys)
    return min((value for value in kept if not math.isnan(value)), default=math.inf)


def _is_known(figures: Figures) -> bool:
    """Return True if any figure says which share of a layer's updates or progress is kept."""
    return any(value < math.inf for value in _rank_layer(figures))
