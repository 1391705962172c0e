"""`Row`: the figures of one layer, or of the model, in one observed step.

`steps` comes next: it makes rows of the lines of a run file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from altgrad.measurement.catalogue import FORMAT_METRICS, LAYER_METRICS
from altgrad.measurement.histogram import Histogram
from altgrad.measurement.intervals import find_interval


@dataclass(frozen=True, eq=False, slots=True)
class Row:
    """A row of a run file: the figures of one layer, or of the model, in one observed step.

    Attributes:
        step: Number of the step.
        layer: Name of the layer; None for the model.
        figures: Figures by key, as in `altgrad.Figures`: ``metric``, ``metric/format``, and
            ``metric/recipe`` for a twin, a sample of the layer that is trained as a recipe says.
        errors: Standard errors of some figures, by the same keys: half the width of `interval`,
            divided by 1.96. Those of formats are missing if every element was measured.
        elements: Number of measured elements of the model. None in the row of a layer, whose
            number is in `LayerInfo`.
        own_seconds: Host time in seconds to observe the previous observed step, as in
            `altgrad.StepRecord`. NaN in the row of a layer.
        training_seconds: Mean time in seconds of a training step without the observation, as in
            `altgrad.StepRecord`. NaN in the row of a layer.
        skipped: Number of steps so far that moved no weight, by reason. Empty in the row of a
            layer.
        histograms: Histograms of the model, by key, such as ``weights`` or ``steps/bf16``. Empty
            in the row of a layer.
        moved_elements: Number of elements of the twins' sample that the float32 twin has moved;
            NaN without twins.
    """

    step: int
    layer: str | None
    figures: Mapping[str, float]
    errors: Mapping[str, float]
    elements: int | None = None
    own_seconds: float = math.nan
    training_seconds: float = math.nan
    skipped: Mapping[str, int] = field(default_factory=dict)
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    moved_elements: float = math.nan

    @property
    def twins(self) -> dict[str, dict[str, float]]:
        """Figures of the twins, samples trained as a recipe says, by name of recipe and metric."""
        found: dict[str, dict[str, float]] = {}
        for key, figure in self.figures.items():
            if is_twin_key(key):
                metric, _, recipe = key.partition("/")
                found.setdefault(recipe, {})[metric] = figure
        return found

    def __repr__(self) -> str:
        """Return the step and the layer, and the number of figures, in a line."""
        return f"Row(step={self.step}, layer={self.layer!r}: {len(self.figures):,} figures)"

    def interval(self, key: str) -> tuple[float, float]:
        """Return the confidence interval of 95 % around a figure.

        Args:
            key: Key of the figure, such as ``"stall_frac/bf16"``.

        Returns:
            The lower and the upper end. Both equal the figure if all elements were measured, and
            are NaN if the error of the figure is missing or cannot be trusted. Twins have a sample
            of their own, so that a figure of a twin without an error has no interval.

        Raises:
            KeyError: The row has no such figure.
        """
        figure, error = self.figures[key], self.errors.get(key)
        if error is None:
            is_whole = not is_twin_key(key) and all(map(is_twin_key, self.errors))
            error = 0.0 if is_whole else math.nan
        return find_interval(key.partition("/")[0], figure, error)


def is_twin_key(key: str) -> bool:
    """Return True for a key ``metric/recipe``, False for ``metric`` and ``metric/format``.

    Keys with a recipe belong to figures of twins, samples that are trained as the recipe says.
    """
    # A recipe may have the name of a format, so that the metric tells them apart.
    metric, _, recipe = key.partition("/")
    return bool(recipe) and metric not in LAYER_METRICS and metric not in FORMAT_METRICS
