"""`TwinSource`: the interface by which twins get the layers of the run and their samples.

Twins step a sample of each layer of the *run*, the training that is watched.
`altgrad.monitor.twin_layers` implements the interface for a monitor.

Read `optimizer_twin` first; `layer_plan` comes next, and asks for samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from altgrad.quantization.formats import Scaling


class TwinSource(Protocol):
    """A source of the layers of a training, their samples and their scales.

    This interface is implemented in `altgrad.monitor.twin_layers`. *Twins*, samples that are
    stepped as recipes say, get all they need of the training by it.

    Attributes:
        scaling: The elements that share a scale: ``"tensor"``, ``"channel"`` (along dimension 0),
            ``("block", size)``, or None for no scale.
        seed: Seed of the samples and of stochastic rounding.
    """

    scaling: Scaling | None
    seed: int

    @property
    def names(self) -> Mapping[Tensor, str]:
        """The name of each parameter; a new dict once names have been read again."""

    @property
    def can_step(self) -> bool:
        """False if no samples can be stepped, because several ranks share the parameters."""

    def find_stepped(self, optimizer: Optimizer) -> Sequence[tuple[str, Tensor]]:
        """Return name and parameter of each layer that an optimizer steps."""

    def has_twins(self, name: str) -> bool:
        """Return True if the settings of a layer ask to step a sample of it as recipes say."""

    def draw(self, name: str, shape: torch.Size, block: int) -> Tensor:
        """Draw the sample of a layer, the few elements that twins step; the same ones at each call.

        Args:
            name: Name of the layer.
            shape: Shape of the layer.
            block: Number of neighbours along the last dimension that are drawn together.

        Returns:
            Ascending indices into the flattened layer, int64 (elements) on the CPU; empty for an
            empty layer.
        """

    def find_amaxes(self, name: str, indices: Tensor) -> Tensor:
        """Return the amaxes, largest magnitudes, from which scales of a layer are computed.

        Args:
            name: Name of the layer.
            indices: The elements whose scales are wanted, flat indices, int64 (elements).

        Returns:
            The amax of the weights that share a scale with each element, float32 or float64
            (elements); (1) if all elements of the layer share one.
        """

    def warn(self, notice: str) -> None:
        """Show the user a notice, unless the same one was shown before."""

    def warn_about_omission(self, notice: str) -> None:
        """Show a notice about layers that are not sampled, if the user has named recipes."""
