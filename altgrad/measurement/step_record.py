"""`StepRecord`: what one observed optimizer step came to, in plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from altgrad.measurement.figures import Figures


@dataclass(frozen=True, eq=False)
class StepRecord:
    """One observed step: the figures of its layers, and of the model that they make.

    Attributes:
        index: How many steps of this optimizer came before it since it was attached.
        layers: Figures of each layer that took part, by name; of a sample they estimate those of
            the whole layer. Maxima and minima are those of the sample, the former too low and the
            latter too high.
        model: Figures of all those layers together, each with the weight of all its elements.
        own_seconds: What the host took to observe the last step before this one, beside training;
            NaN for the first.
        training_seconds: The mean time of a step since then without that; NaN for the first.
    """

    index: int
    layers: Mapping[str, Figures]
    model: Figures
    own_seconds: float
    training_seconds: float
