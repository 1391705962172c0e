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
    gap_at,
    round_to_gap,
)

_MANTISSA_BITS, _BIAS = 52, 1023  # of float64


class Rows(NamedTuple):
    """Elements to measure, (rows, 1, columns); NaN in `before` stands for no element at all.

    Attributes:
        together: The three as one tensor of (rows, 3, columns), where they lie so.
    """

    before: Tensor
    after: Tensor
    gradient: Tensor | None
    together: Tensor | None = None


class EverMoved(NamedTuple):
    """What each tracked element has done so far; bool, (rows, 1 or formats, columns)."""

    moved: Tensor
    effective: Tensor


class Histograms(NamedTuple):
    """Where to count octaves: one flat tensor, and where in it the bins of each row begin."""

    counts: Tensor  # float64
    ulps_at: Tensor  # int64, (rows, 1, 1)
    steps_at: Tensor  # int64, (rows, formats, 1)
    ones: Tensor  # what is added to them, float64; at least as many as there are elements


class RowSums(NamedTuple):
    """What each row comes to, in float64; the columns are named in `altgrad.measurement.columns`.

    Attributes:
        sums: Of ROW_SUMS, of FORMAT_ROW_SUMS (each for all formats), then of squares likewise.
        maxima: Likewise; then the minima, negated.
    """

    sums: Tensor
    maxima: Tensor


class _Sums(NamedTuple):
    sums: dict[str, Tensor]
    maxima: dict[str, Tensor]
    minima: dict[str, Tensor]


def row_sums(
    rows: Rows,
    grids: Grids | None,
    own_grid: tuple[float, float],
    buffers: Buffers,
    histograms: Histograms,
    ever: EverMoved | None = None,
) -> RowSums:
    """Measure rows on every grid.

    What is true of an element is 1.0 in a float64 buffer: a bool tensor takes five times as long to
    sum.

    Args:
        rows: The elements, which are not changed.
        grids: The formats, with the scale of each row; None without formats.
        own_grid: 2**-M and the smallest positive number of the dtype that weights are stored in.
        buffers: For as many rows, formats and columns; overwritten.
        histograms: Where octaves are counted.
        ever: What to update, where the elements are tracked.
    """
    layer = _of_layer(rows, own_grid, buffers, histograms, ever)
    formats = _of_formats(grids, buffers, histograms, ever) if grids else _no_formats(rows)
    return RowSums(_sums(layer, formats), _maxima(layer, formats))


def _of_layer(
    rows: Rows,
    own_grid: tuple[float, float],
    buffers: Buffers,
    histograms: Histograms,
    ever: EverMoved | None,
) -> _Sums:
    """Fill the shared buffers, all zero where one of the three is not finite, and sum them."""
    w, v, t, size, s, gradient, update, no_value, no_weight, pair_least = buffers.shared
    has_weight, pair, d, d_cubed = buffers.stacked

    _copy_values(rows, buffers)
    largest = _largest(buffers, out=update)
    valid = torch.lt(largest, LARGEST, out=update)
    finite = valid.sum(-1)
    torch.reciprocal(valid, out=no_value).sub_(1)  # inf where there is none, else 0
    _zero_and_size(torch.ne(valid, 1), buffers)

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
    ever_moved = _remembered(ever and ever.moved, moved, moved_sum)
    has_gradient = torch.ne(gradient, 0, out=t)
    gradient_sum = has_gradient.sum(-1)
    both_sum = has_gradient.mul_(moved).sum(-1)
    torch.ne(size, 0, out=has_weight)
    torch.mul(gradient, has_weight, out=pair)
    torch.reciprocal(has_weight, out=no_weight).sub_(1)
    torch.add(gradient, no_weight, out=pair_least)
    d_squared = torch.mul(d, d, out=s)
    torch.mul(d_squared, d, out=d_cubed)
    sums = {
        "finite": finite,
        "nonzero_weights": has_weight.sum(-1),
        "moved": moved_sum,
        "ever_moved": ever_moved,
        "ulps": ulps_sum,
        "gradients": torch.zeros_like(finite) if rows.gradient is None else finite,
        "nonzero_gradients": gradient_sum,
        "moved_with_gradient": both_sum,
        "paired_gradient_abs": pair.sum(-1),
        "weight_sq": _norm(w),
        "update_sq": _norm(d),
        "update_4th": _norm(d_squared),
        "gradient_sq": _norm(gradient),
        "paired_gradient_sq": _norm(pair),
    }
    maxima = {"ulps": ulps_max, "paired_gradient_abs": pair.amax(-1)}
    minima = {"paired_gradient_abs": pair_least.amin(-1)}
    return _Sums(sums, maxima, minima)


def _of_formats(  # noqa: PLR0915 - a written-out numeric kernel reads best from top to bottom
    grids: Grids, buffers: Buffers, histograms: Histograms, ever: EverMoved | None
) -> _Sums:
    """From the shared buffers, as `_of_layer` left them, to the sums of each format."""
    w, v, t, size, _, _, update, no_value, no_weight, pair_least = buffers.shared
    has_weight, pair, d, _ = buffers.stacked
    a, b, c, e = buffers.per_format
    first, second = buffers.pairs
    sums, maxima, minima = {}, {}, {}
    apart = grids.scale is not None
    binade = b if apart else t

    # Stiffness, and the gradient and the update beside it.
    x = grids.into(w, a)
    gap = gap_at(x, binade_of(x, binade), grids, b)
    stored = round_to_gap(x, gap, grids, c)
    sums["saturated"] = torch.gt(a.abs_() if apart else size, grids.top, out=a).sum(-1)
    stiffness = grids.back(torch.minimum(gap, grids.last_gap, out=b))
    sums["stiffness"], sums["stiffness_gradient"] = torch.bmm(stiffness, first).unbind(-1)
    of_weights = torch.mul(stiffness, has_weight, out=a)
    maxima["stiffness"], sums["stiffness_sq"] = of_weights.amax(-1), _norm(of_weights)
    minima["stiffness"] = torch.maximum(stiffness, no_weight, out=a).amin(-1)
    sums["gradient_below_stiffness"] = torch.lt(pair_least, stiffness, out=a).sum(-1)
    per_stiffness = torch.reciprocal(stiffness, out=b)
    sums["gradient_per_stiffness"] = torch.mul(pair, per_stiffness, out=a).sum(-1)
    steps = torch.mul(update, per_stiffness, out=b)
    sums["stochastic_move"] = torch.clamp(steps, max=1, out=a).sum(-1)
    _count_octaves(steps, FIRST_STEPS_OCTAVE, a, histograms, "steps_at")

    # What a cast shows: Q(w) beside Q(v).
    x = grids.into(v, a)
    gap = gap_at(x, binade_of(x, binade), grids, b)
    shown = _clamp(round_to_gap(x, gap, grids, e), grids.floor, grids.ceiling)
    stored = _clamp(stored, grids.floor, grids.ceiling)
    sums["visible"] = torch.ne(shown, stored, out=e).sum(-1)

    # The error of storing the weights.
    stored = _clamp(stored, grids.bottom, grids.top)
    error = torch.sub(w, grids.true(stored, a), out=a).abs_()
    sums["grid_error"], sums["grid_error_sq"] = error.sum(-1), _norm(error)
    maxima["grid_error"] = error.amax(-1)
    minima["grid_error"] = torch.maximum(error, no_value, out=b).amin(-1)
    sums["off_grid"] = torch.ne(error, 0, out=a).sum(-1)
    stored_size = torch.abs(stored, out=a)
    sums["stored_normal"] = torch.ge(stored_size, grids.smallest_normal, out=b).sum(-1)
    sums["stored_nonzero"] = torch.ne(stored_size, 0, out=a).sum(-1)

    # What is kept of the update: Q(Q(w) + d) − Q(w).
    target = grids.into(torch.add(grids.true(stored, a), d, out=a), a)
    target = _clamp(target, grids.floor, grids.ceiling)
    gap = gap_at(target, binade_of(target, b), grids, b)
    updated = round_to_gap(target, gap, grids, e)
    distance = grids.back(torch.sub(target, updated, out=a).abs_())
    # Stochastic rounding goes to this neighbour or to the other; nothing is left to draw at a top.
    sums["stochastic_variance"] = grids.back(gap).sub_(distance).mul_(distance).sum(-1)
    effective = grids.back(torch.sub(updated, stored, out=e))
    is_effective = torch.ne(effective, 0, out=a)
    sums["effective"] = is_effective.sum(-1)
    so_far = ever and ever.effective
    sums["ever_effective"] = _remembered(so_far, is_effective, sums["effective"])
    sums["kept"], sums["kept_update_cubed"] = torch.bmm(effective, second).unbind(-1)
    sums["kept_sq"] = _norm(torch.mul(effective, d, out=a))
    sums["lost_sq"] = _norm(effective.sub_(d))
    return _Sums(sums, maxima, minima)


def _no_formats(rows: Rows) -> _Sums:
    nothing = torch.zeros(len(rows.before), 0, dtype=torch.float64, device=rows.before.device)
    sums = dict.fromkeys((*FORMAT_ROW_SUMS, *FORMAT_ROW_SQUARES), nothing)
    extrema = dict.fromkeys(FORMAT_ROW_MAXIMA, nothing)
    return _Sums(sums, extrema, extrema)


def _remembered(so_far: Tensor | None, now: Tensor, count: Tensor) -> Tensor:
    """Fold `now` into `so_far` and count where it holds; `count` where nothing is tracked."""
    return count if so_far is None else so_far.logical_or_(now).sum(-1)


def _copy_values(rows: Rows, buffers: Buffers) -> None:
    """To float64, in one operation where they lie together."""
    if rows.together is not None:
        buffers.values.copy_(rows.together)
        return
    for each, to in zip(rows[:3], buffers.shared, strict=False):
        if each is None:
            to.zero_()
        else:
            to.copy_(each)


def _largest(buffers: Buffers, out: Tensor) -> Tensor:
    """The largest magnitude of the three values of each element; NaN if one of them is."""
    return torch.amax(torch.abs(buffers.values, out=buffers.sizes), 1, keepdim=True, out=out)


def _zero_and_size(invalid: Tensor, buffers: Buffers) -> None:
    """Zero all three values of invalid elements, and put their magnitudes where they belong."""
    torch.abs(buffers.values.masked_fill_(invalid, 0), out=buffers.sizes)


def _clamp(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """In place; `clamp` between tensors takes twice as long."""
    return torch.minimum(torch.maximum(x, low, out=x), high, out=x)


def _norm(x: Tensor) -> Tensor:
    """The square root of the sum of squares of each row, which `_sums` squares again."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return norm


def _count_octaves(
    values: Tensor, first: int, out: Tensor, histograms: Histograms, at: str
) -> None:
    """Count in which octave each value lies; 0 is in the first."""
    lowest = first + _BIAS
    exponent = torch.bitwise_right_shift(bits_of(values), _MANTISSA_BITS, out=bits_of(out))
    bins = exponent.clamp_(lowest, lowest + OCTAVES - 1).add_(getattr(histograms, at)).flatten()
    histograms.counts.scatter_add_(0, bins, histograms.ones)


def _sums(layer: _Sums, formats: _Sums) -> Tensor:
    plain = [layer.sums[name] for name in ROW_SUMS]
    plain += [formats.sums[name] for name in FORMAT_ROW_SUMS]
    squares = [layer.sums[name] for name in ROW_SQUARES]
    squares += [formats.sums[name] for name in FORMAT_ROW_SQUARES]
    table = torch.cat([*plain, *squares], dim=1)
    count = sum(each.shape[1] for each in squares)
    table[:, -count:].square_()
    return table


def _maxima(layer: _Sums, formats: _Sums) -> Tensor:
    maxima = [layer.maxima[name] for name in ROW_MAXIMA]
    maxima += [formats.maxima[name] for name in FORMAT_ROW_MAXIMA]
    minima = [layer.minima[name] for name in ROW_MINIMA]
    minima += [formats.minima[name] for name in FORMAT_ROW_MINIMA]
    table = torch.cat([*maxima, *minima], dim=1)
    count = sum(each.shape[1] for each in minima)
    table[:, -count:].neg_()
    return table
