"""The table of addresses by which the native kernel reads tensors and writes its results.

The table is int64 (places, 4): for each tensor the address of its first number, and the bytes from
one row, format and element to the next. Strides are 0 where a tensor has one number for all, and
an address of 0 stands for a tensor that is missing.

This file imports no torch: the process that compiles the kernel starts fast. Read `kernel` first;
`native_kernel` comes next and reads the table, and `native_rows` fills it.
"""

from __future__ import annotations

from enum import IntEnum

from altgrad.measurement.histogram import OCTAVES

BLOCK = 256
"""Number of elements that are measured at a time."""
BLOCK_PARTS = 8
"""Number of float64 numbers that the kernel keeps of each element of a block."""
COUNTERS = 4 * OCTAVES
"""Number of counters of a histogram: four for each bin."""


class Place(IntEnum):
    """A tensor's row in the table. The names are those of `kernel.Rows`, `Grids` and so on."""

    BEFORE = 0
    AFTER = 1
    GRADIENT = 2
    MOVED = 3
    EFFECTIVE = 4
    EPS = 5
    FIRST_SPACING = 6
    LAST_SPACING = 7
    TOP = 8
    CEILING = 9
    SMALLEST_NORMAL = 10
    SCALE = 11
    SPECIALS = 12
    ULPS_AT = 13
    WEIGHTS_AT = 14
    STEPS_AT = 15
    COUNTS = 16
    SUMS = 17
    EXTREMA = 18
    BLOCK = 19
    COUNTERS = 20


class Dtype(IntEnum):
    """A dtype of weights or gradients."""

    FLOAT64 = 0
    FLOAT32 = 1
    FLOAT16 = 2
    BFLOAT16 = 3
