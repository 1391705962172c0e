"""The numeric kernel: sum one step's weights and gradients by rows, for every format at once.

Notation: w and v are the weights before and after the step, d = v − w is the update, Q rounds to
the grid of a format, and the stiffness is the spacing of the grid at w.

All arithmetic is float64. One operation serves all rows and all formats by broadcasting::

    shared      (rows, 1, columns)         weights, gradient, update, and what follows from them
    per_format  (rows, formats, columns)   rounded weights, stiffness, errors
    sums        (rows, 1 or formats)       each the sum over the columns of a row

Nothing is allocated for elements: every operation writes into a buffer of `workspace` (``out=``),
and buffers are reused as soon as their quantity is summed. Comments mark what each one holds.

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
from altgrad.quantization.grids import (
    JUST_BELOW_ONE,
    LARGEST,
    Grids,
    compute_gaps,
    extract_binades,
    round_to_grids,
    view_bits,
)

# A float64 is  sign (1 bit) | exponent + 1023 (11 bits) | mantissa (52 bits):
# https://en.wikipedia.org/wiki/Double-precision_floating-point_format
_MANTISSA_BITS, _BIAS = 52, 1023

# The columns of the result in their order: the layer's, then each of these for all formats. Sums of
# squares are computed as norms, which torch does in one pass, and squared together at the end.
_SUMS = (*ROW_SUMS, *FORMAT_ROW_SUMS, *ROW_SQUARES, *FORMAT_ROW_SQUARES)
_EXTREMA = (
    *(f"max {name}" for name in (*ROW_MAXIMA, *FORMAT_ROW_MAXIMA)),
    *(f"min {name}" for name in (*ROW_MINIMA, *FORMAT_ROW_MINIMA)),
)


class Rows(NamedTuple):
    """The elements to measure, in any floating-point dtype.

    Attributes:
        before: Weights before the step, (rows, 1, columns); NaN where the row has no element.
        after: Weights after the step, (rows, 1, columns).
        gradient: The gradient as the optimizer applied it, (rows, 1, columns); None without one.
        together: `before`, `after` and `gradient` as one tensor, (rows, 3, columns), to copy them
            by one operation. None unless they share memory and dtype.
    """

    before: Tensor
    after: Tensor
    gradient: Tensor | None
    together: Tensor | None = None


class EverMoved(NamedTuple):
    """The ever-moved flags of each element, over this and all earlier observed steps.

    Attributes:
        moved: True where the element has had an update other than 0, bool (rows, 1, columns).
        effective: True where a format has kept a part of an update, bool (rows, formats, columns).
    """

    moved: Tensor
    effective: Tensor


class Histograms(NamedTuple):
    """The counts of octaves, and where the bins of each row begin.

    The bin of an element is ``offset + biased exponent``: an addition finds it, without a table.

    Attributes:
        counts: The bins of all layers, float64 (layers · (2 + formats) · 64). A layer has the bins
            of its ULPs, those of its weights, then those of the steps of each format.
        ulps_at: Offset of the bins of ULPs of each row, int64 (rows, 1, 1).
        weights_at: Offset of the bins of weights of each row, int64 (rows, 1, 1).
        steps_at: Offset of the bins of steps of each row and format, int64 (rows, formats, 1).
        ones: Increments of the counts, float64, at least as many as there are elements.
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
    """Measure the elements of each row, and what the grid of each format would keep of them.

    Args:
        rows: Weights and gradients of the elements; they are not changed.
        grids: The grids of the formats, with the scale of each row. None without formats.
        dtype_grid: 2**-M for M mantissa bits, and the smallest normal number, of the dtype in which
            the weights are stored.
        buffers: Memory for the same number of rows, formats and columns; overwritten.
        histograms: Counts of octaves; updated in place.
        ever: Ever-moved flags of the elements; updated in place. None if never_moved_frac is not
            measured.

    Returns:
        Sums and extrema, float64 (rows, columns) each. Columns of sums are ROW_SUMS,
        FORMAT_ROW_SUMS (each for all formats), ROW_SQUARES and FORMAT_ROW_SQUARES. Columns of
        extrema are the maxima in this order, then the negated minima.
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
    """Sum over the elements of each row all that does not depend on a format.

    What `_format_sums` needs stays in `buffers`. The weight before, the weight after and the
    gradient of an element are 0 in `buffers` if one of the three is not finite.

    Args:
        rows: Weights and gradients of the elements; they are not changed.
        dtype_grid: 2**-M for M mantissa bits, and the smallest normal number, of the dtype in which
            the weights are stored.
        buffers: Memory for the rows; overwritten.
        histograms: Counts of octaves; updated in place.
        ever: Ever-moved flags of the elements; updated in place. None if never_moved_frac is not
            measured.

    Returns:
        Sums, norms and extrema by name, float64 (rows, 1).
    """
    # w, v, gradient: the values. size, s, t: buffers for |w|, |v|, |gradient| and what follows.
    # no_value, no_weight: inf where an element is invalid or w = 0, else 0; added to a quantity or
    # compared with it, they keep such elements out of its minimum.
    w, v, t, size, s, gradient, update, no_value, no_weight, pair_least = buffers.shared
    has_weight, pair, d, d_cubed = buffers.stacked

    # A condition is stored as 1.0 or 0.0 in a float64 buffer: a bool tensor takes five times as
    # long to sum.
    _copy_values(rows, buffers)
    sizes = torch.abs(buffers.values, out=buffers.sizes)
    # NaN < LARGEST is False, and amax is NaN if one of the three is: one comparison finds both.
    valid = torch.amax(sizes, 1, keepdim=True, out=update).lt_(LARGEST)
    finite = valid.sum(-1)
    torch.reciprocal(valid, out=no_value).sub_(1)  # 1/1 − 1 = 0 if valid, 1/0 − 1 = inf if not
    torch.abs(buffers.values.masked_fill_(torch.ne(valid, 1), 0), out=sizes)
    _count_octaves(size, FIRST_WEIGHTS_OCTAVE, update, histograms, "weights_at")

    torch.sub(v, w, out=d)
    torch.abs(d, out=update)
    larger = torch.maximum(size, s, out=s)  # of |w| and |v|
    # The unit in the last place is the spacing just below max(|w|, |v|). Below a power of two the
    # spacing is half of that above: the factor moves a power of two into the binade below.
    # Division by the binade, and then by eps: their product may be subnormal in float64, and a
    # processor may flush subnormal numbers to 0.
    eps, smallest_normal = dtype_grid
    binade = extract_binades(larger.mul_(JUST_BELOW_ONE), t).clamp_(min=smallest_normal)
    ulps = torch.div(update, binade, out=t).mul_(1 / eps)  # overwrites the binade, elementwise
    ulps_sum, ulps_max = ulps.sum(-1), ulps.amax(-1)
    _count_octaves(ulps, 0, no_weight, histograms, "ulps_at")

    moved = torch.ne(update, 0, out=s)  # s: |v| is no longer needed
    moved_sum = moved.sum(-1)
    ever_moved = moved_sum if ever is None else ever.moved.logical_or_(moved).sum(-1)
    has_gradient = torch.ne(gradient, 0, out=t)
    gradient_sum = has_gradient.sum(-1)
    # In place: t holds "has a gradient and moved" from here on.
    both_sum = has_gradient.mul_(moved).sum(-1)
    torch.ne(size, 0, out=has_weight)
    # Pairs of gradient and stiffness, over weights other than 0.
    torch.mul(gradient, has_weight, out=pair)  # |gradient|, and 0 where w = 0, for sums and maxima
    torch.reciprocal(has_weight, out=no_weight).sub_(1)
    torch.add(gradient, no_weight, out=pair_least)  # and inf where w = 0, for minima
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
    """Sum over the elements of each row all that depends on a format, for each format.

    Args:
        grids: The grids of the formats, with the scale of each row.
        buffers: Memory that `_layer_sums` has filled with weights, updates and gradients;
            overwritten.
        histograms: Counts of octaves; updated in place.
        ever: Ever-moved flags of the elements; updated in place. None if never_moved_frac is not
            measured.

    Returns:
        Sums, norms and extrema by name, float64 (rows, formats).
    """
    # t is the one shared buffer that is free. Of the four per format:
    #   a  short-lived: a quantity is computed into it, summed, and overwritten by the next
    #   b  stiffness, then |d| / stiffness, then spacings
    #   c  Q(w), from its rounding on, then the gap between Q(w) and its neighbour
    #   e  |Q(w)|, then Q(v), then Q(Q(w) + d), then the effective update
    # "Scaled" values are divided by the scale, as `grids.divide_by_scale` does;
    # `grids.multiply_by_scale` goes back.
    w, v, t, _, _, _, update, no_value, no_weight, pair_least = buffers.shared
    has_weight, pair, d, _ = buffers.stacked
    a, b, c, e = buffers.per_format
    first, second = buffers.pairs
    found: dict[str, Tensor] = {}

    # Stiffness, and the gradient and the update relative to it.
    gap, stored = round_to_grids(grids.divide_by_scale(w, a), grids, t, b, c)  # gap in b, Q(w) in c
    stiffness = grids.multiply_by_scale_(torch.minimum(gap, grids.last_spacing, out=b))
    # Rounding continues the grid beyond the largest value: what it takes there, a clamp changes.
    stored_size = torch.abs(stored, out=e)
    found["saturated"] = torch.gt(stored_size, grids.top, out=a).sum(-1)
    found["stored_normal"] = torch.ge(stored_size, grids.smallest_normal, out=a).sum(-1)
    found["stored_nonzero"] = torch.ne(stored_size, 0, out=a).sum(-1)
    # One matrix product for two sums: (formats, columns) @ (columns, 2), where `first` holds
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

    # An update is visible if a cast to the format tells the weights apart: Q(v) ≠ Q(w).
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

    # The effective update Q(Q(w) + d) − Q(w): what is kept of d by weights on the grid.
    target = grids.divide_by_scale(torch.add(grids.multiply_by_scale(stored, a), d, out=a), a)
    target = _clamp(target, grids.floor, grids.ceiling)
    gap, updated = round_to_grids(target, grids, t, b, e)
    rest = torch.sub(target, updated, out=a)
    effective = torch.sub(updated, stored, out=e)  # both in units of the scale
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

    Stochastic rounding takes the target (the weight after the step) to one of the two grid points
    around it. Their distances from the target are abs(rest) and gap − abs(rest), and the variance
    is the product of these. A weight moves with the probability abs(target − stored) / (gap on this
    side of stored), at most 1. Both are 0 where values are clamped to the largest one.

    Args:
        grids: The grids of the formats.
        rest: Target minus the nearest point, in units of the scale, float64 (rows, formats,
            columns).
        gap: Spacing at the target, in units of the scale; overwritten.
        stored: The weight on the grid, in units of the scale; overwritten.
        effective: Nearest point minus the weight on the grid, in units of the scale.

    Returns:
        The two sums by name, float64 (rows, formats).
    """
    move_gap = compute_gaps(stored, gap, grids)
    variance = grids.multiply_by_scale_(gap.mul_(rest).abs_().addcmul_(rest, rest, value=-1))
    variance_sum = grids.multiply_by_scale_(variance).sum(-1)
    move = torch.add(rest, effective, out=gap).abs_().div_(move_gap).clamp_(max=1)
    return {"stochastic_variance": variance_sum, "stochastic_move": move.sum(-1)}


def _copy_values(rows: Rows, buffers: Buffers) -> None:
    """Copy the rows to float64, by one operation if `rows.together` is given."""
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
    """Count the octave of each value of at least 0; the first bin takes 0 as well.

    Args:
        values: Magnitudes, float64 (rows, 1 or formats, columns).
        first: Exponent of the first bin.
        out: Buffer of the same shape; overwritten.
        histograms: Counts, and offsets of the bins.
        at: Name of the offsets to use, such as ``"steps_at"``.
    """
    # The bits of a number of at least 0, shifted right by its mantissa, are its biased exponent.
    lowest = first + _BIAS
    exponent = torch.bitwise_right_shift(view_bits(values), _MANTISSA_BITS, out=view_bits(out))
    bins = exponent.clamp_(lowest, lowest + OCTAVES - 1).add_(getattr(histograms, at)).flatten()
    histograms.counts.scatter_add_(0, bins, histograms.ones)
