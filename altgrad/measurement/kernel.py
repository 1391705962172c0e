"""The numeric kernel: sum one step's weights and gradients by rows, for every format at once.

A row holds elements of one layer, side by side along the last dimension. A small layer has a few
rows, the last one padded with NaN; a chunk of a large layer is one row.

Notation: w and v are the weights before and after the step, d = v − w is the update, Q rounds to
the grid of a format, and the stiffness is the spacing of the grid at w.

All arithmetic is float64. One operation serves all rows and all formats by broadcasting::

    shared      (rows, 1, elements)         weights, gradient, update, and what follows from them
    per_format  (rows, formats, elements)   rounded weights, stiffness, errors
    sums        (rows, 1 or formats)        each the sum over the elements of a row

No memory is allocated for elements: every operation writes into a buffer of `workspace` (``out=``),
and buffers are reused as soon as their quantity is summed. Comments say what a buffer holds.

Read `columns` first, which names the sums; `totals` comes next and adds rows up to layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

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
from altgrad.measurement.histogram import (
    FIRST_STEPS_OCTAVE,
    FIRST_WEIGHTS_OCTAVE,
    OCTAVES,
)
from altgrad.measurement.workspace import Buffers
from altgrad.quantization.binary64 import BIAS, JUST_BELOW_ONE, LARGEST, MANTISSA_BITS
from altgrad.quantization.grids import (
    Grids,
    compute_gaps,
    extract_binades,
    round_to_grids,
    view_bits,
)

# The order of the results. A name of FORMAT_… stands for one result per format, side by side. Sums
# of squares are computed as norms, which torch does in one pass, and all squared at the end.
_SUMS = (*ROW_SUMS, *FORMAT_ROW_SUMS, *ROW_SQUARES, *FORMAT_ROW_SQUARES)
_EXTREMA = (
    *(f"max {name}" for name in (*ROW_MAXIMA, *FORMAT_ROW_MAXIMA)),
    *(f"min {name}" for name in (*ROW_MINIMA, *FORMAT_ROW_MINIMA)),
)


class Rows(NamedTuple):
    """The elements to measure in rows, each of one layer, in any floating-point dtype.

    Attributes:
        before: Weights before the step, (rows, 1, elements). NaN is padding, in rows that are not
            full.
        after: Weights after the step, (rows, 1, elements).
        gradient: The gradient as the optimizer applied it, (rows, 1, elements). None if there is no
            gradient.
        together: `before`, `after` and `gradient` as one tensor, (rows, 3, elements), so that one
            operation copies all three. None unless they lie side by side in memory, in one dtype.
    """

    before: Tensor
    after: Tensor
    gradient: Tensor | None
    together: Tensor | None = None


class EverMoved(NamedTuple):
    """The flags that say whether each element has moved, in this or an earlier observed step.

    Attributes:
        moved: True if the element has had an update other than 0, bool (rows, 1, elements).
        effective: True if the element has had an update of which the format's grid keeps a part,
            bool (rows, formats, elements).
    """

    moved: Tensor
    effective: Tensor


class Histograms(NamedTuple):
    """The histograms of all layers by octave (power of two), and where the bins of each row begin.

    A layer has a histogram of abs(update) in ULPs, one of abs(weight), and for each format one of
    abs(update) / stiffness, the grid spacing, which is called ``steps``. Each has 64 bins. The bin
    of a value is ``offset + biased exponent of the value``: an addition finds it, without a table.

    Attributes:
        counts: All bins, float64 (layers · (2 + formats) · 64). The histograms of a layer follow
            each other: ULPs, weights, then the steps of each format.
        ulps_at: Offset of the histogram of ULPs for each row, int64 (rows, 1, 1).
        weights_at: Offset of the histogram of weights for each row, int64 (rows, 1, 1).
        steps_at: Offset of the histogram of steps for each row and format, int64 (rows, formats,
            1).
        ones: Increments of the counts, float64, at least one for each element and format.
    """

    counts: Tensor
    ulps_at: Tensor
    weights_at: Tensor
    steps_at: Tensor
    ones: Tensor


def row_sums(
    rows: Rows,
    grids: Grids | None,
    dtype_grid: tuple[float, float],
    buffers: Buffers,
    histograms: Histograms,
    ever: EverMoved | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute all sums and extrema of each row of elements, without a format and for each format.

    Args:
        rows: Weights and gradients of the elements; they are not changed.
        grids: The grids of the formats, numbers that each can store, under the scales of each row.
            None without formats.
        dtype_grid: 2**-M for M mantissa bits, and the smallest normal number, of the dtype in which
            the weights are stored.
        buffers: Memory for the same number of rows, formats and elements; overwritten.
        histograms: Counts of elements by octave (power of two); updated in place.
        ever: Flags that say which elements have moved so far, and for which formats effectively;
            updated in place. None if never_moved_frac is not measured.

    Returns:
        Sums, float64 (rows, sums), in the order of the names in `altgrad.measurement.columns`:
        ROW_SUMS, FORMAT_ROW_SUMS (each for all formats), ROW_SQUARES and FORMAT_ROW_SQUARES. And
        extrema, float64 (rows, extrema): ROW_MAXIMA, FORMAT_ROW_MAXIMA, then ROW_MINIMA and
        FORMAT_ROW_MINIMA, which are negated.
    """
    found = _layer_sums(rows, dtype_grid, buffers, histograms, ever)
    formats = 0
    if grids is not None:
        formats = grids.eps.shape[1]
        found |= _format_sums(grids, buffers, histograms, ever)
    sums = torch.cat([found[name] for name in _SUMS if name in found], dim=1)
    sums[:, -(len(ROW_SQUARES) + formats * len(FORMAT_ROW_SQUARES)) :].square_()
    extrema = torch.cat([found[name] for name in _EXTREMA if name in found], dim=1)
    extrema[:, -(len(ROW_MINIMA) + formats * len(FORMAT_ROW_MINIMA)) :].neg_()
    return sums, extrema


def _layer_sums(
    rows: Rows,
    dtype_grid: tuple[float, float],
    buffers: Buffers,
    histograms: Histograms,
    ever: EverMoved | None,
) -> dict[str, Tensor]:
    """Compute the sums and extrema of each row of elements that do not depend on a format.

    `_format_sums` goes on with the weights, updates and gradients that this function leaves in
    `buffers`. There the weight before, the weight after and the gradient of an element are all 0 if
    one of the three is not finite.

    Args:
        rows: Weights and gradients of the elements; they are not changed.
        dtype_grid: 2**-M for M mantissa bits, and the smallest normal number, of the dtype in which
            the weights are stored.
        buffers: Memory for the rows; overwritten.
        histograms: Counts of elements by octave (power of two); updated in place.
        ever: Flags that say which elements have moved so far, and for which formats effectively;
            updated in place. None if never_moved_frac is not measured.

    Returns:
        Sums, norms and extrema by name, float64 (rows, 1).
    """
    # The buffers by name:
    #   w, v        weights before and after the step
    #   size        |w|
    #   s           |v|, then reused
    #   t           the gradient, then reused
    #   gradient    |gradient|
    #   update      |d|
    #   no_value    inf for an element that is left out, otherwise 0
    #   no_weight   inf if w = 0, otherwise 0; first, memory to count octaves in
    # Adding an inf of these two, or taking the larger, keeps the element out of a minimum.
    w, v, t, size, s, gradient, update, no_value, no_weight, pair_least = buffers.shared
    has_weight, pair, d, d_cubed = buffers.stacked

    # A condition is stored as 1.0 or 0.0 in a float64 buffer: a bool tensor takes five times as
    # long to sum.
    _copy_values(rows, buffers)
    sizes = torch.abs(buffers.values, out=buffers.sizes)
    # The largest of |w|, |v| and |gradient| is NaN if one of them is NaN, and NaN < LARGEST is
    # False: one comparison finds NaN, inf and numbers too large to compute with.
    valid = torch.amax(sizes, 1, keepdim=True, out=update).lt_(LARGEST)
    finite = valid.sum(-1)
    torch.reciprocal(valid, out=no_value).sub_(1)  # 1/1 − 1 = 0 if valid, 1/0 − 1 = inf if not
    torch.abs(buffers.values.masked_fill_(torch.ne(valid, 1), 0), out=sizes)
    _count_octaves(size, FIRST_WEIGHTS_OCTAVE, update, histograms, "weights_at")

    torch.sub(v, w, out=d)
    torch.abs(d, out=update)
    larger = torch.maximum(size, s, out=s)  # of |w| and |v|
    # The unit in the last place (ULP) is the dtype's spacing just below max(|w|, |v|). Below a
    # power of two the spacing is half of that above: JUST_BELOW_ONE moves a power of two into the
    # binade below. The update is divided by the binade, and then by eps: the product of the two may
    # be subnormal in float64, and a processor may flush subnormal numbers to 0.
    eps, smallest_normal = dtype_grid
    binade = extract_binades(larger.mul_(JUST_BELOW_ONE), t).clamp_(min=smallest_normal)
    ulps = torch.div(update, binade, out=t).mul_(1 / eps)  # overwrites the binade, elementwise
    ulps_sum, ulps_max = ulps.sum(-1), ulps.amax(-1)
    _count_octaves(ulps, 0, no_weight, histograms, "ulps_at")

    moved = torch.ne(update, 0, out=s)  # s held |v|, which is no longer needed
    moved_sum = moved.sum(-1)
    ever_moved = moved_sum if ever is None else ever.moved.logical_or_(moved).sum(-1)
    has_gradient = torch.ne(gradient, 0, out=t)
    gradient_sum = has_gradient.sum(-1)
    # In place: t holds "has a gradient other than 0, and moved" from here on.
    both_sum = has_gradient.mul_(moved).sum(-1)
    torch.ne(size, 0, out=has_weight)
    # |gradient| is paired with the stiffness where w ≠ 0, for the correlation of the two. Where
    # w = 0, `pair` is 0, for sums and maxima, and `pair_least` is inf, for minima.
    torch.mul(gradient, has_weight, out=pair)
    torch.reciprocal(has_weight, out=no_weight).sub_(1)
    torch.add(gradient, no_weight, out=pair_least)
    d_squared = torch.mul(d, d, out=s)
    torch.mul(d_squared, d, out=d_cubed)
    return {
        "finite": finite,
        "nonzero_weights": has_weight.sum(-1),
        "moved": moved_sum,
        "ever_moved": ever_moved,
        "ulps": ulps_sum,
        "gradients": torch.zeros_like(finite) if rows.gradient is None else finite,
        "nonzero_gradients": gradient_sum,
        "moved_with_gradient": both_sum,
        "paired_gradient_abs": pair.sum(-1),
        "weight_sq": vector_norm(w, dim=-1),
        "update_sq": vector_norm(d, dim=-1),
        "update_4th": vector_norm(d_squared, dim=-1),
        "gradient_sq": vector_norm(gradient, dim=-1),
        "paired_gradient_sq": vector_norm(pair, dim=-1),
        "max ulps": ulps_max,
        "max paired_gradient_abs": pair.amax(-1),
        "min paired_gradient_abs": pair_least.amin(-1),
    }


def _format_sums(
    grids: Grids, buffers: Buffers, histograms: Histograms, ever: EverMoved | None
) -> dict[str, Tensor]:
    """Compute the sums and extrema of each row of elements that depend on a number format.

    Args:
        grids: The grids of the formats, numbers that each can store, under the scales of each row.
        buffers: Memory that `_layer_sums` has filled with weights, updates and gradients;
            overwritten.
        histograms: Counts of elements by octave (power of two); updated in place.
        ever: Flags that say which elements have moved so far, and for which formats effectively;
            updated in place. None if never_moved_frac is not measured.

    Returns:
        Sums, norms and extrema by name, float64 (rows, formats).
    """
    # Of the shared buffers, t alone is free to write to. Of the four buffers per format:
    #   a  short-lived: a quantity is computed into it, summed, and overwritten by the next
    #   b  stiffness, then |d| / stiffness, then spacings
    #   c  Q(w), from its rounding on, then the gap between Q(w) and its neighbour
    #   e  |Q(w)|, then Q(v), then Q(Q(w) + d), then the effective update
    # Values are divided by the scale before they are rounded, and multiplied by it afterwards.
    # Neither happens if the constants of the grids contain the scale, see `Grids`.
    w, v, t, _, _, _, update, no_value, no_weight, pair_least = buffers.shared
    has_weight, pair, d, _ = buffers.stacked
    a, b, c, e = buffers.per_format
    first, second = buffers.pairs
    found: dict[str, Tensor] = {}

    # Stiffness, and the gradient and the update relative to it.
    gap, stored = round_to_grids(grids.divide_by_scale(w, a), grids, t, b, c)  # gap in b, Q(w) in c
    stiffness = grids.multiply_by_scale_(torch.minimum(gap, grids.last_spacing, out=b))
    # `round_to_grids` goes on beyond the largest value of a format. A weight that it rounds to a
    # point there is saturated.
    stored_size = torch.abs(stored, out=e)
    found["saturated"] = torch.gt(stored_size, grids.top, out=a).sum(-1)
    found["stored_normal"] = torch.ge(stored_size, grids.smallest_normal, out=a).sum(-1)
    found["stored_nonzero"] = torch.ne(stored_size, 0, out=a).sum(-1)
    # One matrix product for two sums: (formats, elements) @ (elements, 2), where `first` holds
    # has_weight and pair side by side.
    found["stiffness"], found["stiffness_gradient"] = torch.bmm(stiffness, first).unbind(-1)
    weight_stiffness = torch.mul(stiffness, has_weight, out=a)
    found["stiffness_sq"] = vector_norm(weight_stiffness, dim=-1)
    found["max stiffness"] = weight_stiffness.amax(-1)
    found["min stiffness"] = torch.maximum(stiffness, no_weight, out=a).amin(-1)
    found["gradient_below_stiffness"] = torch.lt(pair_least, stiffness, out=a).sum(-1)
    per_stiffness = torch.reciprocal(stiffness, out=b)
    found["gradient_per_stiffness"] = torch.mul(pair, per_stiffness, out=a).sum(-1)
    steps = torch.mul(update, per_stiffness, out=b)
    _count_octaves(steps, FIRST_STEPS_OCTAVE, a, histograms, "steps_at")

    # An update is visible if casts to the format differ before and after it: Q(v) ≠ Q(w).
    _, shown = round_to_grids(grids.divide_by_scale(v, a), grids, t, b, e)
    shown = _clamp(shown, grids.floor, grids.ceiling)
    stored = _clamp(stored, grids.floor, grids.ceiling)
    found["visible"] = torch.ne(shown, stored, out=e).sum(-1)

    # The grid error |w − Q(w)|. A stored weight is clamped to the largest value.
    stored = _clamp(stored, grids.bottom, grids.top)
    error = torch.sub(w, grids.multiply_by_scale(stored, a), out=a).abs_()
    found["grid_error"], found["grid_error_sq"] = error.sum(-1), vector_norm(error, dim=-1)
    found["max grid_error"] = error.amax(-1)
    found["min grid_error"] = torch.maximum(error, no_value, out=b).amin(-1)
    found["off_grid"] = torch.ne(error, 0, out=a).sum(-1)

    # The effective update Q(Q(w) + d) − Q(w): how far d moves a weight that is kept on the grid.
    target = grids.divide_by_scale(torch.add(grids.multiply_by_scale(stored, a), d, out=a), a)
    target = _clamp(target, grids.floor, grids.ceiling)
    gap, updated = round_to_grids(target, grids, t, b, e)
    rest = torch.sub(target, updated, out=a)
    effective = torch.sub(updated, stored, out=e)  # in units of the scale
    found |= _stochastic_sums(grids, rest, gap, stored, effective)
    effective = grids.multiply_by_scale_(effective)
    is_effective = torch.ne(effective, 0, out=a)
    found["effective"] = is_effective.sum(-1)
    found["ever_effective"] = found["effective"]
    if ever is not None:
        found["ever_effective"] = ever.effective.logical_or_(is_effective).sum(-1)
    # `second` holds d and d³ side by side.
    found["kept"], found["kept_update_cubed"] = torch.bmm(effective, second).unbind(-1)
    found["kept_sq"] = vector_norm(torch.mul(effective, d, out=a), dim=-1)
    found["lost_sq"] = vector_norm(effective.sub_(d), dim=-1)
    return found


def _stochastic_sums(
    grids: Grids, rest: Tensor, gap: Tensor, stored: Tensor, effective: Tensor
) -> dict[str, Tensor]:
    """Sum the variance, and the probability to move, of weights under stochastic rounding.

    Stochastic rounding takes the target, stored weight plus update, to one of the two grid points
    around it. Their distances from the target are abs(rest) and gap − abs(rest), and the variance
    is the product of these. A weight moves with the probability abs(target − stored) over the
    distance from stored to the next grid point on that side, at most 1. A target that was clamped
    to the largest value is a grid point: its variance is 0.

    Args:
        grids: The grids of the formats.
        rest: Target minus the nearest point, in units of the scale, float64 (rows, formats,
            elements).
        gap: Spacing at the target, in units of the scale, like `rest`; overwritten.
        stored: The weight on the grid, in units of the scale, like `rest`; overwritten.
        effective: Nearest point minus the weight on the grid, in units of the scale, like `rest`.

    Returns:
        ``"stochastic_variance"`` and ``"stochastic_move"``, float64 (rows, formats) each.
    """
    move_gap = compute_gaps(stored, gap, grids)
    variance = grids.multiply_by_scale_(gap.mul_(rest).abs_().addcmul_(rest, rest, value=-1))
    variance_sum = grids.multiply_by_scale_(variance).sum(-1)
    move = torch.add(rest, effective, out=gap).abs_().div_(move_gap).clamp_(max=1)
    return {"stochastic_variance": variance_sum, "stochastic_move": move.sum(-1)}


def _copy_values(rows: Rows, buffers: Buffers) -> None:
    """Copy weights and gradients of layers, a row for each, into buffers, as float64.

    If one tensor holds all weights (`rows.together`), a single operation copies them.
    """
    if rows.together is not None:
        buffers.values.copy_(rows.together)
        return
    for each, to in zip(rows[:3], buffers.shared, strict=False):
        if each is None:
            to.zero_()
        else:
            to.copy_(each)


def _clamp(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Clamp `x` in place; `torch.clamp` between tensors takes twice as long."""
    return torch.minimum(torch.maximum(x, low, out=x), high, out=x)


def _count_octaves(
    values: Tensor, first: int, out: Tensor, histograms: Histograms, at: str
) -> None:
    """Add magnitudes to histograms by octave, from a power of two up to the next.

    The last bin also counts all larger values. The first bin also counts all smaller ones and 0,
    which stands for elements that are left out. Its count is therefore not used: `StepTable`
    computes it from the total.

    Args:
        values: Magnitudes, float64 (rows, 1 or formats, elements).
        first: Exponent of the first bin.
        out: Buffer of the same shape; overwritten.
        histograms: Counts, updated in place, and offsets of the bins.
        at: Name of the offsets to use, such as ``"steps_at"``.
    """
    # A magnitude has the sign bit 0, so that a shift leaves the biased exponent:
    #   0 eeeeeeeeeee m…m  >> 52  =  eeeeeeeeeee
    lowest = first + BIAS
    exponent = torch.bitwise_right_shift(view_bits(values), MANTISSA_BITS, out=view_bits(out))
    bins = exponent.clamp_(lowest, lowest + OCTAVES - 1).add_(getattr(histograms, at)).flatten()
    histograms.counts.scatter_add_(0, bins, histograms.ones)
