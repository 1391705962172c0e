"""`BackwardSteps`: join the steps that optimizers make inside a backward pass to training steps.

To save memory, some trainings step each parameter as soon as its gradient is final, inside the
backward pass, and free the gradient. A hook of the parameter then steps an optimizer of its own,
or steps a part of one optimizer. A training step is all such steps, each of another layer::

    backward pass 0:  head  body  stem     one training step, with the index 0
    backward pass 1:  head  body  stem     the next one; it begins as the head is stepped again

A reentrant checkpoint runs a backward pass of its own, whose layers belong to the same training
step.

Read `policy` first; `training_steps` comes next, which shows a training step as one record.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from weakref import WeakSet

from torch import Tensor
from torch.optim import Optimizer

from altgrad.measurement.merging import merge_records
from altgrad.measurement.step_record import StepRecord
from altgrad.observation.bypass_reason import is_stepped_in_backward
from altgrad.observation.step_hooks import find_backward_pass


class BackwardSteps:
    """The steps of one training step, of optimizers that step inside the backward pass.

    A training step may have several backward passes, as with reentrant checkpoints, and several
    steps of one optimizer, each of other layers. It ends when a layer is stepped in a second pass.

    Attributes:
        index: Index of the training step, from 0; -1 before the first.
        leader: The optimizer that stands for all, in what is kept for each optimizer; None before
            the first training step.
        is_observed: True if the training step is observed, as the owner has decided.
    """

    def __init__(self) -> None:
        self.index = -1
        self.leader: Optimizer | None = None
        self.is_observed = False
        self._expected: Collection[str] = ()  # with these layers it is complete; empty if unknown
        self._inside: set[str] = set()  # layers that were stepped inside of a backward pass
        self._passes: dict[int, int] = {}  # by the `id` of each layer that was stepped
        self._optimizers: WeakSet[Optimizer] = WeakSet()  # that made these steps
        self._left: WeakSet[Optimizer] = WeakSet()  # of these, that stepped outside since
        self._records: list[StepRecord] = []

    def has(self, optimizer: Optimizer) -> bool:
        """Return True if an optimizer has made a step in the current training step."""
        return optimizer in self._optimizers and optimizer not in self._left

    @property
    def is_complete(self) -> bool:
        """True if all expected layers, of which there are some, have been observed."""
        observed = {name for each in self._records for name in each.layers}
        return bool(self._expected) and observed.issuperset(self._expected)

    def expect(self, layers: Mapping[str, Tensor], outside: Collection[str]) -> None:
        """Set the layers that must step before the current training step is complete.

        These are layers with a visible hook that may step them in the backward pass. A hook on a
        node of the autograd graph cannot be seen. If a layer may have such a hook, nothing is
        expected, and the training step ends only when the next one begins.

        Args:
            layers: The layers that are due and need a gradient, by name.
            outside: Names of layers that were stepped outside of a backward pass.
        """
        inside = {
            n for n, each in layers.items() if n in self._inside or is_stepped_in_backward(each)
        }
        self._expected = inside if layers.keys() <= inside.union(outside) else ()

    def begins(self, optimizer: Optimizer, layers: Collection[int]) -> bool:
        """Return True if a new training step begins with the coming step of an optimizer.

        It does if the optimizer is about to step a layer again, and in another backward pass than
        before.

        Args:
            optimizer: The optimizer that is about to step, inside a backward pass.
            layers: Result of `find_due`.
        """
        if self.index < 0 or optimizer in self._left:
            return True
        backward_pass = find_backward_pass()
        return any(self._passes.get(each, backward_pass) != backward_pass for each in layers)

    def begin(self, optimizer: Optimizer) -> None:
        """Begin a new training step with the coming step of an optimizer."""
        self.index += 1
        self.leader = self.leader or optimizer
        self._passes.clear()
        self._optimizers.clear()
        self._left.clear()
        self._records.clear()

    def join(self, optimizer: Optimizer, layers: Collection[int]) -> None:
        """Count the coming step of an optimizer as a part of the current training step.

        Args:
            optimizer: The optimizer that is about to step, inside a backward pass.
            layers: Result of `find_due`.
        """
        backward_pass = find_backward_pass()
        if backward_pass is not None:
            self._optimizers.add(optimizer)
            self._passes.update(dict.fromkeys(layers, backward_pass))

    def leave(self, optimizer: Optimizer) -> None:
        """Note that an optimizer makes a step outside of a backward pass.

        Its next step inside of one begins a new training step.
        """
        if optimizer in self._optimizers:
            self._left.add(optimizer)

    def add(self, record: StepRecord) -> None:
        """Keep the record of an observed step, until `take_record` takes it."""
        self._inside.update(record.layers)
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
    return next(_find_with_gradients(optimizer), None) is not None


def is_accumulating(optimizer: Optimizer) -> bool:
    """Return True if steps in backward add gradients to an optimizer's states, and move no weight.

    References:
        ``optimi/optimizer.py`` (OptimiOptimizer.optimizer_accumulation)
    """
    return getattr(optimizer, "optimizer_accumulation", False) is True


def find_due(optimizer: Optimizer) -> list[int]:
    """Return the `id` of each layer that an optimizer is about to step.

    These are the layers with a gradient. If there is none, the result is the `id` of the optimizer
    itself, in place of the unknown layers.
    """
    return [id(each) for each in _find_with_gradients(optimizer)] or [id(optimizer)]


def _find_with_gradients(optimizer: Optimizer) -> Iterator[Tensor]:
    """Yield the parameters of an optimizer that have a gradient."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                yield parameter
