"""`TwinSource`: what twins ask about the layers of the run that they belong to.

A monitor answers, in `altgrad.monitor.twin_layers`. This file stands alone; `layer_plan` comes next
and asks for samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from altgrad.quantization.formats import Scaling


class TwinSource(Protocol):
    """The layers of a run, with their samples and scales.

    Attributes:
        scaling: The elements that share a scale, as in `altgrad.measure`.
        seed: Seed of the samples and of stochastic rounding.
    """

    scaling: Scaling | None
    seed: int

    @property
    def can_step(self) -> bool:
        """False if twins cannot be stepped, as of parameters that several ranks share."""

    def find_stepped(self, optimizer: Optimizer) -> Sequence[tuple[str, Tensor]]:
        """Return name and parameter of the layers that an optimizer steps."""

    def has_twins(self, name: str) -> bool:
        """Return True if a layer has twins at all, as its sampling rule says."""

    def draw(self, name: str, shape: torch.Size, block: int) -> Tensor:
        """Draw the elements of a layer that twins step.

        Args:
            name: Name of the layer.
            shape: Shape of the layer.
            block: Number of neighbours along the last dimension that are drawn together.

        Returns:
            Ascending indices into the flattened layer, int64 (elements) on the CPU; empty for an
            empty layer.
        """

    def find_amaxes(self, name: str, indices: Tensor) -> Tensor:
        """Return the largest magnitudes from which the scales of a layer are computed.

        Args:
            name: Name of the layer.
            indices: The elements whose scales are wanted, int64 (elements).

        Returns:
            The largest magnitude among the weights that share the scale of each element, (elements)
            or (1).
        """

    def warn(self, notice: str) -> None:
        """Warn the user, once for each notice."""

    def warn_about_omission(self, notice: str) -> None:
        """Warn of layers without twins, if the user has asked for twins."""
