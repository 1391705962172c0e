"""Turn the sums of one observed step into a `StepRecord`: the figures of each layer and the model.

Read `step_table` and `figures` first, which compute figures from sums.

This is the last file of the room; `altgrad.report.records` writes the records to the run file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from altgrad._messages import format_count
from altgrad.measurement.figures import Figures, layer_figures
from altgrad.measurement.numbers import Numbers
from altgrad.measurement.step_table import StepTable
from altgrad.measurement.twin_figures import NO_TWINS, TwinValues, split_twins


@dataclass(frozen=True, eq=False)
class StepRecord:
    """The figures (values of metrics) of one observed step, for each layer and the whole model.

    Attributes:
        index: Number of steps that this optimizer made before this one, since it was attached.
        layers: Figures of each layer that had a gradient, by name. Figures of a sampled layer are
            estimates for all its elements. Only maxima and minima are those of the sample, so that
            maxima may be too low and minima too high.
        model: Figures of all these layers together, each layer weighted by its number of elements.
        own_seconds: Time that the host took to observe the previous observed step, in seconds. NaN
            for the first observed step.
        training_seconds: Mean time of a step since the previous observed step, without the time to
            observe, in seconds. NaN for the first observed step.
    """

    index: int
    layers: Mapping[str, Figures]
    model: Figures
    own_seconds: float
    training_seconds: float

    def __repr__(self) -> str:
        """Return the number of the step and of its layers, in a line."""
        return f"StepRecord(index={self.index}, {format_count(len(self.layers), 'layer')})"

    def _repr_html_(self) -> str:
        """Return tables of the model's figures for a notebook."""
        return f"<p>{escape(repr(self))}: the model</p>{self.model._repr_html_()}"


def step_record(
    formats: Sequence[str],
    judged: Mapping[str, Sequence[str]],
    vectors: Numbers,
    index: int,
    seconds: tuple[float, float],
    twins: TwinValues | None = None,
) -> StepRecord:
    """Return the figures (values of metrics) of a step, from the sums and maxima of its layers.

    Args:
        formats: Names of the formats, in the order of their columns.
        judged: For each layer, by name, the names of the formats that it gets figures for.
        vectors: Sums and maxima of each layer, float64 (layers, columns) on the host, in the order
            of `judged`.
        index: Number of earlier steps, for `StepRecord.index`.
        seconds: `StepRecord.own_seconds` and `StepRecord.training_seconds`.
        twins: The sums of twins, samples that are stored and stepped as recipes say; None without.
            Layers that are not in `judged` are left out.
    """
    in_order = [tuple(name for name in formats if name in chosen) for chosen in judged.values()]
    table, model_rows = StepTable.with_model(formats, vectors, in_order)
    layer_twins, model_twins = split_twins(twins, judged)
    layers = {
        name: layer_figures(table, row, chosen, layer_twins.get(name, NO_TWINS))
        for row, (name, chosen) in enumerate(zip(judged, in_order, strict=True))
    }
    return StepRecord(index, layers, Figures(table, model_rows, model_twins), *seconds)
