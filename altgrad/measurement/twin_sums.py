"""Compare twins with the twin in fp32, and sum up over the sample of each layer, on the device.

A twin is a sample of each layer that is stored and stepped as a recipe says. The twin in fp32 has
float32 weights and states, and gets the same gradients. Each figure of a twin is a ratio Σ a / Σ b
over the elements of the sample, or a median. `TwinColumns` names the sums, and `measure_twins`
computes them; `measure_alone` computes those of a run that no twin can follow.

`ratio_bins` comes next; `twin_table` turns the sums into figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

SUMS = ("a", "b", "aa", "ab", "bb")
"""Names of the sums of a ratio Σ a / Σ b: Σ a, Σ b, Σ a², Σ a · b and Σ b².

Standard errors follow from the last three.
"""
_MOST_BYTES = 64 * 2**20
"""Memory of each of the largest tensors: 100 layers with seven twins need 20 MiB, and so are
measured at once, in the fewest operations. Thousands of layers are measured in parts."""

RATIOS = (
    *("progress_kept", "window_progress_kept", "drift", "moved_rms", "frozen_frac", "still_frac"),
    *("step_projection", "decay_projection", "moved_since_start_frac", "twin_nonfinite_frac"),
)
"""Names of a twin's metrics that are ratios Σ a / Σ b, or the square root of such a ratio.

A twin is a sample of a layer that is stored and stepped as a recipe says. ``drift`` and
``moved_rms`` are square roots.
"""


class TwinStack(NamedTuple):
    """The tensors of one twin, of shape (layers, width), with a layer's sample in each row.

    A twin is a sample of a layer that is stored and stepped as a recipe says.

    The width is the size of the largest sample; the end of shorter rows is padding. Weights and
    states are floating-point.

    Attributes:
        start: The weights when the twin began.
        window: The weights after the last observed step.
        before: The weights before the latest step.
        now: The weights after the latest step.
        moved_in_window: True if a step since the last observed step moved the weight, bool.
        moved: True if a step since the start moved the weight, bool.
        states: The states of the optimizer after the latest step, by name.
    """

    start: Tensor
    window: Tensor
    before: Tensor
    now: Tensor
    moved_in_window: Tensor
    moved: Tensor
    states: Mapping[str, Tensor]

    def cut(self, rows: slice) -> TwinStack:
        """Return views of the tensors that have these rows alone."""
        return TwinStack(
            self.start[rows],
            self.window[rows],
            self.before[rows],
            self.now[rows],
            self.moved_in_window[rows],
            self.moved[rows],
            {name: each[rows] for name, each in self.states.items()},
        )


@dataclass(frozen=True)
class TwinColumns:
    """The columns of a table of twins: sums and medians that compare a twin with that in fp32.

    A twin is a sample of a layer that is stored and stepped as a recipe says.

    The columns are the five sums of each ratio, the median of each state, and last the number of
    elements that the twin in fp32 has moved since the start.

    Attributes:
        states: The names of the optimizer's states, such as ``exp_avg_sq``.
    """

    states: tuple[str, ...] = ()

    @cached_property
    def ratios(self) -> tuple[str, ...]:
        """The names of a twin's metrics that are ratios Σ a / Σ b over its elements.

        A *twin* is a sample of the layers that is stored and stepped as a recipe says.
        """
        each = (f"{state}_{end}" for state in self.states for end in ("error", "zero_frac"))
        return (*RATIOS, *each)

    @cached_property
    def roots(self) -> tuple[str, ...]:
        """The names of the metrics that are the square root of their ratio Σ a / Σ b."""
        return ("drift", "moved_rms", *(f"{state}_error" for state in self.states))

    @cached_property
    def medians(self) -> tuple[str, ...]:
        """The names of the metrics that are medians: ``{state}_ratio`` for each optimizer state."""
        return tuple(f"{state}_ratio" for state in self.states)

    def __len__(self) -> int:
        return len(self.ratios) * len(SUMS) + len(self.medians) + 1


def measure_twins(
    mask: Tensor,
    fp32: TwinStack,
    twins: Sequence[TwinStack],
    states: Sequence[str],
    *,
    blocks: Sequence[int] = (),
) -> Tensor:
    """Compare each twin with the twin in fp32: sum up what their metrics follow from.

    A twin is a sample of each layer that is stored and stepped as a recipe says; that in fp32 has
    float32 weights and states. Each metric, such as ``progress_kept``, is a ratio Σ a / Σ b over
    the sample of a layer. Or it is a median over the sample, of an optimizer's state in the twin
    divided by that in fp32.

    An element is finite if its weights at all four times of `TwinStack` are. Elements that are not
    finite in a twin or in fp32 count in ``twin_nonfinite_frac`` alone.

    Args:
        mask: bool (layers, width), False at padding.
        fp32: The twin in fp32.
        twins: The other twins, with the same sample.
        states: The names of the optimizer's states. A twin may lack some: their median is NaN.
        blocks: Number of neighbours that were drawn together in each layer; empty for single
            elements. Blocks begin at multiples of this number. The products in Σ a², Σ a · b and
            Σ b² are those of sums over such blocks.

    Returns:
        Σ a, Σ b, Σ a², Σ a · b and Σ b² of each ratio, and the medians, float64 (layers, twins,
        columns), in the order of `TwinColumns`.
    """
    columns = TwinColumns(tuple(states))
    if not twins:
        return torch.zeros((len(mask), 0, len(columns)), dtype=torch.float64, device=mask.device)
    parts = [
        _measure_rows(
            mask[rows], fp32.cut(rows), [twin.cut(rows) for twin in twins], columns, blocks[rows]
        )
        for rows in _cut_rows(mask, 8 * len(twins) * len(columns.ratios))
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _cut_rows(mask: Tensor, bytes_per_element: int) -> list[slice]:
    """Return the rows of a mask in parts that need `_MOST_BYTES` of memory each, or a row each."""
    count, width = mask.shape
    most = max(_MOST_BYTES // max(bytes_per_element * width, 1), 1)
    return [slice(first, first + most) for first in range(0, max(count, 1), most)]


def _measure_rows(
    mask: Tensor,
    fp32: TwinStack,
    twins: Sequence[TwinStack],
    columns: TwinColumns,
    blocks: Sequence[int],
) -> Tensor:
    """Return what `measure_twins` does, for some layers.

    A *twin* is a sample of each layer that is stored and stepped as a recipe says; that in fp32 has
    float32 weights and states.
    """
    low, high = _join(twins, columns.states), _join([fp32], columns.states)
    finite = mask & low.are_finite & high.are_finite
    known = _find_known(finite, low, high)
    pairs = _pair_weights(mask, finite, low, high)
    lost = known & (low.states == 0)
    both = finite & low.states.isfinite() & high.states.isfinite()
    apart, size = (
        torch.where(both, each, 0.0).square() for each in (low.states - high.states, high.states)
    )
    for k, name in enumerate(columns.states):
        pairs[f"{name}_error"] = apart[k], size[k]
        pairs[f"{name}_zero_frac"] = lost[k], known[k]
    a, b = (torch.stack([pairs[name][side].double() for name in columns.ratios]) for side in (0, 1))
    sums = _sum_products(a, b, blocks)
    medians = _find_medians(torch.where(known, low.states / high.states, torch.nan))
    moved = (mask & high.are_finite & high.moved[0]).sum(-1).double()
    each_row = (
        sums.permute(3, 2, 1, 0).flatten(2),  # layers, twins, ratios and sums
        medians.permute(2, 1, 0),
        moved.expand(len(twins), -1).T.unsqueeze(-1),
    )
    return torch.cat(each_row, dim=2)


def measure_alone(
    mask: Tensor, run: TwinStack, has_gradient: Tensor, *, blocks: Sequence[int] = ()
) -> Tensor:
    """Sum up, for each layer, how many of the training's own weights moved or are not finite.

    It is used where no twin, a sample that is stepped on its own, can make the training's steps.
    The results are the sums of three shares Σ a / Σ b of a layer's sampled elements:

    - ``still_frac``: elements that did not move in the *window*, the time since the last observed
        step, of those that had a gradient other than 0 in the window. Where a twin with float32
        weights is stepped, the share is of the elements that this twin moved in the window.
    - ``moved_since_start_frac``: elements whose weight differs from that at the start, of those
        that are finite.
    - ``twin_nonfinite_frac``: elements that are NaN or inf at one of the four times of `TwinStack`,
        of all.

    Args:
        mask: bool (layers, width), False at padding.
        run: The weights of the training.
        has_gradient: True for elements that had a gradient other than 0 in the window, bool
            (layers, width).
        blocks: Number of neighbours that were drawn together in each layer, as in `measure_twins`.

    Returns:
        Σ a, Σ b, Σ a², Σ a · b and Σ b² of each share, float64 (layers, 1, columns), in the order
        of ``TwinColumns()``. The sums of other metrics are 0.
    """
    own = _join([run], ())
    finite = mask & own.are_finite
    tried = finite & has_gradient
    known = {
        "still_frac": (tried & ~own.moved[1], tried),
        "moved_since_start_frac": (finite & (own.moves[0] != 0), finite),
        "twin_nonfinite_frac": (mask & ~finite, mask.expand_as(finite)),
    }
    none = torch.zeros_like(finite)
    pairs = [known.get(name, (none, none)) for name in TwinColumns().ratios]
    a, b = (torch.stack([pair[side].double() for pair in pairs]) for side in (0, 1))
    sums = _sum_products(a, b, blocks).permute(3, 2, 1, 0).flatten(2)
    return torch.cat([sums, sums.new_zeros((*sums.shape[:2], 1))], dim=2)


def find_state_ratios(
    mask: Tensor, fp32: TwinStack, twins: Sequence[TwinStack], states: Sequence[str]
) -> Tensor:
    """Return the ratio of each optimizer state in each twin to that in the twin in fp32.

    A twin is a sample of each layer that is stored and stepped as a recipe says. The twin in fp32
    has float32 weights and states. `measure_twins` returns the medians of these ratios.

    Args:
        mask: bool (layers, width), False at padding.
        fp32: The twin in fp32.
        twins: The other twins, with the same sample.
        states: The names of the optimizer's states.

    Returns:
        float64 (layers, twins, states, width); NaN where a ratio has no value.
    """
    shape = (len(mask), len(twins), len(states), mask.shape[1])
    if not twins or not states:
        return torch.full(shape, torch.nan, dtype=torch.float64, device=mask.device)
    low, high = _join(twins, states), _join([fp32], states)
    known = _find_known(mask & low.are_finite & high.are_finite, low, high)
    return torch.where(known, low.states / high.states, torch.nan).permute(2, 1, 0, 3)


class _Joined(NamedTuple):
    """The tensors of several twins, joined along an axis of twins.

    A twin is a sample of a layer that is stored and stepped as a recipe says.

    Attributes:
        now: The weights after the latest step, float64 (twins, layers, width).
        are_finite: True if the element's weights are finite at all four times of `TwinStack`, bool
            (twins, layers, width).
        moves: Movements since the start, since the last observed step, and in the latest step,
            float64 (3, twins, layers, width).
        moved: True if a step since the start moved the weight, and True if one since the last
            observed step did, bool (2, twins, layers, width).
        states: The states after the latest step, NaN where a twin lacks a state, float64 (states,
            twins, layers, width).
    """

    now: Tensor
    are_finite: Tensor
    moves: Tensor
    moved: Tensor
    states: Tensor


def _join(stacks: Sequence[TwinStack], states: Sequence[str]) -> _Joined:
    """Return the tensors of twins joined along a new axis, so that one operation serves all.

    A twin is a sample of a layer that is stored and stepped as a recipe says. `states` names the
    states to join.
    """
    each = [torch.stack([one.now, one.start, one.window, one.before]).double() for one in stacks]
    weights = torch.stack(each, dim=1)
    moved = [torch.stack([one.moved, one.moved_in_window]) for one in stacks]
    missing = torch.full_like(weights[0, 0], torch.nan)
    rows = [torch.stack([one.states.get(s, missing).double() for one in stacks]) for s in states]
    return _Joined(
        weights[0],
        weights.isfinite().all(dim=0),
        weights[0] - weights[1:],
        torch.stack(moved, dim=1),
        torch.stack(rows) if rows else weights.new_empty((0, *weights.shape[1:])),
    )


def _find_known(finite: Tensor, low: _Joined, high: _Joined) -> Tensor:
    """Return True where a state's ratio of a twin to fp32 is known, bool like `low.states`.

    `low` are twins, samples that are stepped as recipes say; `high` is that in float32. `finite` is
    True for elements that are finite in both, bool (twins, layers, width).
    """
    return finite & low.states.isfinite() & high.states.isfinite() & (high.states != 0)


def _pair_weights(
    mask: Tensor, finite: Tensor, low: _Joined, high: _Joined
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the a and b of each element, for the ratios Σ a / Σ b that compare twins with fp32.

    A twin is a sample of a layer that is stored and stepped as a recipe says. The twin in fp32 has
    float32 weights and states.

    Args:
        mask: bool (layers, width), False at padding.
        finite: True for elements that are finite in the twin and in fp32, bool (twins, layers,
            width).
        low: The twins.
        high: The twin in fp32, with an axis of twins of length 1.

    Returns:
        For each name in `RATIOS` the tensors a and b, float64 or bool (twins, layers, width) each.
    """
    moves, moves32 = (torch.where(finite, each.moves, 0.0) for each in (low, high))
    apart = torch.where(finite, low.now - high.now, 0.0)
    weights = torch.where(finite, high.now, 0.0)
    products, squares = moves * moves32, moves32.square()
    moved32 = finite & high.moved
    frozen = moved32 & ~low.moved
    return {
        "progress_kept": (products[0], squares[0]),
        "window_progress_kept": (products[1], squares[1]),
        "drift": (apart.square(), squares[0]),
        "moved_rms": (squares[0], finite),
        "frozen_frac": (frozen[0], moved32[0]),
        "still_frac": (frozen[1], moved32[1]),
        "step_projection": (products[2], squares[2]),
        "decay_projection": (apart * weights, weights.square()),
        "moved_since_start_frac": (finite & (low.moves[0] != 0), finite),
        "twin_nonfinite_frac": (mask & ~finite, mask.expand_as(finite)),
    }


def _sum_products(a: Tensor, b: Tensor, blocks: Sequence[int]) -> Tensor:
    """Return Σ a, Σ b, Σ a², Σ a · b and Σ b² for ratios Σ a / Σ b over a twin's elements.

    The products are those of sums of a and b over blocks, which were drawn together.

    Args:
        a: What elements add to the numerators, float64 (ratios, twins, layers, width).
        b: What they add to the denominators, the same shape.
        blocks: Number of elements of a block in each layer; empty for single elements.

    Returns:
        The five sums, float64 (5, ratios, twins, layers).
    """
    sizes = {*blocks} or {1}
    if len(sizes) == 1:
        return _sum_block_products(a, b, *sizes)
    sums = a.new_empty((len(SUMS), *a.shape[:-1]))
    for size in sorted(sizes):
        is_own = torch.tensor([own == size for own in blocks], device="cpu").nonzero().flatten()
        rows = is_own.to(a.device)
        sums[..., rows] = _sum_block_products(a[:, :, rows], b[:, :, rows], size)
    return sums


def _sum_block_products(a: Tensor, b: Tensor, size: int) -> Tensor:
    a, b = (_add_up_blocks(each, size) for each in (a, b))
    return torch.stack([each.sum(-1) for each in (a, b, a * a, a * b, b * b)])


def _add_up_blocks(numbers: Tensor, size: int) -> Tensor:
    """Add up each block of `size` neighbours on the last axis, from (…, width) to (…, blocks)."""
    if size == 1:
        return numbers
    padded = pad(numbers, (0, -numbers.shape[-1] % size))
    return padded.view(*padded.shape[:-1], padded.shape[-1] // size, size).sum(-1)


def _find_medians(numbers: Tensor) -> Tensor:
    """Return the median along the last axis, leaving out NaN; of two in the middle, the lower."""
    if not numbers.shape[-1]:
        return numbers.new_full(numbers.shape[:-1], torch.nan)
    return numbers.nanmedian(dim=-1).values
