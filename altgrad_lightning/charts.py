"""`Charts`: what is charted of a run, under keys that stay the same from first row to last."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from altgrad import Figures
from altgrad.measurement import FORMAT_METRICS, LAYER_METRICS

PER_LAYER = ("update_rms", "update_weight_ratio", "unmoved_frac", "ulp_mean", "ulp_zero_frac")
"""What a charted layer shows, …"""
PER_LAYER_AND_FORMAT = (
    *("kept_update_ratio", "stall_frac"),
    *("stiffness_mean", "grad_stiff_correlation", "grad_below_stiffness_frac"),
)
"""… and for each format."""
_LONGEST_WAIT = 20  # rows: where nothing has a figure until then, nothing will have one soon
_NONE: Mapping[str, float] = {}


class Row(NamedTuple):
    """What is charted at one step: keys and values of the model, and of all else."""

    step: int
    model: dict[str, float]
    others: dict[str, float]


class Charts:
    """Turns the figures of observed steps into rows of numbers with the same keys.

    Which layers are charted is known at the first step in which one of them has a
    kept_update_ratio; the rows before it wait until then.

    Args:
        formats: Names of those that are judged.
        layers: How many layers are charted, those that keep least; or patterns of their names.

    Attributes:
        charted: The layers, each with its formats; None before they are known.
    """

    def __init__(self, formats: Sequence[str], layers: int | Sequence[str]) -> None:
        self._formats = formats
        self._layers = layers
        self.charted: dict[str, tuple[str, ...]] | None = None
        self._waiting: list[tuple[Row, Mapping[str, Figures]]] = []

    def add(
        self,
        step: int,
        model: Figures,
        layers: Mapping[str, Figures],
        monitor: Mapping[str, float],
    ) -> list[Row]:
        """The rows that can be logged now: none, this one, or also those that have waited.

        Args:
            step: The one to log at.
            model: Figures of the model.
            layers: Those of each layer.
            monitor: What is to be known of the observation itself, under ``altgrad/monitor/…``.
        """
        of_model = {
            f"altgrad/{key}": model.get(key, math.nan)
            for key in _keys([*LAYER_METRICS], [*FORMAT_METRICS], self._formats)
        }
        of_itself = {f"altgrad/monitor/{key}": value for key, value in monitor.items()}
        self._waiting.append((Row(step, of_model, of_itself), layers))
        if self.charted is None:
            known = any(_lowest_kept(figures) < math.inf for figures in layers.values())
            if not known and len(self._waiting) < _LONGEST_WAIT:
                return []
            self.charted = {name: layers[name].formats for name in self._chosen(layers)}
        return self.rest()

    def rest(self) -> list[Row]:
        """The rows that have waited."""
        waiting, self._waiting = self._waiting, []
        return [
            row._replace(others=row.others | self._of_layers(layers)) for row, layers in waiting
        ]

    def state_dict(self) -> dict[str, Any]:
        """Which layers are charted."""
        return {"charted": self.charted}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the same."""
        self.charted = state["charted"]

    def _chosen(self, layers: Mapping[str, Figures]) -> list[str]:
        if isinstance(self._layers, int):
            return sorted(layers, key=lambda name: _lowest_kept(layers[name]))[: self._layers]
        patterns = self._layers
        return [name for name in layers if any(fnmatchcase(name, each) for each in patterns)]

    def _of_layers(self, layers: Mapping[str, Figures]) -> dict[str, float]:
        return {
            f"altgrad/{key}/{name}": layers.get(name, _NONE).get(key, math.nan)
            for name, formats in (self.charted or {}).items()
            for key in _keys(PER_LAYER, PER_LAYER_AND_FORMAT, formats)
        }


def _keys(
    metrics: Sequence[str], format_metrics: Sequence[str], formats: Sequence[str]
) -> list[str]:
    of_formats = [f"{metric}/{format}" for metric in format_metrics for format in formats]
    return [*metrics, *of_formats]


def _lowest_kept(figures: Figures) -> float:
    """The kept_update_ratio in the worst format; inf where none has one."""
    kept = (figures[f"kept_update_ratio/{format}"] for format in figures.formats)
    return min((value for value in kept if not math.isnan(value)), default=math.inf)
