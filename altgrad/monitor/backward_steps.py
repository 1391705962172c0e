"""`BackwardSteps`: join the steps that optimizers make inside a backward pass to training steps.

To save memory, some trainings step each parameter as soon as its gradient is final, inside the
backward pass, and free the gradient. A hook of the parameter then steps an optimizer of its own,
or steps a part of one optimizer. A training step is all such steps of one backward pass::

    backward pass 0:  head  body  stem     one training step, with the index 0
    backward pass 1:  head  body  stem     the next one; it begins as the head is stepped again

Read `schedule` first; `monitor` comes next, which shows a training step as one record.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import Optimizer

from altgrad.measurement.merging import merge_records
from altgrad.measurement.step_record import StepRecord
from altgrad.observation.step_hooks import find_backward_pass

_OUTSIDE = -1  # in place of the number of a backward pass


class BackwardSteps:
    """The steps of one training step, of optimizers that step inside the backward pass.

    Attributes:
        index: Index of the training step, from 0; -1 before the first.
        leader: The optimizer that stands for all, in what is kept for each optimizer; None before
            the first training step.
        is_observed: True if the training step is observed, as the owner has decided.
        expected: Names of the layers with which the training step is complete.
    """

    def __init__(self) -> None:
        self.index = -1
        self.leader: Optimizer | None = None
        self.is_observed = False
        self.expected: Collection[str] = ()
        self._passes: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._records: list[StepRecord] = []

    def has(self, optimizer: Optimizer) -> bool:
        """Return True if an optimizer has made a step in the current training step."""
        return self._passes.get(optimizer, _OUTSIDE) != _OUTSIDE

    @property
    def is_complete(self) -> bool:
        """True if all expected layers have been observed in the current training step."""
        observed = {name for each in self._records for name in each.layers}
        return observed.issuperset(self.expected)

    def begins(self, optimizer: Optimizer) -> bool:
        """Return True if a new training step begins with the coming step of an optimizer.

        It does if the optimizer has stepped already, and in another backward pass. Optimizers may
        step in several passes of one training step, as with reentrant checkpoints.

        Args:
            optimizer: The optimizer that is about to step, inside a backward pass.
        """
        known = self._passes.get(optimizer)
        return self.index < 0 or (known is not None and known != find_backward_pass())

    def begin(self, optimizer: Optimizer) -> None:
        """Begin a new training step with the coming step of an optimizer."""
        self.index += 1
        self.leader = self.leader or optimizer
        self._passes.clear()
        self._records.clear()

    def join(self, optimizer: Optimizer) -> None:
        """Count the coming step of an optimizer as a part of the current training step."""
        backward_pass = find_backward_pass()
        if backward_pass is not None:
            self._passes[optimizer] = backward_pass

    def leave(self, optimizer: Optimizer) -> None:
        """Note that an optimizer makes a step outside of a backward pass.

        Its next step inside of one begins a new training step.
        """
        if optimizer in self._passes:
            self._passes[optimizer] = _OUTSIDE

    def add(self, record: StepRecord) -> None:
        """Keep the record of an observed step, until `take_record` takes it."""
        self._records.append(record)

    def take_record(self, names: Iterable[str], seconds: tuple[float, float]) -> StepRecord | None:
        """Return the record of the training step so far, and forget its parts.

        Args:
            names: The names of all layers, in the order of the record.
            seconds: `StepRecord.own_seconds` and `StepRecord.training_seconds`.

        Returns:
            One record with the layers of all steps, and the figures of the model over all of them.
            None if no step was observed.
        """
        if not self._records:
            return None
        merged = merge_records(self._records)
        self._records.clear()
        layers = {name: merged.layers[name] for name in names if name in merged.layers}
        return StepRecord(self.index, layers, merged.model, *seconds)


def has_gradients(optimizer: Optimizer) -> bool:
    """Return True if a parameter of an optimizer has a gradient."""
    groups: list[list[Tensor]] = [group["params"] for group in optimizer.param_groups]
    return any(each.grad is not None for parameters in groups for each in parameters)
