"""Several formats at once, in float64: their constants side by side, one kernel over all.

`kernel` rounds one tensor to one grid; here one operation serves every format, which is what makes
many of them cheap. Both write a value as a multiple of the power-of-two gap at it and round that
multiple; a test holds them against each other bit for bit, over every named format.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from altgrad.quantization.float_format import FloatFormat
from altgrad.quantization.kernel import arithmetic_dtype, grid_of

LARGEST = 2.0**960
"""Beyond it the sums that round a value would leave float64. No narrower dtype gets near it."""

_EXPONENT_MASK = 0x7FF0_0000_0000_0000
# x + _ROUNDER · gap has gap for its unit in the last place, so that the addition rounds x to a
# multiple of gap, ties to the even one (Dekker 1971). Products with gap, a power of two, are exact.
_ROUNDER = 1.5 * 2.0**52
JUST_BELOW_ONE = 1 - 2.0**-53


class Grids(NamedTuple):
    """Constants of several grids, float64, of shape (1 or rows, formats, 1).

    With a scale that is a power of two for each row and format they are those of the scaled grid.
    Another scale, or a format that needs more than its constants, is kept apart: values are then
    divided by it first, and `scale` is not None.
    """

    eps: Tensor
    first_gap: Tensor  # between 0 and the smallest normal number
    last_gap: Tensor  # at the top
    top: Tensor
    bottom: Tensor  # −top
    ceiling: Tensor  # where the rounding of an updated weight ends: top, inf under an amax scale
    floor: Tensor  # −ceiling
    smallest_normal: Tensor
    scale: Tensor | None
    # Position and first normal number of formats without subnormals; position and bias of those
    # without mantissa bits, whose ties go to the even code.
    without_subnormals: tuple[tuple[int, float], ...]
    without_mantissa: tuple[tuple[int, int], ...]

    def into(self, x: Tensor, out: Tensor) -> Tensor:
        """Values as the constants count them."""
        return x if self.scale is None else torch.div(x, self.scale, out=out)

    def back(self, x: Tensor) -> Tensor:
        """The reverse, in place."""
        return x if self.scale is None else x.mul_(self.scale)

    def true(self, x: Tensor, out: Tensor) -> Tensor:
        """The reverse; x stays as it is."""
        return x if self.scale is None else torch.mul(x, self.scale, out=out)


def grids_of(
    formats: Sequence[FloatFormat],
    is_scaled: Sequence[bool],
    scale: Tensor | None,
    *,
    power_of_two: bool = True,
    device: torch.device | None = None,
) -> Grids:
    """The grids of these formats.

    Args:
        formats: One or more formats.
        is_scaled: Whether each is under an amax scale, which a real run would raise.
        scale: float64, of shape (1 or rows, formats, 1 or columns), positive; None for 1.
        power_of_two: Whether all its values are powers of two.
        device: Where the constants are to be.

    Raises:
        ValueError: A format that float64 does not hold.
    """
    for format in formats:
        arithmetic_dtype(torch.float64, format.key, True)
    each = [grid_of(format.key) for format in formats]
    without_mantissa = tuple((i, g.bias) for i, g in enumerate(each) if g.steps == 1)
    without_subnormals = tuple(
        (i, g.first_binade) for i, g in enumerate(each) if not g.has_subnormals
    )
    special = bool(without_mantissa or without_subnormals)
    folds = scale is None or (power_of_two and scale.shape[-1] == 1 and not special)

    def constants(values: list[float], *, scaled: bool = True) -> Tensor:
        tensor = torch.tensor(values, dtype=torch.float64, device=device).view(1, -1, 1)
        return tensor * scale if scaled and folds and scale is not None else tensor

    top = constants([g.max for g in each])
    ceiling = constants([torch.inf if s else g.max for s, g in zip(is_scaled, each, strict=True)])
    return Grids(
        eps=constants([1 / g.steps for g in each], scaled=False),
        first_gap=constants([g.first_binade / g.steps for g in each]),
        last_gap=constants([g.last_binade / g.steps for g in each]),
        top=top,
        bottom=-top,
        ceiling=ceiling,
        floor=-ceiling,
        smallest_normal=constants([g.first_binade for g in each]),
        scale=None if folds else scale,
        without_subnormals=without_subnormals,
        without_mantissa=without_mantissa,
    )


def binade_of(x: Tensor, out: Tensor) -> Tensor:
    """The power of two below abs(x), up to `LARGEST`; 0 for 0 and for subnormals of float64."""
    torch.bitwise_and(bits_of(x), _EXPONENT_MASK, out=bits_of(out))
    return out


def bits_of(x: Tensor) -> Tensor:
    """The same memory as integers; made once for a buffer, which keeps it as `bits`."""
    bits: Tensor | None = getattr(x, "bits", None)
    return x.view(torch.int64) if bits is None else bits


def round_to_grids(
    x: Tensor, grids: Grids, narrow: Tensor, gap: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Round to the grids of all formats, going on above their tops.

    A value is rounded to the nearest multiple of the gap at it; ties go to the even multiple, or to
    the even code where M = 0.

    Args:
        x: Values as the constants count them, float64, (rows, 1 or formats, columns).
        grids: The grids.
        narrow: Buffer of (rows, 1, columns); overwritten.
        gap: Buffer of (rows, formats, columns).
        out: Buffer like `gap`.

    Returns:
        The distance between the grid points around x, and x rounded, in the two buffers.
    """
    binade = binade_of(x, narrow if x.shape[1] == 1 else gap)
    torch.maximum(torch.mul(binade, grids.eps, out=gap), grids.first_gap, out=gap)
    for position, smallest_normal in grids.without_subnormals:
        below = (x if x.shape[1] == 1 else x[:, position : position + 1]).abs() < smallest_normal
        gap[:, position : position + 1].masked_fill_(below, smallest_normal)
    torch.add(x, gap, alpha=_ROUNDER, out=out).sub_(gap, alpha=_ROUNDER)
    for position, bias in grids.without_mantissa:
        part = slice(position, position + 1)
        of_format, step = (x if x.shape[1] == 1 else x[:, part]), gap[:, part]
        code_is_even = (torch.frexp(step).exponent - 1 + bias) % 2 == 0
        tie_to_below = (of_format.abs() == 1.5 * step) & code_is_even
        out[:, part].copy_(torch.where(tie_to_below, step.copysign(of_format), out[:, part]))
    return gap, out
