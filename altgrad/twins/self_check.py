"""The self-check: does the reference twin equal the run?

A twin steps a sample of each layer of the *run*, the training that is watched, as a recipe says.
The *reference twin* has the recipe of the run itself, so its weights must be those of the run. If
they are, every other twin differs from the run by its recipe alone. `compare` counts on the device,
and `judge` reads the counts on the host.

Read `twin` first; `shared_objects` comes next, the first file about the optimizer of a twin.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from altgrad.measurement.numbers import Numbers
from altgrad.quantization import compute_ulp_distance

_SLACK = 2.0**-10
"""Difference between a twin and the training that counts as rounding, as a share of movement.

The twin is a sample that is stepped as the training is. Movement is that of the weight since the
start.
"""
_ULPS = {torch.float32: 4.0, torch.float64: 4.0}
"""Difference between a twin and the training that counts as rounding, in spacings of the dtype.

The twin is a sample that is stepped as the training is. In dtypes of 16 bits, it is 0.
"""
MOST_TAILS = 0.03
"""Share of the moved elements by which a twin may differ from the training because of tails.

The twin is a sample that is stepped as the training is. Vectorised loops round the *tail* of a
tensor, its last elements, by other code. Tails were up to 0.026 of the elements where they were
measured.
"""
_FEW = 0.2
"""Share of the moved elements that may differ by more than rounding in a twin that is right.

The twin is a sample that is stepped as the training is. A wrong optimizer moves nearly all elements
by another amount.
"""

COUNTS = ("different", "far", "moved", "ulps", "outside", "suspected")
"""Names of the counts by which a sample, stepped as the training is, differs from it in a layer.

In order: elements that differ at all; those that differ by more than rounding; elements that moved
since the start; the largest difference in spacings; how often weights were taken over that
something other than a step had changed; and 1 if they were taken over before this step although
torch had counted no write to them, else 0.
"""


class Check(Enum):
    """The result of a self-check of one layer, from best to worst.

    The self-check asks whether a *twin*, a sample that is stepped just as the training is, has the
    training's weights.

    `NOT_CHECKABLE` is a training that a `WeightStorage`, or an optimizer that rounds at random,
    rounds in another way than the twin. At the first step the two then differ by at most one
    spacing. *Tails* are a few elements at the ends of a tensor, which torch may round otherwise.
    """

    EQUAL = "equal"
    TAILS = "equal but for tails"
    NOT_CHECKABLE = "not checkable"
    DIFFERENT = "different"


def compare(
    run: Tensor, twin: Tensor, start: Tensor, mask: Tensor, spacings: Tensor | None = None
) -> Tensor:
    """Count the sampled elements by which a reference twin differs from the training.

    The *reference twin* is a sample of the layers that is stepped just as the training is.

    NaN equals NaN.

    Args:
        run: The weights of the training, float16, bfloat16, float32 or float64 (layers, width).
        twin: The weights of the twin, the same dtype and shape.
        start: The weights of the twin when it began, in the same dtype and shape.
        mask: bool (layers, width), False at padding.
        spacings: The distance between neighbouring numbers of the format in which the training
            stores each weight, float64 (layers, width); 0 where it stores them in `run`'s dtype,
            and None if it does everywhere. A difference of one spacing counts as rounding.

    Returns:
        float64 (layers, 4): the first four of `COUNTS`: elements that differ, that differ by more
        than rounding, and that moved, and the largest difference in spacings.
    """
    differs = mask & (run != twin) & ~(run.isnan() & twin.isnan())
    moved = mask & ((run != start) | (twin != start))
    # NaN if only one of the two is finite, which counts as far.
    ulps = torch.where(differs, compute_ulp_distance(run, twin).double(), 0.0)
    movement = (run.double() - start.double()).abs()
    size = (run.double() - twin.double()).abs()
    near = (ulps <= _ULPS.get(run.dtype, 0.0)) | (size <= _SLACK * movement)
    if spacings is not None:
        ulps = torch.where((spacings > 0) & differs, size / spacings, ulps)
        near |= size <= spacings
    far = differs & ~near
    most = ulps.nan_to_num(torch.inf).amax(1) if run.shape[1] else ulps.new_zeros(len(run))
    return torch.stack([*(each.sum(1).double() for each in (differs, far, moved)), most], dim=1)


def find_suspected(counts: Tensor) -> Tensor:
    """Find the layers in which too many elements of a twin differ from the training.

    The *twin* is a sample that is stepped as the training is. Too many are more than the share
    `MOST_TAILS` of the moved elements. Only differences beyond rounding count.

    Args:
        counts: Result of `compare`, (layers, 4 or more).

    Returns:
        bool (layers).
    """
    return counts[:, 1] > MOST_TAILS * counts[:, 2]


def are_rounded_otherwise(counts: Numbers) -> bool:
    """Return True if a twin differs from the training, but by at most one spacing.

    The *twin* is a sample that has made one step just as the training has. A difference of one
    spacing means that the training rounds weights by other code or with other random numbers.

    Args:
        counts: Result of `compare` on the host, (layers, 4 or more).
    """
    return bool(counts[:, 0].any()) and bool((counts[:, 3] <= 1).all())


def judge(counts: Numbers, *, draws: bool = False, is_first: bool = False) -> list[Check]:
    """Return for each layer whether the reference twin equals the training.

    The *reference twin* is a sample of the layers that is stepped just as the training is.

    Args:
        counts: Result of `compare` on the host, (layers, 4 or more).
        draws: True if the training's optimizer draws random numbers in its steps.
        is_first: True if the twins have made a single step.

    Returns:
        The results in the order of the rows.
    """
    return [_judge_layer(*row, draws=draws, is_first=is_first) for row in counts[:, :4].tolist()]


def _judge_layer(
    differs: float, far: float, moved: float, ulps: float, *, draws: bool, is_first: bool
) -> Check:
    """Return the result of a layer's self-check, from counts of its sampled elements.

    The self-check asks whether a sample that is stepped as the training is equals the training.

    Args:
        differs: Number of sampled elements that differ from the training at all.
        far: Number of those that differ by more than rounding.
        moved: Number of sampled elements that moved since the start.
        ulps: The largest difference, in spacings of the dtype or of the format that stores weights.
        draws: True if the training's optimizer draws random numbers in its steps.
        is_first: True if the sample has made a single step.
    """
    if not differs:
        return Check.EQUAL
    if draws and (ulps <= 1 or not is_first):
        return Check.NOT_CHECKABLE
    return Check.TAILS if far <= _FEW * moved else Check.DIFFERENT
