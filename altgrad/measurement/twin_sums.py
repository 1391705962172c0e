"""Sum up what twins have done: for each layer and recipe a row of columns, on the device.

Each figure of a twin is a ratio Σ a / Σ b over elements, or a median. `TwinColumns` names the
columns, and `measure_twins` computes them. `twin_table` comes next and turns them into figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

SUMS = ("a", "b", "aa", "ab", "bb")
"""The sums of a ratio Σ a / Σ b: of a and b, and of their products, from which errors follow."""

RATIOS = (
    *("progress_kept", "window_progress_kept", "drift", "frozen_frac", "still_frac"),
    *("step_projection", "decay_projection", "twin_nonfinite_frac"),
)
"""The ratios of each twin; that of ``drift`` is squared."""


class TwinStack(NamedTuple):
    """The sample of one recipe, or that of fp32, with a row for each layer: (layers, width).

    An element is finite if all four of its weights are.

    Attributes:
        start: The weights at the start of the twin.
        window: The weights at the last observed step.
        before: The weights before the last step.
        now: The weights now.
        moved_in_window: bool; moved by a step since the last observed one.
        moved: bool; moved by a step since the start.
        states: The states of the optimizer now, by name.
    """

    start: Tensor
    window: Tensor
    before: Tensor
    now: Tensor
    moved_in_window: Tensor
    moved: Tensor
    states: Mapping[str, Tensor]


@dataclass(frozen=True)
class TwinColumns:
    """The columns of a twin's row: five sums of each ratio, then the median of each state.

    Attributes:
        states: The names of the states.
    """

    states: tuple[str, ...] = ()

    @cached_property
    def ratios(self) -> tuple[str, ...]:
        """The names of the ratios."""
        return (*RATIOS, *(f"{state}_zero_frac" for state in self.states))

    @cached_property
    def medians(self) -> tuple[str, ...]:
        """The names of the medians."""
        return tuple(f"{state}_ratio" for state in self.states)

    def __len__(self) -> int:
        return len(self.ratios) * len(SUMS) + len(self.medians) + 1


def measure_twins(
    mask: Tensor,
    fp32: TwinStack,
    twins: Sequence[TwinStack],
    states: Sequence[str],
    *,
    block: int = 1,
) -> Tensor:
    """Sum up twins beside the twin that stores nothing low.

    Elements that are not finite in a twin or in float32 count in ``twin_nonfinite_frac`` alone.

    Args:
        mask: bool (layers, width), False at padding.
        fp32: The sample of the twin in float32.
        twins: The samples of the twins.
        states: The names of the states.
        block: Number of neighbours that were drawn together, of which the width is a multiple.
            Squares are those of sums over such blocks.

    Returns:
        float64 (layers, twins, columns), with the columns of `TwinColumns`; the last is the number
        of elements that the float32 twin has moved.
    """
    columns = TwinColumns(tuple(states))
    if not twins:
        return torch.zeros((len(mask), 0, len(columns)), dtype=torch.float64, device=mask.device)
    low, high = _join(twins, columns.states), _join([fp32], columns.states)
    finite = mask & low.are_finite & high.are_finite
    known = finite & low.states.isfinite() & high.states.isfinite() & (high.states != 0)
    pairs = _pair_weights(mask, finite, low, high)
    lost = known & (low.states == 0)
    pairs |= {f"{name}_zero_frac": (lost[k], known[k]) for k, name in enumerate(columns.states)}
    a, b = (
        _add_up_blocks(torch.stack([pairs[name][side].double() for name in columns.ratios]), block)
        for side in (0, 1)
    )
    sums = torch.stack([each.sum(-1) for each in (a, b, a * a, a * b, b * b)])
    medians = _find_medians(torch.where(known, low.states / high.states, torch.nan))
    moved = (mask & high.are_finite & high.moved[0]).sum(-1).double()
    each_row = (
        sums.permute(3, 2, 1, 0).flatten(2),  # layers, twins, ratios and sums
        medians.permute(2, 1, 0),
        moved.expand(len(twins), -1).T.unsqueeze(-1),
    )
    return torch.cat(each_row, dim=2)


class _Joined(NamedTuple):
    """The samples of several twins: float64 or bool (…, twins, layers, width).

    Attributes:
        now: The weights now, (twins, layers, width).
        are_finite: bool (twins, layers, width): all weights of the element are finite.
        moves: Movements since the start, since the last observed step, and in the last step, (3,
            twins, layers, width).
        moved: bool; moved since the start, and since the last observed step, (2, twins, layers,
            width).
        states: The states now, NaN where a twin has none, (states, twins, layers, width).
    """

    now: Tensor
    are_finite: Tensor
    moves: Tensor
    moved: Tensor
    states: Tensor


def _join(stacks: Sequence[TwinStack], states: Sequence[str]) -> _Joined:
    """Join the samples of twins, so that each operation is done for all of them at once."""
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


def _pair_weights(
    mask: Tensor, finite: Tensor, low: _Joined, high: _Joined
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return what each element adds to the sums of the ratios of weights.

    Args:
        mask: bool (layers, width), False at padding.
        finite: bool (twins, layers, width); elements that are finite in the twin and in float32.
        low: The twins.
        high: The twin in float32, as one of one.

    Returns:
        For each name in `RATIOS` the tensors a and b, (twins, layers, width) each.
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
        "frozen_frac": (frozen[0], moved32[0]),
        "still_frac": (frozen[1], moved32[1]),
        "step_projection": (products[2], squares[2]),
        "decay_projection": (apart * weights, weights.square()),
        "twin_nonfinite_frac": (mask & ~finite, mask.expand_as(finite)),
    }


def _add_up_blocks(numbers: Tensor, block: int) -> Tensor:
    """Add up the elements of each block, (…, width / block)."""
    if block == 1:
        return numbers
    return numbers.view(*numbers.shape[:-1], numbers.shape[-1] // block, block).sum(-1)


def _find_medians(numbers: Tensor) -> Tensor:
    """Return the median of each row, NaN left out, the lower one of two: (…)."""
    if not numbers.shape[-1]:
        return numbers.new_full(numbers.shape[:-1], torch.nan)
    return numbers.nanmedian(dim=-1).values
