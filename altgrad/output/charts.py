"""`Charts`: turn the figures of observed steps into rows of numbers for loggers.

A logger with columns, such as CSVLogger, needs the same keys in every row. `Charts` therefore keeps
the charted layers, those with charts of their own. It adds some only when layers appear later, and
fills missing figures with NaN.

Read this file after `output`, which logs the rows. The next file is `history`, which keeps figures
for pictures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from altgrad.measurement.catalogue import FORMAT_METRICS, LAYER_METRICS
from altgrad.measurement.figures import Figures
from altgrad.observation.rules import SamplingRule

PER_LAYER = ("update_rms", "update_weight_ratio", "unmoved_frac", "ulp_mean", "ulp_zero_frac")
"""Metrics with one chart for each charted layer, a layer chosen for charts of its own."""
PER_LAYER_AND_FORMAT = (
    *("kept_update_ratio", "stall_frac"),
    *("stiffness_mean", "grad_stiff_correlation", "grad_below_stiffness_frac"),
)
"""Metrics with a chart for each charted layer and each number format it is judged for."""
PER_LAYER_AND_RECIPE = ("progress_kept", "frozen_frac")
"""Metrics with a chart for each charted layer and each recipe tried on it.

A recipe says how weights are stored, and is tried on a sample of the layer, its twin.
"""
WITHOUT_CHART = frozenset({"moved_rms"})
"""Metrics of the model's twins without a chart: they say the same under every recipe."""
# If it is not known in 20 rows what a layer keeps, the layers are chosen without that.
_MAX_WAITING_ROWS = 20
_NOW = "progress_kept/now"  # of the run itself, if its weights are stored low
_NO_FIGURES: Mapping[str, float] = {}


class Row(NamedTuple):
    """The numbers of one step that loggers show as charts.

    Attributes:
        step: The step to log at.
        model: Figures of the model, by logged key.
        others: Figures of layers with charts, and numbers on observing itself, by logged key.
    """

    step: int
    model: dict[str, float]
    others: dict[str, float]


class Charts:
    """A converter from the figures of observed steps to rows with the same keys, for loggers.

    A few layers have charts of their own, the charted layers. They are chosen at the first step in
    which it is known how much a layer keeps, at the 20th step at the latest. The rows of earlier
    steps are kept back until this step. Of layers that appear later, such as unfrozen layers, more
    are chosen in the same way.

    Args:
        formats: Names of the judged formats.
        layers: The number of layers to chart, or patterns of the names of layers. A number charts
            the layers that keep least, and at most as many layers that appear later. Layers that
            are stored low come first, by the progress that the run itself keeps of them now; then
            the others, by what the recipe would keep that keeps least.

    Attributes:
        charted: Names of the charted layers, each with the names of its formats; None before the
            layers are chosen.
    """

    def __init__(self, formats: Sequence[str], layers: int | Sequence[str]) -> None:
        self._formats = formats
        self._layers = layers
        self.charted: dict[str, tuple[str, ...]] | None = None
        self._considered: set[str] = set()  # layers that were or were not chosen
        self._left = layers if isinstance(layers, int) else 0  # number of later layers to chart
        self._waiting: list[tuple[Row, Mapping[str, Mapping[str, float]]]] = []
        self._twin_keys: dict[str, None] = {}  # of the model, in any step so far
        self._recipes: dict[str, dict[str, None]] = {}  # of each layer, in any step so far

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
        monitor: Mapping[str, float],
    ) -> list[Row]:
        """Add the figures of a step, and return the rows that can be logged now.

        Args:
            step: The step to log at.
            model: Figures of the model.
            layers: Figures of each layer, by name.
            monitor: Numbers about observing itself, for keys ``altgrad/monitor/…``.

        Returns:
            No row until the layers with charts of their own are chosen; then all rows that were
            kept back, and the row of this step.
        """
        self._note_twins(model, layers)
        model_keys = _join_keys([*LAYER_METRICS], [*FORMAT_METRICS], self._formats)
        model_keys += self._twin_keys
        model_row = {f"altgrad/{key}": model.get(key, math.nan) for key in model_keys}
        monitor_row = {f"altgrad/monitor/{key}": value for key, value in monitor.items()}
        self._waiting.append((Row(step, model_row, monitor_row), layers))
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
        return [
            row._replace(others=row.others | self._layer_row(layers)) for row, layers in waiting
        ]

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
                (*row, {name: _select_charted(figures) for name, figures in layers.items()})
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
        self._waiting = [(Row(*row), layers) for *row, layers in state.get("waiting", ())]
        self._twin_keys = dict.fromkeys(state.get("twin_keys", ()))
        self._recipes = {
            name: dict.fromkeys(recipes) for name, recipes in state.get("recipes", {}).items()
        }

    def _note_twins(self, model: Figures, layers: Mapping[str, Figures]) -> None:
        """Note the keys of figures of twins to chart, so that later rows have them, too.

        A twin, a sample of the layers trained as a recipe for storing weights says, may end early.
        """
        charted = (key for key in model.twin_keys if key.partition("/")[0] not in WITHOUT_CHART)
        self._twin_keys |= dict.fromkeys(charted)
        for name, figures in layers.items():
            if figures.recipes:
                self._recipes.setdefault(name, {}).update(dict.fromkeys(figures.recipes))

    def _chart_later(self, layers: Mapping[str, Figures]) -> None:
        """Choose the layers to chart among those that appear for the first time.

        They are chosen by the patterns, or are those that keep least. With a
        number of layers to chart, at most as many join over the whole run.
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
        if isinstance(self._layers, int):
            return sorted(layers, key=lambda name: _rank_layer(layers[name]))[: self._layers]
        # An empty pattern, which matches nothing, is no rule.
        rules = [SamplingRule(pattern) for pattern in self._layers if pattern]
        return [name for name in layers if any(each.matches(name) for each in rules)]

    def _layer_row(self, layers: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        return {
            f"altgrad/{key}/{name}": layers.get(name, _NO_FIGURES).get(key, math.nan)
            for name, formats in (self.charted or {}).items()
            for key in (
                *_join_keys(PER_LAYER, PER_LAYER_AND_FORMAT, formats),
                *_join_keys((), PER_LAYER_AND_RECIPE, [*self._recipes.get(name, ())]),
            )
        }


def _join_keys(
    metrics: Sequence[str], named_metrics: Sequence[str], names: Sequence[str]
) -> list[str]:
    """Return the keys ``{metric}``, then ``{metric}/{name}`` of `named_metrics` for each name.

    Names are those of formats or recipes.
    """
    return [*metrics, *(f"{metric}/{name}" for metric in named_metrics for name in names)]


def _select_charted(figures: Mapping[str, float]) -> dict[str, float]:
    """Return the figures of a layer that a chart may show, by key."""
    metrics = {*PER_LAYER, *PER_LAYER_AND_FORMAT, *PER_LAYER_AND_RECIPE}
    return {key: value for key, value in figures.items() if key.partition("/")[0] in metrics}


def _rank_layer(figures: Figures) -> tuple[float, float, float]:
    """Return the least that is kept of a layer: by the run now, by twins, and in formats.

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
    """Return True if it is known what is kept of a layer."""
    return any(value < math.inf for value in _rank_layer(figures))
