"""`StepRecord`: what one observed step came to; `StepVectors` makes it, with one host copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from altgrad.measurement.figures import Figures, layer_figures
from altgrad.measurement.step_table import StepTable


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


class StepVectors:
    """The vectors of the layers of one step: of each its sums, then its maxima.

    Args:
        formats: Names of the formats, in the order of their sums.
        formats_of: From the name of a layer to those of the formats that it is judged for.
    """

    def __init__(self, formats: Sequence[str], formats_of: Callable[[str], Sequence[str]]) -> None:
        self._formats = formats
        self._formats_of = formats_of
        self._names: list[str | None] = []
        self._vectors: list[Tensor] = []

    def add(self, names: Sequence[str | None], vectors: Tensor) -> None:
        """Some layers.

        Args:
            names: Of each; without one it is left out.
            vectors: A row for each.
        """
        self._names += names
        self._vectors.append(vectors)

    @torch.inference_mode(mode=False)  # what is made in that mode could not be copied later
    def record(
        self, index: int, seconds: tuple[float, float], found_inf: Tensor | None
    ) -> tuple[StepRecord | None, bool]:
        """Everything on the host, and whether the optimizer skipped the step.

        Args:
            index: Of the step.
            seconds: What observing and what training took.
            found_inf: Of a fused optimizer under a GradScaler.

        Returns:
            The record; None without a layer.
        """
        if not self._places():
            return None, False
        places, numbers, skipped = self.on_host(found_inf)
        rows = [*places.values()]
        vectors = numbers if len(rows) == len(numbers) else numbers[rows]
        return self.record_of(index, [*places], vectors, seconds), skipped

    @torch.inference_mode(mode=False)
    def on_host(self, found_inf: Tensor | None) -> tuple[dict[str, int], Tensor, bool]:
        """The row of each layer, all rows, and whether the optimizer skipped the step."""
        if not self._vectors:
            skipped = found_inf is not None and bool(found_inf.item())
            return {}, torch.zeros(0, 0, dtype=torch.float64), skipped
        parts = [each.to(self._vectors[0].device) for each in self._vectors]
        if found_inf is not None:  # it rides along
            parts.append(parts[0].new_zeros(1, parts[0].shape[1]))
            parts[-1][0, 0] = found_inf
        numbers = torch.cat(parts).cpu()
        skipped = found_inf is not None and bool(numbers[-1, 0])
        return self._places(), numbers[: len(self._names)], skipped

    @torch.inference_mode(mode=False)
    def record_of(
        self, index: int, names: Sequence[str], vectors: Tensor, seconds: tuple[float, float]
    ) -> StepRecord:
        """From a row for each layer, on the host."""
        judged = [self._judged(name) for name in names]
        table, of_model = StepTable.with_model(self._formats, vectors, judged)
        layers = {
            name: layer_figures(table, row, formats)
            for row, (name, formats) in enumerate(zip(names, judged, strict=True))
        }
        return StepRecord(index, layers, Figures(table, of_model), *seconds)

    def _places(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self._names) if name is not None}

    def _judged(self, name: str) -> tuple[str, ...]:
        wanted = {*self._formats_of(name)}
        return tuple(format for format in self._formats if format in wanted)
