"""The native kernel: sum one step's weights and gradients by rows, one element after the other.

It computes what `kernel`, the eager kernel, computes, from the same numbers and by the same
formulas. Here each formula stands for one element, which is the easier form to read: w and v are
the weights before and after the step, g is the magnitude of the gradient, d = v − w is the update,
and Q rounds to the grid of a format.

numba compiles this file to machine code, in a process of its own: `native_code` starts that process
and loads the result. A training never imports this file. It imports no torch.

- A row is measured in blocks of 256 elements, whose numbers stay in the fastest cache. The first
  loop over a block needs no format; two more loops follow for each format.
- The loops have no branches, so that the compiler turns each into vector instructions, which take
  four elements at once. Loop lengths are multiples of 16: NaN, which counts as no element, fills
  the block up.
- All numbers of a block lie in one buffer. With several, the code would first have to check at each
  loop that they do not overlap, and it gives up vector instructions instead.

Read `kernel` first, which says what each sum is, and `native_bits`; `native_rounding` comes next.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
from numba import types

from altgrad.measurement.columns import (
    FORMAT_ROW_MAXIMA,
    FORMAT_ROW_SQUARES,
    FORMAT_ROW_SUMS,
    ROW_MAXIMA,
    ROW_MINIMA,
    ROW_SQUARES,
    ROW_SUMS,
)
from altgrad.measurement.histogram import FIRST_STEPS_OCTAVE, FIRST_WEIGHTS_OCTAVE, OCTAVES
from altgrad.measurement.native_bits import (
    OPTIONS,
    Pointer,
    add,
    binade,
    clamp,
    from_bits,
    get_bits,
    inline,
    invert,
    larger,
    pointer,
    smaller,
    widen,
)
from altgrad.measurement.native_table import BLOCK, COUNTERS, Dtype, Place
from altgrad.quantization.binary64 import (
    BIAS,
    JUST_BELOW_ONE,
    LARGEST,
    MANTISSA_BITS,
    ROUNDER,
)

_INF, _NAN = float("inf"), float("nan")
_SMALLEST_NORMAL = 2.0**-1022  # of float64

# Parts of the buffer of a block: numbers of each element, and the counters of histograms.
_W, _V, _G, _D, _LEFT_OUT, _STORED, _BIN, _SCALE = (BLOCK * part for part in range(8))

# Positions of groups of sums in a row of results, for one format and for several.
_LAYER_SUMS, _FORMAT_SUMS = len(ROW_SUMS), len(FORMAT_ROW_SUMS)
_LAYER_SQUARES, _FORMAT_SQUARES = len(ROW_SQUARES), len(FORMAT_ROW_SQUARES)
_LAYER_MAXIMA, _FORMAT_MAXIMA = len(ROW_MAXIMA), len(FORMAT_ROW_MAXIMA)
_LAYER_MINIMA = len(ROW_MINIMA)

# Numba takes plain integers, not members of an enumeration.
_BEFORE, _AFTER, _GRADIENT = int(Place.BEFORE), int(Place.AFTER), int(Place.GRADIENT)
_MOVED, _EFFECTIVE = int(Place.MOVED), int(Place.EFFECTIVE)
_EPS, _FIRST, _LAST = int(Place.EPS), int(Place.FIRST_SPACING), int(Place.LAST_SPACING)
_TOP, _CEILING, _NORMAL = int(Place.TOP), int(Place.CEILING), int(Place.SMALLEST_NORMAL)
_SCALES, _SPECIALS = int(Place.SCALE), int(Place.SPECIALS)
_ULPS_AT, _WEIGHTS_AT = int(Place.ULPS_AT), int(Place.WEIGHTS_AT)
_STEPS_AT, _COUNTS = int(Place.STEPS_AT), int(Place.COUNTS)
_SUMS, _EXTREMA = int(Place.SUMS), int(Place.EXTREMA)
_BLOCK, _COUNTERS = int(Place.BLOCK), int(Place.COUNTERS)
_FLOAT64, _FLOAT32 = int(Dtype.FLOAT64), int(Dtype.FLOAT32)
_FLOAT16, _BFLOAT16 = int(Dtype.FLOAT16), int(Dtype.BFLOAT16)


class Grid(NamedTuple):
    """The constants of a format under the scale of one row; see `altgrad.quantization.grids`."""

    eps: float
    first_spacing: float
    last_spacing: float
    top: float
    ceiling: float
    smallest_normal: float


class Special(NamedTuple):
    """The constants of a format that divides by a scale, or lacks subnormals or mantissa bits.

    Attributes:
        smallest_normal: The smallest normal number of a format without subnormals, otherwise 0.
        no_mantissa: 1 for a format without mantissa bits, otherwise 0.
        bias: Bias of the exponent field of a format without mantissa bits.
    """

    smallest_normal: float
    no_mantissa: int
    bias: int


@inline
def _find_bin(magnitude: float, first: int) -> float:
    """Return the octave of a magnitude, 0 to 63 from 2**first up, as the bits of a float64."""
    lowest = first + BIAS
    least = from_bits(lowest << MANTISSA_BITS)
    most = from_bits((lowest + OCTAVES - 1) << MANTISSA_BITS)
    return from_bits((get_bits(clamp(magnitude, least, most)) >> MANTISSA_BITS) - lowest)


# --- the grid of a format


@inline
def _find_spacing(x: float, grid: Grid, special: Special | None) -> float:
    """Return the distance between neighbouring grid points at x."""
    spacing = larger(binade(x) * grid.eps, grid.first_spacing)
    if special is not None:
        spacing = special.smallest_normal if abs(x) < special.smallest_normal else spacing
    return spacing


@inline
def _round_to_grid(x: float, spacing: float, special: Special | None) -> float:
    """Return the multiple of the spacing that is nearest to x; ties go to the even one.

    Without mantissa bits they go to the even code, whose last bit is that of the exponent field.
    """
    rounder = ROUNDER * spacing
    rounded = (x + rounder) - rounder
    if special is not None:
        exponent = (get_bits(spacing) >> MANTISSA_BITS) - BIAS
        is_even = ((exponent + special.bias) & 1) == 0
        to_below = (special.no_mantissa != 0) & is_even & (abs(x) == 1.5 * spacing)
        below = -spacing if x < 0 else spacing
        rounded = below if to_below else rounded
    return rounded


@inline
def _find_gap(stored: float, target_spacing: float, grid: Grid, special: Special | None) -> float:
    """Return how far a stored value is from the next one on the side of the target."""
    gap = clamp(binade(stored) * grid.eps, grid.first_spacing, target_spacing)
    if special is not None:
        least = special.smallest_normal
        from_zero = (least > 0) & (abs(stored) <= least) & (target_spacing >= least)
        gap = least if from_zero else gap
    return gap


# --- one block of elements


@inline
def _load(block: Pointer, part: int, address: int, start: int, count: int, dtype: int) -> None:
    """Load numbers of any dtype into a part of the block; 0 if the address is 0."""
    if address == 0:
        for i in range(count):
            block[part + i] = 0.0
    elif dtype == _FLOAT64:
        doubles = pointer(address, numba.float64)
        for i in range(count):
            block[part + i] = doubles[start + i]
    elif dtype == _FLOAT32:
        floats = pointer(address, numba.float32)
        for i in range(count):
            block[part + i] = floats[start + i]
    elif dtype == _BFLOAT16:
        halves = pointer(address, numba.uint16)
        for i in range(count):  # a bfloat16 is the upper half of a float32
            block[part + i] = widen(numba.uint32(halves[start + i]) << numba.uint32(16))
    else:
        # A float16 is s eeeee mmmmmmmmmm. Shifted by 42 bits, its exponent and mantissa are those
        # of a float64 whose bias is 15 instead of 1023.
        codes = pointer(address, numba.uint16)
        for i in range(count):
            code = numba.int64(codes[start + i])
            exponent, mantissa = code & 0x7C00, code & 0x03FF
            size = from_bits(((code & 0x7FFF) << 42) + ((BIAS - 15) << MANTISSA_BITS))
            size = mantissa * 2.0**-24 if exponent == 0 else size  # subnormal
            size = _NAN if exponent == 0x7C00 else size  # inf or NaN
            block[part + i] = -size if code & 0x8000 else size


@inline
def _count_bins(block: Pointer, count: int, counters: Pointer, at: int) -> None:
    """Count the bins of a block's elements.

    Four elements in turn have counters of their own. One counter could only be raised again once it
    was written, and most elements are in few bins.
    """
    fours = count // 4 * 4
    for i in range(0, fours, 4):
        for lane in range(4):
            counters[at + lane * OCTAVES + get_bits(block[_BIN + i + lane])] += 1
    for i in range(fours, count):
        counters[at + get_bits(block[_BIN + i])] += 1


@inline
def _fold_flags(address: int, block: Pointer, part: int, count: int, otherwise: int) -> int:
    """Set the flags of elements whose number is not 0, and count the flags that are set.

    Args:
        address: Address of the flags; 0 without flags.
        block: The numbers of up to 256 elements.
        part: The numbers of the elements in the block.
        count: Number of elements.
        otherwise: The result without flags.

    Returns:
        Number of flags that are set.
    """
    if address == 0:
        return otherwise
    flags = pointer(address, numba.uint8)
    found = 0
    for i in range(count):
        flag = flags[i] | numba.uint8(block[part + i] != 0)
        flags[i] = flag
        found += flag
    return found


@inline
def _sum_layer(
    block: Pointer,
    length: int,
    dtype_grid: tuple[float, float],
    counters: Pointer,
    count: int,
    flags: int,
    has_gradient: int,
) -> tuple[Any, Any, Any]:
    """Sum what needs no format. Leave w, v, g and d in the block, 0 for elements that are left out.

    An element is left out if w, v or g is not finite, or too large to compute with.

    Args:
        block: The numbers of up to 256 elements.
        length: Number of elements, rounded up.
        dtype_grid: As in `kernel.row_sums`.
        counters: Counters of all histograms.
        count: Number of elements.
        flags: Address of the flags of elements that have moved so far; 0 without flags.
        has_gradient: Whether there is a gradient.

    Returns:
        Sums in the order of ROW_SUMS and ROW_SQUARES, and maxima and minima as bits.
    """
    finite = nonzero_weights = moved = nonzero_gradients = moved_with_gradient = 0
    paired_gradient = weight_sq = update_sq = update_4th = gradient_sq = paired_sq = 0.0
    most_gradient, least_gradient = 0, get_bits(_INF)
    for i in range(length):
        w, v, g = block[_W + i], block[_V + i], block[_G + i]
        valid = (abs(w) < LARGEST) & (abs(v) < LARGEST) & (abs(g) < LARGEST)  # False for NaN
        w = w if valid else 0.0
        v = v if valid else 0.0
        g = abs(g) if valid else 0.0
        d = v - w
        block[_W + i], block[_V + i], block[_G + i], block[_D + i] = w, v, g, d
        block[_LEFT_OUT + i] = 0.0 if valid else _INF
        block[_BIN + i] = _find_bin(abs(w), FIRST_WEIGHTS_OCTAVE)

        finite += valid
        nonzero_weights += w != 0
        moved += d != 0
        nonzero_gradients += g != 0
        moved_with_gradient += (d != 0) & (g != 0)
        weight_sq = add(weight_sq, w * w)
        update_sq = add(update_sq, d * d)
        update_4th = add(update_4th, (d * d) * (d * d))
        gradient_sq = add(gradient_sq, g * g)
        # g is paired with the stiffness where w ≠ 0, for the correlation of the two.
        pair = g if w != 0 else 0.0
        paired_gradient = add(paired_gradient, pair)
        paired_sq = add(paired_sq, pair * pair)
        most_gradient = larger(most_gradient, get_bits(pair))
        least_gradient = smaller(least_gradient, get_bits(g if w != 0 else _INF))
    _count_bins(block, count, counters, COUNTERS)

    eps, smallest_normal = dtype_grid
    ulps_sum, most_ulps = 0.0, 0
    for i in range(length):
        w, v, d = block[_W + i], block[_V + i], block[_D + i]
        # The unit in the last place is the spacing of the dtype just below max(|w|, |v|).
        unit = larger(binade(larger(abs(w), abs(v)) * JUST_BELOW_ONE), smallest_normal)
        ulps = abs(d) * invert(unit) * (1 / eps)
        ulps_sum = add(ulps_sum, ulps)
        most_ulps = larger(most_ulps, get_bits(ulps))
        block[_BIN + i] = _find_bin(ulps, 0)
    _count_bins(block, count, counters, 0)
    ever_moved = _fold_flags(flags, block, _D, count, moved)
    gradients = finite if has_gradient else 0
    return (
        (
            *(float(finite), float(nonzero_weights), float(moved), float(ever_moved), ulps_sum),
            *(float(gradients), float(nonzero_gradients), float(moved_with_gradient)),
            paired_gradient,
        ),
        (weight_sq, update_sq, update_4th, gradient_sq, paired_sq),
        (most_ulps, most_gradient, least_gradient),
    )


@inline
def _sum_stiffness(
    block: Pointer, length: int, grid: Grid, special: Special | None
) -> tuple[Any, Any, Any]:
    """Sum what follows from the stiffness, the grid's spacing at w. Leave Q(w) and bins in `block`.

    Args:
        block: The numbers of up to 256 elements, as `_sum_layer` leaves them.
        length: Number of elements, rounded up.
        grid: The constants of the format.
        special: As in `_sum_format`.

    Returns:
        Counts, sums, and the maximum and minimum as bits.
    """
    saturated = stored_normal = stored_nonzero = gradient_below = 0
    stiffness_sum = stiffness_gradient = gradient_per_stiffness = stiffness_sq = 0.0
    most, least = 0, get_bits(_INF)
    for i in range(length):
        w, g, d = block[_W + i], block[_G + i], block[_D + i]
        scale = 1.0 if special is None else block[_SCALE + i]
        x = w if special is None else w / scale
        spacing = _find_spacing(x, grid, special)
        stored = _round_to_grid(x, spacing, special)  # goes on beyond the top
        block[_STORED + i] = stored
        saturated += abs(stored) > grid.top
        stored_normal += abs(stored) >= grid.smallest_normal
        stored_nonzero += stored != 0

        stiffness = smaller(spacing, grid.last_spacing) * scale
        per_stiffness = invert(stiffness) if special is None else 1 / stiffness
        block[_BIN + i] = _find_bin(abs(d) * per_stiffness, FIRST_STEPS_OCTAVE)
        pair = g if w != 0 else 0.0
        weight_stiffness = stiffness if w != 0 else 0.0
        stiffness_sum = add(stiffness_sum, weight_stiffness)
        stiffness_sq = add(stiffness_sq, weight_stiffness * weight_stiffness)
        stiffness_gradient = add(stiffness_gradient, stiffness * pair)
        gradient_per_stiffness = add(gradient_per_stiffness, pair * per_stiffness)
        gradient_below += (w != 0) & (g < stiffness)
        most = larger(most, get_bits(weight_stiffness))
        least = smaller(least, get_bits(stiffness if w != 0 else _INF))
    return (
        (saturated, stored_normal, stored_nonzero, gradient_below),
        (stiffness_sum, stiffness_gradient, gradient_per_stiffness, stiffness_sq),
        (most, least),
    )


@inline
def _sum_updates(
    block: Pointer, length: int, grid: Grid, special: Special | None
) -> tuple[Any, Any, Any]:
    """Sum what the grid keeps of weights and updates. Leave the effective updates in `block`.

    Args:
        block: The numbers of up to 256 elements, as `_sum_stiffness` leaves them.
        length: Number of elements, rounded up.
        grid: The constants of the format.
        special: As in `_sum_format`.

    Returns:
        Counts, sums, and the maximum and minimum as bits.
    """
    off_grid = visible = effective_count = 0
    grid_error = grid_error_sq = kept = kept_update_cubed = kept_sq = lost_sq = 0.0
    stochastic_move = stochastic_variance = 0.0
    most, least = 0, get_bits(_INF)
    for i in range(length):
        w, v, d, stored = block[_W + i], block[_V + i], block[_D + i], block[_STORED + i]
        scale = 1.0 if special is None else block[_SCALE + i]
        # An update is visible if casts to the format differ before and after it: Q(v) ≠ Q(w).
        y = v if special is None else v / scale
        shown = _round_to_grid(y, _find_spacing(y, grid, special), special)
        shown = clamp(shown, -grid.ceiling, grid.ceiling)
        stored = clamp(stored, -grid.ceiling, grid.ceiling)
        visible += shown != stored

        stored = clamp(stored, -grid.top, grid.top)
        error = abs(w - stored * scale)
        grid_error = add(grid_error, error)
        grid_error_sq = add(grid_error_sq, error * error)
        off_grid += error != 0
        most = larger(most, get_bits(error))
        least = smaller(least, get_bits(larger(error, block[_LEFT_OUT + i])))

        # The effective update Q(Q(w) + d) − Q(w): how far d moves a weight kept on the grid.
        target = stored + d if special is None else (stored * scale + d) / scale
        target = clamp(target, -grid.ceiling, grid.ceiling)
        spacing = _find_spacing(target, grid, special)
        updated = _round_to_grid(target, spacing, special)
        rest, moved = target - updated, updated - stored
        # Stochastic rounding takes the target to one of the two points around it.
        gap = _find_gap(stored, spacing, grid, special)
        distance = abs(rest + moved)
        probability = distance * invert(gap) if special is None else distance / gap
        stochastic_move = add(stochastic_move, smaller(probability, 1.0))
        variance = abs(spacing * rest) - rest * rest
        stochastic_variance = add(stochastic_variance, variance * scale * scale)

        effective = moved * scale
        block[_STORED + i] = effective
        effective_count += effective != 0
        kept = add(kept, effective * d)
        kept_sq = add(kept_sq, (effective * d) * (effective * d))
        kept_update_cubed = add(kept_update_cubed, effective * (d * d * d))
        lost_sq = add(lost_sq, (effective - d) * (effective - d))
    return (
        (off_grid, visible, effective_count),
        (
            *(grid_error, grid_error_sq, kept, kept_update_cubed, kept_sq, lost_sq),
            *(stochastic_move, stochastic_variance),
        ),
        (most, least),
    )


@inline
def _sum_format(
    block: Pointer,
    length: int,
    grid: Grid,
    special: Special | None,
    counters: Pointer,
    at: int,
    count: int,
    flags: int,
) -> tuple[Any, Any, Any]:
    """Sum what needs a format.

    Args:
        block: The numbers of up to 256 elements, as `_sum_layer` leaves them.
        length: Number of elements, rounded up.
        grid: The constants of the format.
        special: None for most formats. Then all spacings are powers of two in the range of
            `invert`, and the constants are multiplied by the scale.
        counters: Counters of all histograms.
        at: Position of the counters of this format's histogram.
        count: Number of elements.
        flags: Address of the flags of elements of which the format has kept an update so far; 0
            without flags.

    Returns:
        Sums in the order of FORMAT_ROW_SUMS and FORMAT_ROW_SQUARES, and maxima and minima as bits.
    """
    counts, sums, stiffness_ends = _sum_stiffness(block, length, grid, special)
    saturated, stored_normal, stored_nonzero, gradient_below = counts
    stiffness, stiffness_gradient, gradient_per_stiffness, stiffness_sq = sums
    _count_bins(block, count, counters, at)
    (off_grid, visible, effective), update_sums, error_ends = _sum_updates(
        block, length, grid, special
    )
    grid_error, grid_error_sq, kept, cubed, kept_sq, lost_sq, move, variance = update_sums
    ever_effective = _fold_flags(flags, block, _STORED, count, effective)
    return (
        (
            *(stiffness, stiffness_gradient, gradient_per_stiffness, float(gradient_below)),
            *(grid_error, float(off_grid), float(stored_nonzero), float(stored_normal)),
            *(float(saturated), float(visible), float(effective), float(ever_effective)),
            *(kept, cubed, move, variance),
        ),
        (stiffness_sq, grid_error_sq, kept_sq, lost_sq),
        (error_ends[0], stiffness_ends[0], error_ends[1], stiffness_ends[1]),
    )


# --- rows


@inline
def _find_address(table: Pointer, place: int, row: int, format: int) -> int:
    """Return the address of a tensor's first element in a row, for one format; 0 if missing."""
    at = 4 * place
    if table[at] == 0:
        return 0
    return table[at] + row * table[at + 1] + format * table[at + 2]


@inline
def _read(table: Pointer, place: int, row: int, format: int) -> float:
    return pointer(_find_address(table, place, row, format), numba.float64)[0]


@inline
def _read_int(table: Pointer, place: int, row: int, format: int) -> int:
    return pointer(_find_address(table, place, row, format), numba.int64)[0]


@inline
def _read_grid(table: Pointer, row: int, format: int) -> Grid:
    return Grid(
        _read(table, _EPS, row, format),
        _read(table, _FIRST, row, format),
        _read(table, _LAST, row, format),
        _read(table, _TOP, row, format),
        _read(table, _CEILING, row, format),
        _read(table, _NORMAL, row, format),
    )


@inline
def _read_special(table: Pointer, format: int) -> Special:
    address = _find_address(table, _SPECIALS, 0, format)
    if address == 0:
        return Special(0.0, 0, 0)
    specials = pointer(address, numba.float64)
    return Special(specials[0], int(specials[1]), int(specials[2]))


@inline
def _load_scale(
    block: Pointer, table: Pointer, row: int, format: int, start: int, count: int, length: int
) -> None:
    """Load the scale of each element of a block; 1 if the constants are multiplied by it."""
    address = _find_address(table, _SCALES, row, format)
    stride = table[4 * _SCALES + 3] // 8
    for i in range(length):
        block[_SCALE + i] = 1.0
    if address != 0:
        scales = pointer(address, numba.float64)
        for i in range(count):
            block[_SCALE + i] = scales[(start + i) * stride]


@inline
def _keep_layer(sums: Pointer, extrema: Pointer, formats: int, found: tuple[Any, Any, Any]) -> None:
    """Add the sums of a block that need no format to those of its row, and keep the extrema."""
    plain, squares, ends = found
    for k in range(_LAYER_SUMS):
        sums[k] += plain[k]
    at = _LAYER_SUMS + formats * _FORMAT_SUMS
    for k in range(_LAYER_SQUARES):
        sums[at + k] += squares[k]
    for k in range(_LAYER_MAXIMA):
        extrema[k] = larger(extrema[k], from_bits(ends[k]))
    at = _LAYER_MAXIMA + formats * _FORMAT_MAXIMA
    for k in range(_LAYER_MINIMA):
        extrema[at + k] = larger(extrema[at + k], -from_bits(ends[_LAYER_MAXIMA + k]))


@inline
def _keep_format(
    sums: Pointer, extrema: Pointer, formats: int, format: int, found: tuple[Any, Any, Any]
) -> None:
    """Add the sums of a block for one format to those of its row, and keep the extrema."""
    plain, squares, ends = found
    at = _LAYER_SUMS + format
    for k in range(_FORMAT_SUMS):
        sums[at + k * formats] += plain[k]
    at += formats * _FORMAT_SUMS + _LAYER_SQUARES
    for k in range(_FORMAT_SQUARES):
        sums[at + k * formats] += squares[k]
    at = _LAYER_MAXIMA + format
    for k in range(_FORMAT_MAXIMA):
        extrema[at + k * formats] = larger(extrema[at + k * formats], from_bits(ends[k]))
    at += formats * _FORMAT_MAXIMA + _LAYER_MINIMA
    for k in range(_FORMAT_MAXIMA):
        least = -from_bits(ends[_FORMAT_MAXIMA + k])
        extrema[at + k * formats] = larger(extrema[at + k * formats], least)


@inline
def _flush_counters(table: Pointer, counters: Pointer, formats: int, row: int) -> None:
    """Add the counters to the histograms of a row's layer, and set them to 0."""
    counts = pointer(table[4 * _COUNTS], numba.float64)
    for histogram in range(2 + formats):
        if histogram == 0:
            first = _read_int(table, _ULPS_AT, row, 0) + BIAS
        elif histogram == 1:
            first = _read_int(table, _WEIGHTS_AT, row, 0) + BIAS + FIRST_WEIGHTS_OCTAVE
        else:
            first = _read_int(table, _STEPS_AT, row, histogram - 2) + BIAS + FIRST_STEPS_OCTAVE
        for bin in range(OCTAVES):
            at = histogram * COUNTERS + bin
            lanes = counters[at] + counters[at + OCTAVES]
            lanes += counters[at + 2 * OCTAVES] + counters[at + 3 * OCTAVES]
            counts[first + bin] += lanes
    _clear_counters(counters, formats)


@inline
def _clear_counters(counters: Pointer, formats: int) -> None:
    for i in range((2 + formats) * COUNTERS):
        counters[i] = 0


def row_sums(
    table: Pointer,
    rows: int,
    formats: int,
    elements: int,
    dtype: int,
    gradient_dtype: int,
    eps: float,
    smallest_normal: float,
) -> None:
    """Compute all sums and extrema of each row of elements: `kernel.row_sums`, for the CPU.

    Args:
        table: Addresses and strides of all tensors, see `native_table`.
        rows: Number of rows.
        formats: Number of formats.
        elements: Number of elements in a row.
        dtype: Dtype of the weights, see `native_table.Dtype`.
        gradient_dtype: Dtype of the gradient.
        eps: 2**-M for M mantissa bits of the dtype in which the weights are stored.
        smallest_normal: The smallest normal number of this dtype.
    """
    block = pointer(table[4 * _BLOCK], numba.float64)
    counters = pointer(table[4 * _COUNTERS], numba.int64)
    _clear_counters(counters, formats)
    for row in range(rows):
        # The counters are those of one layer, which mostly has several rows in sequence.
        if row > 0 and _read_int(table, _ULPS_AT, row, 0) != _read_int(table, _ULPS_AT, row - 1, 0):
            _flush_counters(table, counters, formats, row - 1)
        sums = pointer(_find_address(table, _SUMS, row, 0), numba.float64)
        extrema = pointer(_find_address(table, _EXTREMA, row, 0), numba.float64)
        for k in range(_LAYER_SUMS + _LAYER_SQUARES + formats * (_FORMAT_SUMS + _FORMAT_SQUARES)):
            sums[k] = 0.0
        for k in range(_LAYER_MAXIMA + _LAYER_MINIMA + 2 * formats * _FORMAT_MAXIMA):
            extrema[k] = -_INF
        gradient = _find_address(table, _GRADIENT, row, 0)
        flags = _find_address(table, _MOVED, row, 0)
        for start in range(0, elements, BLOCK):
            count = smaller(elements - start, BLOCK)
            length = (count + 15) // 16 * 16
            _load(block, _W, _find_address(table, _BEFORE, row, 0), start, count, dtype)
            _load(block, _V, _find_address(table, _AFTER, row, 0), start, count, dtype)
            _load(block, _G, gradient, start, count, gradient_dtype)
            for i in range(count, length):
                block[_W + i] = _NAN
            found = _sum_layer(
                block,
                length,
                (eps, smallest_normal),
                counters,
                count,
                flags + start if flags != 0 else 0,
                gradient != 0,
            )
            _keep_layer(sums, extrema, formats, found)
            for format in range(formats):
                _sum_for_format(
                    table,
                    row,
                    format,
                    formats,
                    start,
                    count,
                    length,
                    block,
                    counters,
                    sums,
                    extrema,
                )
    if rows > 0:
        _flush_counters(table, counters, formats, rows - 1)


@inline
def _sum_for_format(
    table: Pointer,
    row: int,
    format: int,
    formats: int,
    start: int,
    count: int,
    length: int,
    block: Pointer,
    counters: Pointer,
    sums: Pointer,
    extrema: Pointer,
) -> None:
    """Sum a block for one format, by the fast way if the format has no special needs."""
    grid = _read_grid(table, row, format)
    flags = _find_address(table, _EFFECTIVE, row, format)
    flags = flags + start if flags != 0 else 0
    at = (2 + format) * COUNTERS
    is_special = (table[4 * _SCALES] != 0) | (table[4 * _SPECIALS] != 0)
    if is_special or grid.first_spacing < _SMALLEST_NORMAL:  # too small for `invert`
        _load_scale(block, table, row, format, start, count, length)
        special = _read_special(table, format)
        found = _sum_format(block, length, grid, special, counters, at, count, flags)
        _keep_format(sums, extrema, formats, format, found)
    else:
        found = _sum_format(block, length, grid, None, counters, at, count, flags)
        _keep_format(sums, extrema, formats, format, found)


def make_assembly() -> tuple[str, str]:
    """Compile `row_sums` for this processor.

    Returns:
        The code in LLVM's assembly language, and the name of the function in it.
    """
    number, real = types.int64, types.float64
    signature = types.void(types.CPointer(number), *[number] * 5, real, real)
    compiled = numba.cfunc(signature, **OPTIONS)(row_sums)
    return compiled.inspect_llvm(), compiled.native_name
