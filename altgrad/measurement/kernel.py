"""The numeric kernel: rows of one step's weights and gradients to sums, for every format at once.

All is computed in float64, elementwise quantities in buffers that are written over and over, so
that one operation serves all rows and formats.

w and v are the weights before and after the step, d = v − w is the update, Q rounds to a grid; the
stiffness is the spacing of the grid at w.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from altgrad.measurement.columns import (
    FIRST_STEPS_OCTAVE,
    FORMAT_ROW_MAXIMA,
    FORMAT_ROW_MINIMA,
    FORMAT_ROW_SQUARES,
    FORMAT_ROW_SUMS,
    OCTAVES,
    ROW_MAXIMA,
    ROW_MINIMA,
    ROW_SQUARES,
    ROW_SUMS,
)
from altgrad.measurement.workspace import Buffers
from altgrad.quantization.grids import (
    JUST_BELOW_ONE,
    LARGEST,
    Grids,
    binade_of,
    bits_of,
    round_to_grids,
)

_MANTISSA_BITS, _BIAS = 52, 1023  # of float64

# The order of the columns, of a layer and then of all its formats. What stands for a sum of squares
# is a norm until it is in its column.
_SUMS = (*ROW_SUMS, *FORMAT_ROW_SUMS, *ROW_SQUARES, *FORMAT_ROW_SQUARES)
_EXTREMA = (
    *(f"max {name}" for name in (*ROW_MAXIMA, *FORMAT_ROW_MAXIMA)),
    *(f"min {name}" for name in (*ROW_MINIMA, *FORMAT_ROW_MINIMA)),
)


class Rows(NamedTuple):
    """Elements to measure, (rows, 1, columns); NaN in `before` stands for no element at all.

    Attributes:
        together: All three as one tensor, (rows, 3, columns), where they lie side by side.
    """

    before: Tensor
    after: Tensor
    gradient: Tensor | None
    together: Tensor | None = None


class EverMoved(NamedTuple):
    """The past of each tracked element: bool, (rows, 1 or formats, columns)."""

    moved: Tensor
    effective: Tensor


class Histograms(NamedTuple):
    """Counts of octaves, and where in them the bins of each row begin.

    Attributes:
        counts: float64, one dimension: the bins of all layers, of each those of ULPs and then those
            of the steps of each format.
        ulps_at: int64, (rows, 1, 1): the first bin, less the exponent that it counts.
        steps_at: int64, (rows, formats, 1): the first bin of steps, less its exponent.
        ones: float64: what is added to the counts, at least as many as there are elements.
    """

    counts: Tensor
    ulps_at: Tensor
    steps_at: Tensor
    ones: Tensor


def row_sums(
    rows: Rows,
    grids: Grids | None,
    own_grid: tuple[float, float],
    buffers: Buffers,
    histograms: Histograms,
    ever: EverMoved | None = None,
) -> tuple[Tensor, Tensor]:
    """Measure rows on every grid.

    What is true of an element is 1.0 in a float64 buffer: a bool tensor takes five times as long to
    sum.

    Args:
        rows: The elements, which are not changed.
        grids: The formats, with the scale of each row; None without formats.
        own_grid: 2**-M and the smallest positive number of the dtype that weights are stored in.
        buffers: Memory for as many rows, formats and columns; overwritten.
        histograms: Where octaves are counted.
        ever: What to update, where the elements are tracked.

    Returns:
        Two float64 tensors with a row for each of `rows`. Columns of the first are ROW_SUMS and
        FORMAT_ROW_SUMS (each of these for all formats), then ROW_SQUARES and FORMAT_ROW_SQUARES.
        Columns of the second are the maxima in the same order, then the minima, negated.
    """
    found = _layer_sums(rows, own_grid, buffers, histograms, ever)
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
    own_grid: tuple[float, float],
    buffers: Buffers,
    histograms: Histograms,
    ever: EverMoved | None,
) -> dict[str, Tensor]:
    """Fill the shared buffers, all zero where one of the three is not finite, and sum them.

    Returns:
        Sums, norms and extrema by name, (rows, 1).
    """
    w, v, t, size, s, gradient, update, no_value, no_weight, pair_least = buffers.shared
    has_weight, pair, d, d_cubed = buffers.stacked

    _copy_values(rows, buffers)
    sizes = torch.abs(buffers.values, out=buffers.sizes)
    # The largest magnitude of the three is NaN where one of them is.
    valid = torch.amax(sizes, 1, keepdim=True, out=update).lt_(LARGEST)
    finite = valid.sum(-1)
    torch.reciprocal(valid, out=no_value).sub_(1)  # inf where there is none, else 0
    torch.abs(buffers.values.masked_fill_(torch.ne(valid, 1), 0), out=sizes)

    torch.sub(v, w, out=d)
    torch.abs(d, out=update)
    larger = torch.maximum(size, s, out=s)
    # The gap below the larger of the two; a power of two has the smaller one of its neighbours.
    eps, smallest = own_grid
    gap = binade_of(larger.mul_(JUST_BELOW_ONE), t).mul_(eps).clamp_(min=smallest)
    ulps = torch.div(update, gap, out=t)
    ulps_sum, ulps_max = ulps.sum(-1), ulps.amax(-1)
    _count_octaves(ulps, 0, no_weight, histograms, "ulps_at")

    moved = torch.ne(update, 0, out=s)
    moved_sum = moved.sum(-1)
    ever_moved = moved_sum if ever is None else ever.moved.logical_or_(moved).sum(-1)
    has_gradient = torch.ne(gradient, 0, out=t)
    gradient_sum = has_gradient.sum(-1)
    both_sum = has_gradient.mul_(moved).sum(-1)
    torch.ne(size, 0, out=has_weight)
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
    """Sum each format from the shared buffers, as `_layer_sums` left them.

    Returns:
        Sums, norms and extrema by name, (rows, formats).
    """
    w, v, t, size, _, _, update, no_value, no_weight, pair_least = buffers.shared
    has_weight, pair, d, _ = buffers.stacked
    a, b, c, e = buffers.per_format
    first, second = buffers.pairs
    found: dict[str, Tensor] = {}

    # Stiffness, and the gradient and the update beside it.
    gap, stored = round_to_grids(grids.into(w, a), grids, t, b, c)
    stiffness = grids.back(torch.minimum(gap, grids.last_gap, out=b))
    weight_size = size if grids.scale is None else a.abs_()
    found["saturated"] = torch.gt(weight_size, grids.top, out=a).sum(-1)
    found["stiffness"], found["stiffness_gradient"] = torch.bmm(stiffness, first).unbind(-1)
    of_weights = torch.mul(stiffness, has_weight, out=a)
    found["stiffness_sq"] = vector_norm(of_weights, dim=-1)
    found["max stiffness"] = of_weights.amax(-1)
    found["min stiffness"] = torch.maximum(stiffness, no_weight, out=a).amin(-1)
    found["gradient_below_stiffness"] = torch.lt(pair_least, stiffness, out=a).sum(-1)
    per_stiffness = torch.reciprocal(stiffness, out=b)
    found["gradient_per_stiffness"] = torch.mul(pair, per_stiffness, out=a).sum(-1)
    steps = torch.mul(update, per_stiffness, out=b)
    found["stochastic_move"] = torch.clamp(steps, max=1, out=a).sum(-1)
    _count_octaves(steps, FIRST_STEPS_OCTAVE, a, histograms, "steps_at")

    # What a cast shows: Q(w) beside Q(v).
    _, shown = round_to_grids(grids.into(v, a), grids, t, b, e)
    shown = _clamp(shown, grids.floor, grids.ceiling)
    stored = _clamp(stored, grids.floor, grids.ceiling)
    found["visible"] = torch.ne(shown, stored, out=e).sum(-1)

    # The error of storing the weights.
    stored = _clamp(stored, grids.bottom, grids.top)
    error = torch.sub(w, grids.true(stored, a), out=a).abs_()
    found["grid_error"], found["grid_error_sq"] = error.sum(-1), vector_norm(error, dim=-1)
    found["max grid_error"] = error.amax(-1)
    found["min grid_error"] = torch.maximum(error, no_value, out=b).amin(-1)
    found["off_grid"] = torch.ne(error, 0, out=a).sum(-1)
    stored_size = torch.abs(stored, out=a)
    found["stored_normal"] = torch.ge(stored_size, grids.smallest_normal, out=b).sum(-1)
    found["stored_nonzero"] = torch.ne(stored_size, 0, out=a).sum(-1)

    # What is kept of the update: Q(Q(w) + d) − Q(w).
    target = grids.into(torch.add(grids.true(stored, a), d, out=a), a)
    target = _clamp(target, grids.floor, grids.ceiling)
    gap, updated = round_to_grids(target, grids, t, b, e)
    distance = grids.back(torch.sub(target, updated, out=a).abs_())
    # Stochastic rounding goes to this neighbour or to the other; nothing is left to draw at a top.
    found["stochastic_variance"] = grids.back(gap).sub_(distance).mul_(distance).sum(-1)
    effective = grids.back(torch.sub(updated, stored, out=e))
    is_effective = torch.ne(effective, 0, out=a)
    found["effective"] = is_effective.sum(-1)
    found["ever_effective"] = found["effective"]
    if ever is not None:
        found["ever_effective"] = ever.effective.logical_or_(is_effective).sum(-1)
    found["kept"], found["kept_update_cubed"] = torch.bmm(effective, second).unbind(-1)
    found["kept_sq"] = vector_norm(torch.mul(effective, d, out=a), dim=-1)
    found["lost_sq"] = vector_norm(effective.sub_(d), dim=-1)
    return found


def _copy_values(rows: Rows, buffers: Buffers) -> None:
    """Copy the rows to float64, in one operation where they lie together."""
    if rows.together is not None:
        buffers.values.copy_(rows.together)
        return
    for each, to in zip(rows[:3], buffers.shared, strict=False):
        if each is None:
            to.zero_()
        else:
            to.copy_(each)


def _clamp(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Clamp in place; `torch.clamp` between tensors takes twice as long."""
    return torch.minimum(torch.maximum(x, low, out=x), high, out=x)


def _count_octaves(
    values: Tensor, first: int, out: Tensor, histograms: Histograms, at: str
) -> None:
    """Count in which octave each value lies; 0 is in the first."""
    lowest = first + _BIAS
    exponent = torch.bitwise_right_shift(bits_of(values), _MANTISSA_BITS, out=bits_of(out))
    bins = exponent.clamp_(lowest, lowest + OCTAVES - 1).add_(getattr(histograms, at)).flatten()
    histograms.counts.scatter_add_(0, bins, histograms.ones)
