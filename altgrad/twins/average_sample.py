"""`AverageSample`: the average of the run's weights at the elements that twins step.

The *run* is the training that is watched; its average is a module beside the model. *Twins* are
samples of its layers that are stored and stepped as recipes say.

Read `batch_norm` first; `average_followers` comes next.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from altgrad.quantization.devices import gather_all, move_to_exact_device
from altgrad.twins.batch_norm import BatchStatistic
from altgrad.twins.layer_plan import LaneKind
from altgrad.twins.layout import Layout
from altgrad.twins.run_average import RunAverage
from altgrad.twins.sample import Sampled
from altgrad.twins.writes import count_writes_to_each


class AverageSample:
    """The sampled elements of an average, for layers whose samples lie in one flat tensor.

    Args:
        average: The average of the training's weights, or a running statistic of BatchNorm.
        kind: The properties that the layers share.

    Attributes:
        tensors: The average of each layer by name, as far as there is one.
        dtype: The dtype of the average; that of the weights if no layer has an average.
    """

    def __init__(self, average: RunAverage | BatchStatistic, kind: LaneKind) -> None:
        self.tensors: Mapping[str, Tensor] = {}
        self.dtype = kind.dtype
        self._average = average
        self._kind = kind
        self._length = 0
        # The number of each element's layer, int64 (elements); one more than the last elsewhere.
        self._numbers = torch.zeros(0, dtype=torch.int64, device="cpu")
        self._places: list[tuple[Tensor, Tensor, slice]] = []  # average, its indices, its place
        self._writes: tuple[list[int], list[int]] = [], []

    def rearrange(self, layers: Mapping[str, Sampled], layout: Layout) -> None:
        """Take over other places of the samples in the flat tensor.

        Args:
            layers: The layers by name.
            layout: The places of the layers in a flat tensor.
        """
        found = self._average.find_tensors()
        self.tensors = {
            name: found[name]
            for name, each in layers.items()
            if name in found and found[name].shape == each.shape
        }
        self.dtype = next((each.dtype for each in self.tensors.values()), self._kind.dtype)
        self._length = layout.length
        self._places = [
            (each, layers[name].indices.to(each.device), layout.places[name])
            for name, each in self.tensors.items()
        ]
        device = self._kind.device
        self._numbers = torch.full((layout.length,), len(self._places), device=device)
        for number, (*_, place) in enumerate(self._places):
            self._numbers[place] = number
        self._writes = self._count_writes()

    def gather(self) -> Tensor:
        """Gather the average at the samples.

        Returns:
            The average in its own dtype, (elements). NaN at padding, and for layers that the
            averaged module does not have.
        """
        values = torch.full((self._length,), torch.nan, dtype=self.dtype, device=self._kind.device)
        gather_all(
            [each.detach() for each, *_ in self._places],
            [indices for _, indices, _ in self._places],
            [values[place] for *_, place in self._places],
        )
        return values

    def spread(self, numbers: Tensor) -> Tensor:
        """Return the number of each element's layer; 0 at padding and for layers without average.

        Args:
            numbers: A number for each layer in `tensors`, (layers) on the device of the averages or
                of the samples.

        Returns:
            The numbers, (elements).
        """
        (here,) = move_to_exact_device([numbers])
        return torch.cat([here, here.new_zeros(1)])[self._numbers]

    def take_writes(self) -> bool:
        """Return True if torch has counted a write to the average since the last call."""
        now, before = self._count_writes(), self._writes
        self._writes = now
        return now != before

    def _count_writes(self) -> tuple[list[int], list[int]]:
        """Return two lists: for each layer, the number of writes to its average, and its address.

        A write as by `p.data = …` changes the address.
        """
        tensors = [*self.tensors.values()]
        return count_writes_to_each(tensors), [*map(Tensor.data_ptr, tensors)]
