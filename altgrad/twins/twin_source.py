"""`TwinSource`: the interface by which twins get the layers of the run and their samples.

A *twin* is a sample of the layers of the *run*, the training that is watched. It is stepped and
stored as a recipe says, beside the run, to show what the formats of that recipe would do to it.
`altgrad.monitor.twin_layers` implements the interface for a monitor.

Read `optimizer_twin` first; `drawing` comes next. `layer_plan` asks here for samples.
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
        most_elements: The largest number of sampled elements of a layer on all ranks together;
            equal on each.
    """

    scaling: Scaling | None
    most_elements: int

    @property
    def seed(self) -> int:
        """The seed of stochastic rounding; another one on each rank."""

    @property
    def names(self) -> Mapping[Tensor, str]:
        """The name of each parameter; a new dict once names have been read again."""

    @property
    def is_shared(self) -> bool:
        """True if several ranks hold the layers, or parts of them, and divide the work of sampling.

        A *sample* has the few elements of a layer that are stepped on their own as recipes say.
        Each rank steps those that `find_part` gives it.
        """

    def is_ready(self, name: str, parameter: Tensor) -> bool:
        """Return True once a layer can be sampled: all ranks that share it know it and its scales.

        Scales are computed by all ranks together, before an observed step.

        Args:
            name: Name of the layer.
            parameter: Its parameter.
        """

    def tears(self, name: str, block: int) -> bool:
        """Return True if the elements of a block, which share a scale, lie on several ranks.

        Args:
            name: Name of the layer, which `is_ready`.
            block: Number of neighbours along the last dimension in a block.
        """

    def find_part(self, name: str, indices: Tensor | None) -> tuple[Tensor, Tensor]:
        """Find which elements of a layer that several ranks hold this rank has to step.

        Args:
            name: Name of the layer, which `is_ready`.
            indices: Elements of the whole layer, ascending flat indices, int64 (elements) on the
                CPU; None for all.

        Returns:
            Those that this rank steps, and the same as indices into its flattened local shard,
            int64 (elements) on the CPU. Empty if another rank steps this replica.
        """

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

    def warn_here(self, notice: str) -> None:
        """Show a notice that concerns this rank alone, unless the same one was shown before."""

    def warn_about_omission(self, notice: str) -> None:
        """Show a notice about layers that are not sampled, if the user has named recipes."""
