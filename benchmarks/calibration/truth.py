"""What became of a run in low precision, compared with the run in fp32, from all elements.

Nothing here comes from AltGrad. Sums of layers add up to those of the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.twin_runs import Run


class Truth(NamedTuple):
    """Sums over the elements of a layer or a model.

    Attributes:
        dot: ⟨low, fp32⟩ of the movements since the start.
        energy: ‖fp32‖² of these.
        apart: ‖low − fp32‖² of the weights.
        size: ‖fp32‖² of the weights at the end.
        moved: Number of elements that the fp32 run moved.
        frozen: Number of these that the low run never moved.
        broken: Number of elements that are not finite in the low run.
    """

    dot: float
    energy: float
    apart: float
    size: float
    moved: float
    frozen: float
    broken: float

    def figures(self) -> dict[str, float]:
        """Return progress_kept, drift, frozen_frac, and the relative movement in fp32."""
        return {
            "real_kept": _divide(self.dot, self.energy),
            "real_drift": math.sqrt(_divide(self.apart, self.energy)),
            "real_frozen": _divide(self.frozen, self.moved),
            "real_nonfinite": self.broken,
            "fp32_moved": math.sqrt(_divide(self.energy, self.size)),
        }


def find_truth(low: Run, high: Run, name: str) -> Truth:
    """Sum up over the elements of a layer.

    Args:
        low: The run in low precision.
        high: The run in fp32.
        name: Name of the layer.
    """
    ours, theirs = low.movement(name), high.movement(name)
    weights, weights32 = (run.parameters[name].detach().double() for run in (low, high))
    finite = ours.isfinite() & theirs.isfinite()

    def add_up(numbers: Tensor) -> float:
        return numbers[finite].double().sum().item()

    moved = high.moved[name]
    return Truth(
        add_up(ours * theirs),
        add_up(theirs.square()),
        add_up((weights - weights32).square()),
        add_up(weights32.square()),
        add_up(moved),
        add_up(moved & ~low.moved[name]),
        (~finite).sum().item(),
    )


def join(truths: Iterable[Truth]) -> Truth:
    """Add up the sums of layers to those of the model."""
    return Truth(*map(math.fsum, zip(*truths, strict=True)))


def find_state_ratio(low: Run, high: Run, name: str | None, state: str) -> float:
    """Return the median of low / fp32 of a state of the optimizer; NaN without the state.

    Args:
        low: The run in low precision.
        high: The run in fp32.
        name: Name of the layer; None for all layers together.
        state: Name of the state.
    """
    names = [*high.parameters] if name is None else [name]
    pairs = [(low.state(n, state).flatten(), high.state(n, state).flatten()) for n in names]
    ours, theirs = (torch.cat(each) for each in zip(*pairs, strict=True))
    known = ours.isfinite() & theirs.isfinite() & (theirs != 0)
    return (ours / theirs)[known].median().item() if known.any() else math.nan


def _divide(a: float, b: float) -> float:
    return a / b if b else math.nan
