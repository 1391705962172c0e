"""Call the native kernel with tensors: the same sums as `kernel.row_sums`, without its buffers.

The native kernel takes addresses, which it finds in a table. Tensors keep their dtype: the kernel
reads bfloat16 and float16, too. It needs memory for one block of elements, 16 KiB, and counters.

Read `native_code` first; `measurer` comes next, and chooses the kernel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from altgrad.measurement.columns import (
    FORMAT_ROW_MAXIMA,
    FORMAT_ROW_MINIMA,
    FORMAT_ROW_SQUARES,
    FORMAT_ROW_SUMS,
    ROW_MAXIMA,
    ROW_MINIMA,
    ROW_SQUARES,
    ROW_SUMS,
)
from altgrad.measurement.kernel import EverMoved, Histograms, Rows
from altgrad.measurement.native_code import Function
from altgrad.measurement.native_table import BLOCK, BLOCK_PARTS, COUNTERS, Dtype, Place
from altgrad.quantization.grids import Grids

_DTYPES = {
    torch.float64: Dtype.FLOAT64,
    torch.float32: Dtype.FLOAT32,
    torch.float16: Dtype.FLOAT16,
    torch.bfloat16: Dtype.BFLOAT16,
}


def can_measure(x: Tensor) -> bool:
    """Return True if the native kernel can read a tensor: its numbers lie in the host's memory."""
    # Not so those of subclasses, such as torch's fake tensors, which have a shape alone.
    return x.device.type == "cpu" and type(x) in (Tensor, torch.nn.Parameter)


@torch.inference_mode(mode=False)
def native_row_sums(
    function: Function,
    rows: Rows,
    grids: Grids | None,
    dtype_grid: tuple[float, float],
    histograms: Histograms,
    ever: EverMoved | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute all sums and extrema of each row of elements on the CPU, in machine code.

    Args:
        function: The native kernel.
        rows: Weights and gradients of the elements, on the CPU; they are not changed.
        grids: The grids of the formats under the scales of each row. None without formats.
        dtype_grid: 2**-M for M mantissa bits, and the smallest normal number, of the dtype in which
            the weights are stored.
        histograms: Counts of elements by octave (power of two); updated in place.
        ever: Flags that say which elements have moved so far, and for which formats effectively;
            updated in place. None if never_moved_frac is not measured.

    Returns:
        Sums, float64 (rows, sums), and extrema, float64 (rows, extrema), as those of
        `kernel.row_sums`: counts and extrema are equal to these, other sums but for rounding.
    """
    count, _, elements = rows.before.shape
    formats = 0 if grids is None else grids.eps.shape[1]
    sums, extrema = _make_results(count, formats)
    tensors = {
        Place.BEFORE: _lay_side_by_side(rows.before),
        Place.AFTER: _lay_side_by_side(rows.after),
        Place.ULPS_AT: histograms.ulps_at,
        Place.WEIGHTS_AT: histograms.weights_at,
        Place.STEPS_AT: histograms.steps_at,
        Place.COUNTS: histograms.counts,
        Place.SUMS: sums,
        Place.EXTREMA: extrema,
        Place.BLOCK: torch.empty(BLOCK_PARTS * BLOCK, dtype=torch.float64, device="cpu"),
        Place.COUNTERS: torch.empty((2 + formats) * COUNTERS, dtype=torch.int64, device="cpu"),
    }
    gradient_dtype = Dtype.FLOAT64
    if rows.gradient is not None:
        tensors[Place.GRADIENT] = _lay_side_by_side(rows.gradient)
        gradient_dtype = _DTYPES[rows.gradient.dtype]
    if ever is not None:
        tensors |= {Place.MOVED: ever.moved, Place.EFFECTIVE: ever.effective}
    if grids is not None:
        tensors |= _list_constants(grids)
    table = _make_table(tensors)
    dtype = _DTYPES[rows.before.dtype]
    function(table, count, formats, elements, dtype, gradient_dtype, *dtype_grid)
    return sums.squeeze(1), extrema.squeeze(1)


def _make_results(rows: int, formats: int) -> tuple[Tensor, Tensor]:
    """Return memory for the sums and extrema of rows, float64 (rows, 1, columns)."""
    plain = len(ROW_SUMS) + len(ROW_SQUARES), len(ROW_MAXIMA) + len(ROW_MINIMA)
    by_format = (
        len(FORMAT_ROW_SUMS) + len(FORMAT_ROW_SQUARES),
        len(FORMAT_ROW_MAXIMA) + len(FORMAT_ROW_MINIMA),
    )
    sums, extrema = (
        torch.empty(rows, 1, one + formats * each, dtype=torch.float64, device="cpu")
        for one, each in zip(plain, by_format, strict=True)
    )
    return sums, extrema


def _list_constants(grids: Grids) -> dict[Place, Tensor]:
    """Return the constants of grids, and what some formats need beyond these."""
    tensors = {
        Place.EPS: grids.eps,
        Place.FIRST_SPACING: grids.first_spacing,
        Place.LAST_SPACING: grids.last_spacing,
        Place.TOP: grids.top,
        Place.CEILING: grids.ceiling,
        Place.SMALLEST_NORMAL: grids.smallest_normal,
    }
    if grids.scale is not None:
        tensors[Place.SCALE] = grids.scale
    if grids.without_subnormals or grids.without_mantissa:
        # As `native_kernel.Special`, for each format.
        specials = torch.zeros(1, grids.eps.shape[1], 3, dtype=torch.float64, device="cpu")
        for format, smallest_normal in grids.without_subnormals:
            specials[0, format, 0] = smallest_normal
        for format, bias in grids.without_mantissa:
            specials[0, format, 1:] = torch.tensor([1.0, bias], device="cpu")
        tensors[Place.SPECIALS] = specials
    return tensors


def _lay_side_by_side(x: Tensor) -> Tensor:
    """Return a tensor itself, or a copy if the elements of its rows do not lie side by side."""
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def _make_table(tensors: Mapping[Place, Tensor]) -> ctypes.Array[ctypes.c_int64]:
    """Return the address of each tensor, and its strides in bytes: see `native_table`.

    Args:
        tensors: Tensors (rows, formats, elements), of which dimensions may have the size 1, or of
            one dimension.
    """
    table = (ctypes.c_int64 * (4 * len(Place)))()
    for place, tensor in tensors.items():
        size, shape, strides = tensor.element_size(), tensor.shape, tensor.stride()
        table[4 * place] = tensor.data_ptr()
        if len(shape) == 3:
            for dimension in range(3):
                if shape[dimension] > 1:
                    table[4 * place + 1 + dimension] = strides[dimension] * size
    return table
