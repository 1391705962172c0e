"""Describe a finished step: `OptimizerStep` has its tensors, and `StepOutcome` its result.

Every observed step that ends has one `StepOutcome`. It contains an `OptimizerStep`, and the reason
if no weight moved; or it contains an error. `EveryStep` has methods that are called at every step.

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
"""The reason why a step moved no weight; the attribute `StepObserver.skipped` explains each."""


@dataclass(frozen=True, eq=False)
class OptimizerStep:
    """A step of an optimizer, as parallel tuples with one entry for each parameter.

    The tensors are valid until the callback of `StepObserver` returns. Their memory is reused
    afterwards, and tensors in `after` may share memory with the parameters. Clone what you keep,
    and change nothing in place.

    Each tensor has the shape of its parameter's local shard. If only some elements of a parameter
    are observed, its tensors are one-dimensional and hold those elements. Weights have the dtype of
    the parameter, gradients that of its gradient.

    Attributes:
        names: Names of the parameters of the other tuples, in order: those that had a gradient, as
            named in `StepObserver.names`.
        before: The weights just before the step.
        gradients: The gradients that the optimizer applied: accumulated, clipped, divided by the
            loss scale, and dense.
        after: The weights just after the step.
        optimizer: The torch optimizer that made the step.
        index: Number of steps that this optimizer made before this one, since it was attached.
        found_inf: A tensor of one element, other than 0 if a fused optimizer under a GradScaler
            skipped the step. None for other optimizers.
        resting: Names of parameters whose learning rate is 0 and that did not move on this rank;
            elements on other ranks may have moved. It is empty in a step that `on_step` receives,
            which leaves these parameters out.
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
        """Return the step without parameters that did not move as their learning rate is 0."""
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
    """The outcome of an observed step: its tensors, or why it moved no weight, or an error.

    Attributes:
        optimizer: The torch optimizer that made the step.
        index: Number of steps that this optimizer made before this one, since it was attached.
        step: The step with its tensors; None if there was an error. A skipped step is given, too,
            since another rank may hold elements that moved.
        skipped: The reason why the step was skipped on this rank: ``"inf"``, ``"no gradients"`` or
            ``"learning rate 0"``, as `StepObserver` explains them. None if it was not skipped.
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
        """The names of the parameters to which the step was applied.

        They are those in `step`, which had a gradient, except those that a learning rate of 0 kept
        in place. The result is empty if the step was skipped, or if it failed with an error.
        """
        if self.step is None or self.skipped is not None:
            return ()
        return tuple(name for name in self.step.names if name not in self.step.resting)


class EveryStep(Protocol):
    """An interface (Protocol) of objects that are called before and after each optimizer step.

    The calls are made in every step, observed or not.

    Its methods should catch their own errors: `StepObserver` lets them pass into the user's
    training step.
    """

    def capture(self, optimizer: Optimizer, *, is_observed: bool) -> None:
        """Read the final gradients and the weights, just before the optimizer moves the weights.

        Args:
            optimizer: The optimizer that is about to step.
            is_observed: True if the step is observed.
        """

    def finish(self, optimizer: Optimizer, unseen: str) -> None:
        """Read the weights just after the step, before the observer's callback gets the step.

        Args:
            optimizer: The optimizer that has stepped.
            unseen: The reason why `capture` was not called in this step; empty if it was called.
        """

    def stop(self) -> None:
        """Stop watching the training: the observation has ended, and no step is shown any more."""


def make_step(snapshots: Sequence[Snapshot], optimizer: Optimizer, index: int) -> OptimizerStep:
    """Return the step that has just ended, with the current weights as those after the step.

    Args:
        snapshots: The copy of each parameter from before the step.
        optimizer: The torch optimizer that made the step.
        index: Number of steps that this optimizer made before this one, since it was attached.
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
            # Some optimizers move weights although the rate is 0, so that weights are compared.
            # torch.equal would not do: for it, NaN differs from NaN.
            if each.rests and torch.allclose(each.before, weights, rtol=0, atol=0, equal_nan=True)
        ),
    )
