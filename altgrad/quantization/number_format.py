"""`NumberFormat`: the interface (Protocol) of all number formats.

`FloatFormat` (`float_format`) and `BlockFormat` (`block_formats`, the next file) implement it.
`get_applied_scaling` decides which weights share a scale, the factor from stored numbers to values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, runtime_checkable

from altgrad.quantization.float_format import FloatFormat
from altgrad.quantization.formats import Scaling

if TYPE_CHECKING:
    import torch

# From 16 bits on the exponent range of fp16 and bf16 suffices, and frameworks apply no scale.
_UNSCALED_BITS = 16

ScaleRule: TypeAlias = Literal["amax", "e8m0", "e8m0_ceil", "e4m3"]
"""The name of the rule that computes a scale from an amax, the largest finite magnitude of the
weights that share the scale; see `FloatFormat.scale` and `BlockFormat`."""


@runtime_checkable  # `get_formats` distinguishes formats from names by isinstance
class NumberFormat(Protocol):
    """The interface (Protocol) of number formats: `FloatFormat` and `BlockFormat` implement it."""

    @property
    def name(self) -> str:
        """The name of the format in log keys and tables."""

    @property
    def element(self) -> FloatFormat:
        """The floating-point format of a single element, before scaling."""

    @property
    def block_size(self) -> int | None:
        """The number of neighbouring elements that share a scale; None without blocks.

        A format with a block size uses its own blocks and ignores the `scaling` argument of a run.
        """

    @property
    def scale(self) -> ScaleRule:
        """The name of the rule that computes a scale from the weights that share the scale.

        All rules start from the largest finite magnitude of these weights. `FloatFormat.scale` and
        `BlockFormat` describe them.
        """

    @property
    def has_tensor_scale(self) -> bool:
        """True if block scales are multiplied by a second scale for the whole tensor."""

    @property
    def power_of_two(self) -> bool:
        """True if every scale is a power of two."""

    def is_coarser_than(self, other: torch.dtype | FloatFormat) -> bool:
        """Return whether the format has fewer significant bits than another dtype or format.

        If so, weights stored in `other` can show updates that this format would lose.

        Args:
            other: The dtype or format in which weights are stored now.
        """


def get_applied_scaling(format: NumberFormat, scaling: Scaling | None) -> Scaling | None:
    """Return which weights share a scale in a format.

    A format with a block size always uses its own blocks. Formats of 16 bits or more are not
    scaled, because their exponent range covers that of weights.

    Args:
        format: The format.
        scaling: The scaling of formats without blocks: ``"tensor"``, ``"channel"`` or
            ``("block", size)``. None for no scale.

    Returns:
        A `Scaling`, or None if weights in the format are not scaled.
    """
    if format.block_size is not None:
        return ("block", format.block_size)
    return scaling if format.element.bits < _UNSCALED_BITS else None
