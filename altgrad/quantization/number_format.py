"""`NumberFormat`: what all formats of weights have in common, and which weights share a scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from altgrad.quantization.float_format import FloatFormat
from altgrad.quantization.formats import Scaling

if TYPE_CHECKING:
    import torch

_UNSCALED_BITS = 16


@runtime_checkable  # `get_formats` tells formats from their names
class NumberFormat(Protocol):
    """A format that weights can be judged for: a `FloatFormat` or a `BlockFormat`."""

    @property
    def name(self) -> str:
        """Return how the format is called in log keys and tables."""

    @property
    def element(self) -> FloatFormat:
        """Return the format of the numbers, without the scales that they share."""

    @property
    def block_size(self) -> int | None:
        """Return how many neighbours share a scale by definition of the format, or None.

        A format with blocks of its own is scaled by them, whatever the scaling of a run.
        """

    @property
    def has_tensor_scale(self) -> bool:
        """Return whether the scales of blocks are relative to one of the whole tensor."""

    @property
    def power_of_two(self) -> bool:
        """Return whether every scale is a power of two."""

    def is_coarser_than(self, other: torch.dtype | FloatFormat) -> bool:
        """Return whether numbers of this dtype or format lie closer together than the format's."""


def applied_scaling(format: NumberFormat, scaling: Scaling | None) -> Scaling | None:
    """Return which weights share a scale in a format, under the scaling of a run.

    A format with blocks of its own keeps them. Formats of 16 bits have the exponents to do without
    a scale, and are used so.

    Args:
        format: The format.
        scaling: What shares a scale in formats that prescribe none; None for no scale.

    Returns:
        A `Scaling`, or None where weights in the format are not scaled.
    """
    if format.block_size is not None:
        return ("block", format.block_size)
    return scaling if format.element.bits < _UNSCALED_BITS else None
