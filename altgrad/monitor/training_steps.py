"""`TrainingSteps`: decide which training steps are observed, and show the record of each.

A training step is a step of one optimizer, or all steps that optimizers make inside of one backward
pass, which `backward_steps` joins::

    begin, before each step of an optimizer: is the training step, or the one it is a part of, due?
    is_layer_due, for each layer: has the interval of the layer passed?
    finish, after each observed step: make its record, and show that of the training step if it has
    ended

Read `policy`, `backward_steps` and `recorder` first. `monitor` comes next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from altgrad.measurement.step_record import StepRecord
from altgrad.monitor.backward_steps import (
    BackwardSteps,
    find_due,
    has_gradients,
    is_accumulating,
)
from altgrad.monitor.measured_layers import MeasuredLayers
from altgrad.monitor.policy import StepPolicy
from altgrad.monitor.recorder import Recorder
from altgrad.monitor.sharding import Sharding
from altgrad.observation import SkipReason, StepOutcome
from altgrad.observation.step_hooks import find_backward_pass

_UNKNOWN = (math.nan, math.nan)
"""The value of two times if they are unknown: to observe a step, and the mean of training steps."""


class TrainingSteps:
    """The training steps of a run: which are observed, and when each has ended.

    Args:
        policy: The policy by schedule and time.
        layers: The layers that are measured, with the interval of each.
        recorder: The maker of the record of each step of an optimizer.
        sharding: The ranks that share the parameters.
        lock: Lock, as two threads may step two optimizers. It must allow a thread to take it again.
        on_record: Function that is called with the record of each training step, and an optimizer
            that made it.
        on_skip: Function that is called with the reason why a step moved no weight.

    Attributes:
        last_seen: Index of the last observed step of each layer, by name.
    """

    def __init__(
        self,
        policy: StepPolicy,
        layers: MeasuredLayers,
        recorder: Recorder,
        sharding: Sharding,
        lock: AbstractContextManager[object],
        on_record: Callable[[Optimizer, StepRecord], None],
        on_skip: Callable[[SkipReason], None],
    ) -> None:
        self.last_seen: dict[str, int] = {}
        self._policy = policy
        self._layers = layers
        self._recorder = recorder
        self._sharding = sharding
        self._lock = lock
        self._on_record = on_record
        self._on_skip = on_skip
        self._backward = BackwardSteps()
        self._outside: set[str] = set()  # layers that were stepped outside of a backward pass

    # --- before a step

    def begin(self, optimizer: Optimizer, index: int) -> bool:
        """Return True if the coming step of an optimizer is to be observed, and prepare for it.

        Args:
            optimizer: The optimizer that is about to step.
            index: Number of its steps since it was attached, before this one.
        """
        if not self._is_due(optimizer, index):
            return False
        with self._lock, self._policy.observing():
            self._recorder.prepare(optimizer)
        return True

    def is_layer_due(self, name: str, index: int) -> bool:
        """Return True if the interval of a layer has passed, so that the step measures it.

        Args:
            name: Name of the layer.
            index: Number of steps of its optimizer before the coming one.
        """
        if find_backward_pass() is not None:
            index = self._backward.index
        return self._layers.settings.is_due(name, index, self.last_seen.get(name, index))

    def _is_due(self, optimizer: Optimizer, index: int) -> bool:
        """Return True if the coming step is to be observed.

        All steps of one training step inside a backward pass get the same answer. Steps that only
        accumulate gradients are no part of any.
        """
        backward = self._backward
        if find_backward_pass() is None:
            if backward.leader is not None:
                # After its steps in backward, the step of an optimizer in a loop does nothing.
                if backward.has(optimizer) and not has_gradients(optimizer):
                    return False
                backward.leave(optimizer)
                self.end()
            return self._is_affordable(optimizer, index)
        if is_accumulating(optimizer):
            return False
        layers = find_due(optimizer)
        with self._lock:
            if backward.begins(optimizer, layers):
                self.end()
                backward.begin(optimizer)
                leader = backward.leader or optimizer
                backward.is_observed = self._is_affordable(leader, backward.index)
                due = self._find_expected() if backward.is_observed else {}
                backward.expect(due, self._outside)
            backward.join(optimizer, layers)
        return backward.is_observed

    def _is_affordable(self, optimizer: Optimizer, index: int) -> bool:
        """Return True if the schedule includes a step, and the overhead budget allows it."""
        # If the schedule raises, observe the step: its end is where errors of ranks are combined.
        wanted = True
        with self._sharding.peers.hold_errors():
            wanted = self._policy.is_wanted(index)
        # A step beyond the overhead budget involves no other rank: all ranks decide this alike.
        return wanted and self._policy.is_paid_for(optimizer, index)

    def _find_expected(self) -> dict[str, Tensor]:
        """Return the layers that are due and may get a gradient, by name."""
        return {
            name: parameter
            for name, parameter in self._recorder.find_attached().items()
            if parameter.requires_grad and self.is_layer_due(name, self._backward.index)
        }

    # --- after a step

    def finish(self, outcome: StepOutcome) -> None:
        """Measure a step that an optimizer has just made, and show its training step once ended.

        A step that was skipped, or had an error, ends here, too.

        Args:
            outcome: The step.

        Raises:
            Exception: The step, measuring it, or showing its record has failed.
        """
        optimizer, index, backward = outcome.optimizer, outcome.index, self._backward
        is_part = backward.leader is not None and backward.has(optimizer)
        with self._lock, self._policy.observing(outcome.copy_seconds):
            # Before this step adds to them. A training step in backward has its own, at its end.
            seconds = _UNKNOWN if is_part else self._policy.seconds(optimizer, index)
            record = self._recorder.make_record(outcome, seconds)
            if not isinstance(record, StepRecord):
                if record is not None:
                    self._on_skip(record)
                return
            if is_part:
                backward.add(record)
            else:
                self._outside.update(record.layers)
                self._show(optimizer, record)
        if not is_part:
            self._policy.mark_end(optimizer, index)
        elif backward.is_complete:
            self.end()

    def end(self) -> None:
        """Show the steps that were observed in the current backward pass as one record."""
        leader, index = self._backward.leader, self._backward.index
        if leader is None:
            return
        with self._lock, self._policy.observing():
            seconds = self._policy.seconds(leader, index)
            names = self._layers.registry.names.values()
            record = self._backward.take_record(names, seconds)
            if record is None:
                return
            self._show(leader, record)
        self._policy.mark_end(leader, index)

    def close(self) -> None:
        """Show the last training step, and forget which optimizers have made it."""
        self.end()
        self._backward, self._outside = BackwardSteps(), set()

    def state_dict(self) -> dict[str, Any]:
        """Return what decides on the next steps of a resumed run.

        Returns:
            A dict with the keys ``last_seen`` and ``budgets``.
        """
        return {"last_seen": dict(self.last_seen), "budgets": self._policy.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what decides on the next steps.

        Args:
            state: A dict with the entries of a result of `state_dict`, and others.
        """
        self.last_seen = dict(state["last_seen"])
        self._policy.load_state_dict(state["budgets"])

    def _show(self, optimizer: Optimizer, record: StepRecord) -> None:
        """Note what decides on later steps, and pass the record of a training step on."""
        self.last_seen |= dict.fromkeys(record.layers, record.index)
        seconds = record.own_seconds, record.training_seconds
        self._policy.charge(optimizer, record.index, seconds)
        self._on_record(optimizer, record)
