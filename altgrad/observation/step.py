"""`OptimizerStep`: one step of an optimizer, as it happened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from altgrad.observation.snapshots import Snapshot, weights_after


@dataclass(frozen=True, eq=False)
class OptimizerStep:
    """One step of an optimizer, as it happened: parallel sequences, an entry per parameter.

    The tensors are valid until `StepObserver`'s `on_step` returns: their memory is used again, and
    `after` is the parameters' own. Clone what you keep, and change none.

    Attributes:
        names: Names of the parameters that had a gradient, as `StepObserver.names` has them.
        before: Their weights just before the step; of a parameter of which only some elements are
            observed, those, in one dimension.
        gradients: Their gradients as the optimizer applied them: accumulated, clipped, divided by
            the loss scale, and dense.
        after: Their weights just after the step.
        optimizer: The optimizer.
        index: How many steps of this optimizer came before it since it was attached.
        found_inf: Of a fused optimizer under a GradScaler: one element, not 0 if the optimizer
            skipped the step. None otherwise.
        resting: Names of those that a learning rate of 0 kept where they were, as far as can be
            seen here: shown where other processes see the rest of them, and never else.
    """

    names: tuple[str, ...]
    before: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    after: tuple[Tensor, ...]
    optimizer: Optimizer
    index: int
    found_inf: Tensor | None = None
    resting: frozenset[str] = frozenset()


def step_of(
    snapshots: Sequence[Snapshot], optimizer: Optimizer, index: int, *, show_resting: bool = False
) -> OptimizerStep:
    """The step that has just ended, without what a learning rate of 0 kept where it was."""
    both = [*zip(snapshots, weights_after(snapshots), strict=True)]
    resting = frozenset(snapshot.name for snapshot, after in both if _rests(snapshot, after))
    if not show_resting:
        both = [(snapshot, after) for snapshot, after in both if snapshot.name not in resting]
    return OptimizerStep(
        names=tuple(snapshot.name for snapshot, _ in both),
        before=tuple(snapshot.before for snapshot, _ in both),
        gradients=tuple(snapshot.gradient for snapshot, _ in both),
        after=tuple(after for _, after in both),
        optimizer=optimizer,
        index=index,
        found_inf=getattr(optimizer, "found_inf", None),
        resting=resting if show_resting else frozenset(),
    )


def _rests(snapshot: Snapshot, after: Tensor) -> bool:
    """Some optimizers move weights in spite of the rate: that is a step like any other."""
    return snapshot.rests and torch.allclose(snapshot.before, after, rtol=0, atol=0, equal_nan=True)
