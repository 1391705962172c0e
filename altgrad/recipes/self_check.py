"""The self-check: does the reference twin equal the run?

The reference twin has the recipe of the run itself, so its weights must be those of the run. If
they are, every other twin differs from the run by its recipe alone. `compare` counts on the device,
and `judge` reads the counts on the host. `lane` comes next and calls both.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from altgrad.measurement.numbers import Numbers
from altgrad.quantization import compute_ulp_distance

_SLACK = 2.0**-10
"""Share of its movement by which a weight may differ and count as nearly equal."""
_ULPS = {torch.float32: 4.0, torch.float64: 4.0}
"""Spacings by which a weight of a wide dtype may differ and count as nearly equal."""
MOST_TAILS = 0.03
"""Share of the moved elements that may differ by more, as tails of vectorised loops do.

Tails were up to 0.026 of the elements where they were measured.
"""
_FEW = 0.2
"""Share of the moved elements that may differ by more before the twin is called different.

A wrong optimizer moves nearly all elements by another amount.
"""

COUNTS = ("different", "far", "moved", "ulps", "outside", "suspected")
"""The counts of a layer: elements that differ at all, and by more than rounding; elements that
moved; the largest difference in spacings; how often weights were taken over that something other
than a step moved; and whether they were, before this step, without a write that torch has counted.
"""


class Check(Enum):
    """The result of a self-check of one layer.

    A run whose optimizer rounds at random is not checkable: the twin draws other numbers. At the
    first step both start alike, and differ by at most one spacing.
    """

    EQUAL = "equal"
    TAILS = "equal but for tails"
    NOT_CHECKABLE = "not checkable"
    DIFFERENT = "different"


def compare(run: Tensor, twin: Tensor, start: Tensor, mask: Tensor) -> Tensor:
    """Count the elements by which a reference twin differs from the run.

    NaN equals NaN.

    Args:
        run: The weights of the run, float16, bfloat16, float32 or float64 (layers, width).
        twin: The weights of the twin, the same dtype and shape.
        start: The weights of the twin at its start.
        mask: bool (layers, width), False at padding.

    Returns:
        float64 (layers, 4): the first four of `COUNTS`.
    """
    differs = mask & (run != twin) & ~(run.isnan() & twin.isnan())
    moved = mask & ((run != start) | (twin != start))
    # NaN if only one of the two is finite, which counts as far.
    ulps = torch.where(differs, compute_ulp_distance(run, twin).double(), 0.0)
    movement = (run.double() - start.double()).abs()
    size = (run.double() - twin.double()).abs()
    near = (ulps <= _ULPS.get(run.dtype, 0.0)) | (size <= _SLACK * movement)
    far = differs & ~near
    most = ulps.nan_to_num(torch.inf).amax(1) if run.shape[1] else ulps.new_zeros(len(run))
    return torch.stack([*(each.sum(1).double() for each in (differs, far, moved)), most], dim=1)


def find_suspected(counts: Tensor) -> Tensor:
    """Return the layers that differ in more elements than tails can explain.

    Args:
        counts: Result of `compare`, (layers, 4 or more).

    Returns:
        bool (layers).
    """
    return counts[:, 1] > MOST_TAILS * counts[:, 2]


def judge(counts: Numbers, *, draws: bool = False, is_first: bool = False) -> list[Check]:
    """Return the result of the self-check of each layer.

    Args:
        counts: Result of `compare` on the host, (layers, 4 or more).
        draws: True if the run's optimizer draws random numbers in its steps.
        is_first: True after the first step of the twins.
    """
    return [_judge_layer(*row, draws=draws, is_first=is_first) for row in counts[:, :4].tolist()]


def _judge_layer(
    differs: float, far: float, moved: float, ulps: float, *, draws: bool, is_first: bool
) -> Check:
    if not differs:
        return Check.EQUAL
    if draws and (ulps <= 1 or not is_first):
        return Check.NOT_CHECKABLE
    return Check.TAILS if far <= _FEW * moved else Check.DIFFERENT
