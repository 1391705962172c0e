"""From the sums of one step's layers, still on their devices, to a `StepRecord`: one host copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from altgrad.figures import Figures, Vectors
from altgrad.statistics import SUMS, LayerStatistics, sum_count
from altgrad.step_record import StepRecord

_POPULATION, _ELEMENTS = SUMS.index("population"), SUMS.index("elements")
_Rows = tuple[int, ...]


class StepVectors:
    """The vectors of the layers of one step: of each its sums, then its maxima.

    Args:
        formats: Names of the formats, in the order of their sums.
        formats_of: From the name of a layer to those of the formats that it is judged for.
    """

    def __init__(self, formats: Sequence[str], formats_of: Callable[[str], Sequence[str]]) -> None:
        self._formats = formats
        self._formats_of = formats_of
        self._names: list[str] = []
        self._vectors: list[Tensor] = []
        self._weights: list[Tensor] = []

    def add(self, names: Sequence[str | None], vectors: Tensor, weights: Tensor) -> None:
        """Some layers.

        Args:
            names: Of each; without one it is left out.
            vectors: A row for each.
            weights: (1, layers), how many elements each of those measured stands for.
        """
        present = [row for row, name in enumerate(names) if name is not None]
        if not present:
            return
        if len(present) < len(names):
            rows = torch.tensor(present, device=vectors.device)
            vectors, weights = vectors[rows], weights[:, rows]
        self._names += [name for name in names if name is not None]
        self._vectors.append(vectors)
        self._weights.append(weights)

    def add_layer(self, name: str, statistics: LayerStatistics) -> None:
        """One layer, each of whose elements stands for as many."""
        vector = torch.cat((statistics.sums, statistics.maxima)).unsqueeze(0)
        population, elements = vector[:, _POPULATION], vector[:, _ELEMENTS].clamp(min=1)
        self.add([name], vector, (population / elements).unsqueeze(0))

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
        if not self._names:
            return None, False
        device = self._vectors[0].device
        vectors, weights = self._vectors[0], self._weights[0]
        if len(self._vectors) > 1:
            vectors = torch.cat([each.to(device) for each in self._vectors])
            weights = torch.cat([each.to(device) for each in self._weights], dim=1)
        sets = self._layers_of_formats()
        merged = [each for rows in sets for each in _merged(vectors, weights, rows)]
        extra = torch.tensor([[*seconds, *[0.0] * (vectors.shape[1] - 2)]], dtype=torch.float64)
        extra = extra.to(device)
        if found_inf is not None:
            extra[0, 2] = found_inf
        # The seconds ride along as the maxima over ranks that they will be.
        numbers = torch.cat([vectors, *merged, extra]).tolist()
        record = self._record(index, numbers, [*sets.values()])
        return record, bool(numbers[-1][2])

    def _layers_of_formats(self) -> dict[_Rows, list[str | None]]:
        """Which formats are judged of the same layers; None is the parameters themselves."""
        sets: dict[_Rows, list[str | None]] = {tuple(range(len(self._names))): [None]}
        for format in self._formats:
            rows = tuple(
                row for row, name in enumerate(self._names) if format in self._formats_of(name)
            )
            if rows:
                sets.setdefault(rows, []).append(format)
        return sets

    def _record(
        self, index: int, numbers: list[list[float]], sets: list[list[str | None]]
    ) -> StepRecord:
        middle = sum_count(len(self._formats))
        layers: dict[str, Figures] = {}
        for name, row in zip(self._names, numbers, strict=False):
            wanted = {None, *self._formats_of(name)}
            layers[name] = Figures(self._split(row[:middle], row[middle:], wanted))
        of_model: dict[str | None, Vectors] = {}
        for position, formats in enumerate(sets):
            start = len(self._names) + 2 * position
            sums, maxima = numbers[start][:middle], numbers[start + 1][middle:]
            sums[_POPULATION] = sums[_ELEMENTS]  # the elements have been weighted to it
            of_model |= self._split(sums, maxima, {*formats})
        own_seconds, training_seconds = numbers[-1][:2]
        model = Figures(of_model, [*layers.values()])
        return StepRecord(index, layers, model, own_seconds, training_seconds)

    def _split(
        self, sums: Sequence[float], maxima: Sequence[float], wanted: set[str | None]
    ) -> dict[str | None, Vectors]:
        positions: list[tuple[str | None, int | None]] = [(None, None)]
        positions += [(name, position) for position, name in enumerate(self._formats)]
        return {
            name: Vectors(sums, maxima, position) for name, position in positions if name in wanted
        }


def _merged(vectors: Tensor, weights: Tensor, rows: _Rows) -> tuple[Tensor, Tensor]:
    """Of these layers together: a row with their sums, and one with their maxima."""
    if len(rows) < len(vectors):
        chosen = torch.tensor(rows, device=vectors.device)
        vectors, weights = vectors[chosen], weights[:, chosen]
    return weights @ vectors, vectors.amax(0, keepdim=True)
