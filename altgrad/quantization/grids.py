"""Rounding to several formats at once, in float64. A grid is the set of numbers of one format.

`kernel` rounds one tensor to one grid. Here the constants of all formats lie side by side in one
tensor, (rows, formats, 1), so that one torch operation serves all formats. A row holds elements of
one layer. Like `kernel`, this file rounds a value to a multiple of the power-of-two spacing at the
value. A test compares the results of both files bit for bit, for every named format.

Read `kernel` and `scale_groups` first. `altgrad.measurement.kernel` uses this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from altgrad.quantization.binary64 import EXPONENT_MASK, ROUNDER
from altgrad.quantization.float_format import FloatFormat
from altgrad.quantization.kernel import get_arithmetic_dtype, get_grid


class Grids(NamedTuple):
    """The constants for rounding to several formats: float64 tensors, (1 or rows, formats, 1).

    A row holds elements of one layer (parameter tensor). A scale is the factor from the numbers of
    a format to weights. If the scales are powers of two, one for each row and format, all constants
    but `eps` are multiplied by them, and `scale` is None. With other scales, or a format without
    subnormals or mantissa bits, `scale` is a tensor. Callers then divide values by the scale
    (`divide_by_scale`) before rounding, and multiply results by the scale (`multiply_by_scale_`,
    `multiply_by_scale`).

    Attributes:
        eps: Spacing of neighbouring values divided by the power of two below them, ``2**-M``.
        first_spacing: Spacing from 0 to the smallest normal number.
        last_spacing: Spacing at the largest value.
        top: Largest finite value.
        bottom: −`top`.
        ceiling: Upper limit of an updated weight: `top`, or inf if the format has an amax scale,
            which a run would raise with its weights.
        floor: −`ceiling`.
        smallest_normal: Smallest normal number; inf if every value is subnormal.
        scale: float64, (1 or rows, formats, 1 or elements). None if the constants are multiplied by
            it already, or if it is 1.
        without_subnormals: Index and smallest normal number of each format without subnormals.
        without_mantissa: Index and bias of each format without mantissa bits, whose ties go to the
            even code.
    """

    eps: Tensor
    first_spacing: Tensor
    last_spacing: Tensor
    top: Tensor
    bottom: Tensor
    ceiling: Tensor
    floor: Tensor
    smallest_normal: Tensor
    scale: Tensor | None
    without_subnormals: tuple[tuple[int, float], ...]
    without_mantissa: tuple[tuple[int, int], ...]

    def divide_by_scale(self, x: Tensor, out: Tensor) -> Tensor:
        """Divide values by the scale of each format before they are rounded, if that is needed.

        It is not needed if `scale` is None: the constants, such as `top`, are then multiplied by
        the scale.

        Args:
            x: Values, float64, (rows, 1 or formats, elements).
            out: Buffer, float64, (rows, formats, elements); overwritten if there is a scale.

        Returns:
            `out`, or x itself if `scale` is None.
        """
        return x if self.scale is None else torch.div(x, self.scale, out=out)

    def multiply_by_scale_(self, x: Tensor) -> Tensor:
        """Multiply results of rounding by the scale of each format in place, if that is needed.

        It is not needed if `scale` is None: the constants, such as `top`, are then multiplied by
        the scale, and values have not been divided by it.

        Args:
            x: Numbers computed from results of `divide_by_scale`, such as spacings, float64, (rows,
                formats, elements); overwritten if there is a scale.

        Returns:
            x.
        """
        return x if self.scale is None else x.mul_(self.scale)

    def multiply_by_scale(self, x: Tensor, out: Tensor) -> Tensor:
        """Multiply results of rounding by the scale of each format, without changing x, if needed.

        It is not needed if `scale` is None: the constants, such as `top`, are then multiplied by
        the scale, and values have not been divided by it.

        Args:
            x: Values on the unscaled grid, float64, (rows, formats, elements).
            out: Buffer like x; overwritten if there is a scale.

        Returns:
            `out`, or x itself if `scale` is None.
        """
        return x if self.scale is None else torch.mul(x, self.scale, out=out)


def make_grids(
    formats: Sequence[FloatFormat],
    is_scaled: Sequence[bool],
    scale: Tensor | None,
    *,
    power_of_two: bool = True,
    device: torch.device | None = None,
) -> Grids:
    """Return the constants for rounding to several formats under their scales.

    Args:
        formats: One or more formats.
        is_scaled: For each format, whether it has an amax scale, which fits the largest weight. A
            real run would raise such a scale after the step, so that updated weights may exceed the
            largest value.
        scale: Positive factors from the numbers of each format to weights, float64, (1 or rows,
            formats, 1 or elements); None for 1. A row holds elements of one layer.
        power_of_two: Whether all scales are powers of two.
        device: The device of the constants; None for the CPU.

    Returns:
        The constants of the grids.

    Raises:
        ValueError: A format is too wide for float64.
    """
    for format in formats:
        get_arithmetic_dtype(torch.float64, format.key, True)
    each = [get_grid(format.key) for format in formats]
    without_mantissa = tuple((i, g.bias) for i, g in enumerate(each) if g.points_per_binade == 1)
    without_subnormals = tuple(
        (i, g.first_binade) for i, g in enumerate(each) if not g.has_subnormals
    )
    # The special cases of `round_to_grids` compare with unscaled constants.
    special = bool(without_mantissa or without_subnormals)
    folds = scale is None or (power_of_two and scale.shape[-1] == 1 and not special)

    eps, *unscaled = _make_constants(
        tuple(format.key for format in formats), tuple(is_scaled), device or torch.device("cpu")
    ).unbind()
    first_spacing, last_spacing, top, ceiling, smallest_normal = (
        each if scale is None or not folds else each * scale for each in unscaled
    )
    return Grids(
        eps=eps,
        first_spacing=first_spacing,
        last_spacing=last_spacing,
        top=top,
        bottom=-top,
        ceiling=ceiling,
        floor=-ceiling,
        smallest_normal=smallest_normal,
        scale=None if folds else scale,
        without_subnormals=without_subnormals,
        without_mantissa=without_mantissa,
    )


@lru_cache(maxsize=256)
def _make_constants(
    keys: tuple[str, ...], is_scaled: tuple[bool, ...], device: torch.device
) -> Tensor:
    """Return the constants of `Grids` for a scale of 1.

    Each copy to a device costs a call, and scales of channels and blocks make new grids at each
    step. All constants are copied at once, and kept.

    Args:
        keys: The `key` of each format.
        is_scaled: For each format, whether it has an amax scale.
        device: Device of the result.

    Returns:
        float64 (6, 1, formats, 1): eps, first spacing, last spacing, top, ceiling, smallest normal.
    """
    columns = [
        (
            1 / grid.points_per_binade,
            grid.first_binade / grid.points_per_binade,
            grid.last_binade / grid.points_per_binade,
            grid.max,
            torch.inf if has_scale else grid.max,
            grid.first_binade if grid.first_binade <= grid.max else torch.inf,
        )
        for grid, has_scale in zip(map(get_grid, keys), is_scaled, strict=True)
    ]
    table = torch.tensor(columns, dtype=torch.float64, device="cpu").t().contiguous()
    return table.view(6, 1, -1, 1).to(device)


def extract_binades(x: Tensor, out: Tensor) -> Tensor:
    """Write the largest power of two up to ``abs(x)``, for each element, to `out`.

    Args:
        x: float64, any shape, with magnitudes up to `LARGEST`, 2**960.
        out: Buffer like x; may be x.

    Returns:
        `out`, in which 0 and subnormal numbers of float64 give 0.
    """
    torch.bitwise_and(view_bits(x), EXPONENT_MASK, out=view_bits(out))
    return out


def view_bits(x: Tensor) -> Tensor:
    """Return the bits of a float64 tensor as an int64 view of its memory.

    If x has an attribute `bits`, this attribute is returned. The kernel's buffers keep their view
    there, because making a view takes longer than an operation on it.

    Args:
        x: float64, any shape.

    Returns:
        int64, the shape of x, in the memory of x.
    """
    bits: Tensor | None = getattr(x, "bits", None)
    return x.view(torch.int64) if bits is None else bits


def round_to_grids(
    x: Tensor, grids: Grids, narrow: Tensor, spacing: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Round values to several formats, each continued above its largest value.

    A value is rounded to the nearest multiple of the spacing, the distance between neighbouring
    numbers of the format at the value. Ties go to the even multiple, or to the even code in a
    format without mantissa bits.

    Args:
        x: Values as `Grids.divide_by_scale` returns them, float64, (rows, 1 or formats, elements).
            A row holds elements of one layer.
        grids: The constants of the formats.
        narrow: Buffer, float64, (rows, 1, elements); overwritten.
        spacing: Buffer, float64, (rows, formats, elements); overwritten.
        out: Buffer like `spacing`; overwritten.

    Returns:
        `spacing` with the spacing at each value, and `out` with the rounded values.
    """
    binade = extract_binades(x, narrow if x.shape[1] == 1 else spacing)
    torch.maximum(torch.mul(binade, grids.eps, out=spacing), grids.first_spacing, out=spacing)
    for position, smallest_normal in grids.without_subnormals:
        below = (x if x.shape[1] == 1 else x[:, position : position + 1]).abs() < smallest_normal
        spacing[:, position : position + 1].masked_fill_(below, smallest_normal)
    torch.add(x, spacing, alpha=ROUNDER, out=out).sub_(spacing, alpha=ROUNDER)
    for position, bias in grids.without_mantissa:
        # For M = 0 the even multiple is not the even code: a tie lies at 1.5 times the spacing, and
        # the last bit of the code is that of the exponent field.
        part = slice(position, position + 1)
        value, step = (x if x.shape[1] == 1 else x[:, part]), spacing[:, part]
        code_is_even = (torch.frexp(step).exponent - 1 + bias) % 2 == 0
        tie_to_below = (value.abs() == 1.5 * step) & code_is_even
        out[:, part].copy_(torch.where(tie_to_below, step.copysign(value), out[:, part]))
    return spacing, out


def compute_gaps(stored: Tensor, target_gap: Tensor, grids: Grids) -> Tensor:
    """Compute how far each stored value is from the next value of its format toward a target.

    The target is where an update wants to move the stored value. For a target farther from zero,
    the result is the spacing at the stored value. For a target just below a stored power of two, it
    is the spacing at the target, half as large. If the target lies beyond the next value, the
    result may be larger, up to the distance from stored value to target.

    Args:
        stored: Values of the formats, times the scale if the constants are multiplied by it,
            float64, (rows, formats, elements); overwritten. A row holds elements of one layer.
        target_gap: The spacing at each target, from `round_to_grids`.
        grids: The constants of the formats.

    Returns:
        `stored`, now with the distances.
    """
    # Without subnormals the neighbour below the smallest normal number is 0, which is farther.
    farther = [
        (stored[:, at].abs() <= smallest_normal) & (target_gap[:, at] >= smallest_normal)
        for at, smallest_normal in grids.without_subnormals
    ]
    spacing = extract_binades(stored, stored).mul_(grids.eps)
    gaps = torch.clamp(spacing, min=grids.first_spacing, max=target_gap, out=spacing)
    for (at, smallest_normal), mask in zip(grids.without_subnormals, farther, strict=True):
        gaps[:, at].masked_fill_(mask, smallest_normal)
    return gaps
