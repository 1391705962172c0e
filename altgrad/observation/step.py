"""Describe a finished step: `OptimizerStep` has its tensors, and `StepOutcome` its result.

Every observed step that ends has one `StepOutcome`. It contains an `OptimizerStep`, the reason why
no weight moved, or an error.

Read `snapshots` first; `grad_scaler` comes next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from altgrad.observation.snapshots import Snapshot, read_weights_after

SkipReason: TypeAlias = Literal["inf", "no gradients", "learning rate 0"]
"""The reason why a step moved no weight, explained at `StepObserver.skipped`."""


@dataclass(frozen=True, eq=False)
class OptimizerStep:
    """A step of an optimizer, as parallel tuples with one entry for each parameter.

    The tensors are valid until the callback of `StepObserver` returns. Their memory is reused
    afterwards, and the tensors in `after` share memory with the parameters. Clone what you keep,
    and change nothing in place.

    Each tensor has the dtype and shape of its parameter's local shard. If only some elements of a
    parameter are observed, its tensors are one-dimensional and hold those elements.

    Attributes:
        names: Names of the parameters that had a gradient, a part of `StepObserver.names`.
        before: The weights just before the step.
        gradients: The gradients that the optimizer applied: accumulated, clipped, divided by the
            loss scale, and dense.
        after: The weights just after the step.
        optimizer: The torch optimizer that made the step.
        index: Number of steps of this optimizer since it was attached, before this one.
        found_inf: One element, other than 0 if a fused optimizer under a GradScaler skipped the
            step; None for other optimizers.
        resting: Names of parameters that did not move, because their learning rate is 0. The step
            that `on_step` receives leaves such parameters out. Another rank may hold elements of
            such a parameter that moved.
    """

    names: tuple[str, ...]
    before: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    after: tuple[Tensor, ...]
    optimizer: Optimizer
    index: int
    found_inf: Tensor | None = None
    resting: frozenset[str] = frozenset()

    def without_resting(self) -> OptimizerStep:
        """Return the step without the parameters in `resting`."""
        if not self.resting:
            return self
        kept = [k for k, name in enumerate(self.names) if name not in self.resting]
        return replace(
            self,
            names=tuple(self.names[k] for k in kept),
            before=tuple(self.before[k] for k in kept),
            gradients=tuple(self.gradients[k] for k in kept),
            after=tuple(self.after[k] for k in kept),
            resting=frozenset(),
        )


@dataclass(frozen=True, eq=False)
class StepOutcome:
    """The outcome of an observed step: shown, skipped or failed.

    Attributes:
        optimizer: The torch optimizer that made the step.
        index: Number of steps of this optimizer since it was attached, before this one.
        step: The step with its tensors; None if there was an error. A skipped step is given, too,
            since another rank may hold elements that moved.
        skipped: The reason why the step was skipped on this rank: ``"inf"``, ``"no gradients"`` or
            ``"learning rate 0"``, as `StepObserver` explains them. None for any other step.
        error: The error that was raised while the step was observed; None if there was no error.
        copy_seconds: Time that the host took to copy weights and gradients, in seconds.
    """

    optimizer: Optimizer
    index: int
    step: OptimizerStep | None = None
    skipped: SkipReason | None = None
    error: Exception | None = None
    copy_seconds: float = 0.0

    @property
    def shown(self) -> tuple[str, ...]:
        """The layers that the record of the step will have; none of a skipped or failed step."""
        if self.step is None or self.skipped is not None:
            return ()
        return tuple(name for name in self.step.names if name not in self.step.resting)


class EveryStep(Protocol):
    """An object that takes part in each step of an optimizer, observed or not.

    Its methods raise no error of their own: they are called inside of the user's training step.
    """

    def capture(self, optimizer: Optimizer, *, is_observed: bool) -> None:
        """Read gradients, which are final, and weights, none of which has moved.

        Args:
            optimizer: The optimizer that is about to step.
            is_observed: True if the step is observed.
        """

    def finish(self, optimizer: Optimizer, unseen: str) -> None:
        """Read the weights after the step, before an observed step is delivered.

        Args:
            optimizer: The optimizer that has stepped.
            unseen: The reason why `capture` was not called in this step; empty if it was.
        """


def make_step(snapshots: Sequence[Snapshot], optimizer: Optimizer, index: int) -> OptimizerStep:
    """Return the step that has just ended.

    Args:
        snapshots: The copy of each parameter from before the step.
        optimizer: The torch optimizer that made the step.
        index: Number of steps of this optimizer since it was attached, before this one.
    """
    after = read_weights_after(snapshots)
    return OptimizerStep(
        names=tuple(each.name for each in snapshots),
        before=tuple(each.before for each in snapshots),
        gradients=tuple(each.gradient for each in snapshots),
        after=tuple(after),
        optimizer=optimizer,
        index=index,
        # GradScaler sets this attribute on fused optimizers: torch/amp/grad_scaler.py, step.
        found_inf=getattr(optimizer, "found_inf", None),
        resting=frozenset(
            each.name
            for each, weights in zip(snapshots, after, strict=True)
            # Some optimizers move weights although the rate is 0; that is a step like any other.
            # torch.equal would not do: NaN differs from itself.
            if each.rests and torch.allclose(each.before, weights, rtol=0, atol=0, equal_nan=True)
        ),
    )
