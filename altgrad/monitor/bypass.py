"""`BypassDetector`: find layers whose weights change outside of the steps that are observed.

A detector copies a few weights of each layer, and compares them later. There are four signs:

- Other optimizers of the process, which torch's global hooks show, step the layers.
- The attached optimizer no longer has the layers, as after sharding.
- The weights have changed, while their optimizer has called its hooks for no step.
- The weights have changed between observed steps that moved nothing.

A comparison costs no more than an observed step. `monitor` compares in `attach` and `detach`, and
on request.

Read `measured_layers` and `altgrad.observation.bypass_reason` first; `monitor` comes next.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import Optimizer

from altgrad._messages import few
from altgrad.monitor.measured_layers import MeasuredLayers
from altgrad.observation.bypass_reason import (
    explain_idle_steps,
    explain_lost_layers,
    explain_other_steps,
    explain_steps_in_backward,
    find_bypass_reason,
    find_other_optimizers,
    has_gradient_hooks,
    is_stepped_in_backward,
)
from altgrad.observation.dtensor import is_sharded
from altgrad.observation.optimizers import is_flattened
from altgrad.observation.other_steps import OtherSteps
from altgrad.observation.step import SkipReason
from altgrad.observation.step_hooks import StepHooks, count_backward_passes
from altgrad.observation.weight_sample import WeightSample

_logger = logging.getLogger("altgrad")


class Bypass(NamedTuple):
    """Layers whose weights changed outside of the steps that are observed.

    Attributes:
        names: Names of the layers.
        reason: The likely reason, with the remedy.
    """

    names: Sequence[str]
    reason: str


@dataclass
class _Look:
    """A copy of a few weights of an optimizer's layers, with the number of steps at that time.

    Attributes:
        kind: Name of the optimizer's class.
        names: Names of the optimizer's layers.
        sharded: Names of those layers that were sharded.
        counts: Number of steps of each attached optimizer before the copy, by its hooks.
        sample: A few weights of each layer.
        passes: Number of backward passes of the process before the copy.
    """

    kind: str
    names: Sequence[str]
    sharded: set[str]
    counts: Mapping[StepHooks[Any], int]
    sample: WeightSample
    passes: int


@dataclass
class _Idling:
    """An account of an optimizer whose steps may move nothing.

    Attributes:
        is_idle: True if no observed step has moved a weight.
        after: A few weights of each layer from after the last step; None if it was not observed.
            Layers that other attached optimizers step, too, are left out.
        moves: For each layer, how often it moved between an observed step and the next one.
    """

    is_idle: bool = True
    after: WeightSample | None = None
    moves: Counter[str] = field(default_factory=Counter)


class BypassDetector:
    """A detector of steps that call none of the optimizer's hooks, and so cannot be observed.

    Args:
        layers: The layers that are measured.
    """

    def __init__(self, layers: MeasuredLayers) -> None:
        self._registry = layers.registry
        self._others = OtherSteps(lambda: layers.registry.names)
        self._layers = layers
        # All measured layers, when the first optimizer was attached.
        self._all: WeightSample | None = None
        # The layers of each optimizer: when it was attached, and when it was last seen to step.
        self._first: WeakKeyDictionary[StepHooks[Any], _Look] = WeakKeyDictionary()
        self._last: WeakKeyDictionary[StepHooks[Any], _Look] = WeakKeyDictionary()
        self._idling: WeakKeyDictionary[Optimizer, _Idling] = WeakKeyDictionary()

    def begin(self, attached: Sequence[StepHooks[Any]]) -> None:
        """Copy a few weights of the layers of optimizers just attached, to compare them later.

        Args:
            attached: The hooks of all attached optimizers.
        """
        # Steps between `detach` and the next `attach` are not to be observed: look again.
        if not any(hooks in self._first for hooks in attached):
            self._first.clear()
            self._last.clear()
            self._idling.clear()
            self._all = WeightSample(self._layers.parameters)
            self._others.start()
        for hooks in attached:
            optimizer = hooks.optimizer
            if hooks not in self._first and optimizer is not None:
                self._first[hooks] = self._last[hooks] = self._look(hooks, optimizer, attached)

    def note_step(self, optimizer: Optimizer, *, has_moved: bool) -> None:
        """Note an observed step of an optimizer.

        Args:
            optimizer: The optimizer, which has just stepped.
            has_moved: True if the step moved a weight.
        """
        idling = self._idling.setdefault(optimizer, _Idling())
        idling.is_idle = idling.is_idle and not has_moved
        if idling.is_idle:
            alive = {hooks.optimizer for hooks in self._first} - {None, optimizer}
            others = self._layers.find_stepped([each for each in alive if each is not None])
            layers = self._layers.find_stepped([optimizer])
            rest = {name: each for name, each in layers.items() if name not in others}
            idling.after = WeightSample(rest)

    def note_coming(self, optimizer: Optimizer) -> None:
        """Note that an optimizer is about to step; call this function before each of its steps.

        If its last step was observed and moved nothing, find the layers that have moved since.
        """
        idling = self._idling.get(optimizer)
        if idling is not None and idling.after is not None:
            idling.moves.update(idling.after.find_changed(self._layers.find_stepped([optimizer])))
            idling.after = None

    def end(self) -> None:
        """Stop listening to the steps of other optimizers."""
        self._others.stop()

    def describe_bypasses(
        self, attached: Sequence[StepHooks[Any]], changed: Collection[str]
    ) -> list[str]:
        """Describe layers that something other than the steps of attached optimizers has moved.

        Only changes with a likely reason are described: others may be edits or swaps of weights,
        which are no updates.

        Args:
            attached: The hooks of all attached optimizers.
            changed: Names of layers that something other than a step has changed, as *twins* found:
                samples that are stepped as the run is.

        Returns:
            A notice for each reason; none if weights could not be compared.
        """

        def find() -> list[Bypass]:
            self._registry.read()  # the module may have been sharded since `attach`
            return self._find_bypasses(attached, self._registry.parameters, changed)

        return _describe("cannot see what moves", find)

    def _find_bypasses(
        self,
        attached: Sequence[StepHooks[Any]],
        parameters: Mapping[str, Tensor],
        changed: Collection[str],
    ) -> list[Bypass]:
        """Return layers that moved outside of observed steps, each with the surest reason."""
        if not attached:
            return []
        found = [*self._find_lost(attached, parameters)]
        found += self._find_other_steps(attached)
        found += self._find_changed(attached, parameters)
        found += self._find_unattached(attached)
        found += _explain_changed(attached, {n: parameters[n] for n in changed if n in parameters})
        # The first reason is the surest. A layer has one reason.
        known: set[str] = set()
        rest = []
        for names, reason in found:
            if names := [name for name in names if name not in known]:
                rest.append(Bypass(names, reason))
                known.update(names)
        return rest

    def _find_other_steps(self, attached: Sequence[StepHooks[Any]]) -> Iterator[Bypass]:
        """Yield the layers that optimizers have stepped which are not attached."""
        measured = self._layers.parameters
        for kind, stepped in self._others.found.items():
            names = [name for name in measured if name in {*stepped}]
            owners = [x for x in attached if (f := self._first.get(x)) and {*f.names} & {*names}]
            if names:
                ours = [(self._first[each].kind, each.optimizer) for each in owners]
                in_backward = kind in self._others.in_backward
                yield Bypass(names, explain_other_steps(kind, ours, in_backward=in_backward))

    def _find_lost(
        self, attached: Sequence[StepHooks[Any]], parameters: Mapping[str, Tensor]
    ) -> Iterator[Bypass]:
        """Yield layers that an attached optimizer had at first, and that none has any more.

        Layers also count as lost if FSDP1 has made their parameters views of flat shards.
        """
        optimizers = [each.optimizer for each in attached if each.optimizer is not None]
        stepped = self._layers.find_stepped(optimizers)
        for hooks in attached:
            first, optimizer = self._first.get(hooks), hooks.optimizer
            if first is None or not first.names:
                continue
            known = {name: parameters[name] for name in first.names if name in parameters}
            has_layers = not stepped.keys().isdisjoint(first.names)
            if has_layers and not any(map(is_flattened, known.values())):
                continue
            newly = [n for n, each in known.items() if is_sharded(each) and n not in first.sharded]
            # With other layers in its groups, an optimizer has finished these: they may be frozen.
            is_emptied = optimizer is not None and not self._layers.find_stepped([optimizer])
            moved = first.sample.find_changed(known) if is_emptied else []
            reason = explain_lost_layers(first.kind, parameters.values(), bool(newly), bool(moved))
            if reason is not None:
                yield Bypass(newly or moved or first.names, reason)

    def _find_changed(
        self, attached: Sequence[StepHooks[Any]], parameters: Mapping[str, Tensor]
    ) -> list[Bypass]:
        """Return layers that have changed, although no step of their optimizer called its hooks.

        A few weights of each layer are compared with earlier copies of them. If the optimizer has
        stepped since, its steps explain a change: its weights are only copied anew. Its layers are
        returned nevertheless if its observed steps moved nothing, but other code moved them.
        """
        found: list[Bypass] = []
        for hooks in attached:
            optimizer, last = hooks.optimizer, self._last.get(hooks)
            if last is None:
                continue
            has_stepped = hooks.index != last.counts[hooks]
            if has_stepped and optimizer is not None:
                found += self._find_moved_between(optimizer, last.kind)
                self._last[hooks] = self._look(hooks, optimizer, attached)
            else:
                found += self._compare(hooks, last, attached, parameters)
        return found

    def _find_moved_between(self, optimizer: Optimizer, kind: str) -> list[Bypass]:
        """Return layers that move between the steps of an optimizer, while `step` does nothing.

        A layer must have moved twice, since a single change may come from a loaded checkpoint.
        """
        idling = self._idling.get(optimizer)
        if idling is None or not idling.is_idle:
            return []
        moved = [name for name, times in idling.moves.items() if times > 1]
        return [Bypass(moved, explain_idle_steps(kind))] if moved else []

    def _find_unattached(self, attached: Sequence[StepHooks[Any]]) -> list[Bypass]:
        """Return layers that moved and belong to optimizers that are not observed."""
        if self._all is None:
            return []
        stepped = {name for look in self._last.values() for name in look.names}
        rest = {n: each for n, each in self._layers.parameters.items() if n not in stepped}
        names = self._all.find_changed(rest)
        if not names:
            return []
        by_kind = _group_by_optimizer(attached, {name: rest[name] for name in names})
        return [
            Bypass(layers, f"{kind} has these layers and is not attached; attach it")
            for kind, layers in by_kind.items()
        ]

    def describe_unseen(
        self,
        attached: Sequence[StepHooks[Any]],
        seen: Container[str],
        skipped: Container[SkipReason],
    ) -> list[str]:
        """Describe layers that have moved since they were attached, and were in no observed step.

        Args:
            attached: The hooks of all attached optimizers.
            seen: Names of the layers that were part of an observed step.
            skipped: Reasons for which steps were skipped that were to be observed.

        Returns:
            A notice for each optimizer with such layers; none if weights could not be compared.
        """

        def find() -> list[Bypass]:
            return self._find_unseen(attached, self._registry.parameters, seen, skipped)

        return _describe("never observed", find)

    def _find_unseen(
        self,
        attached: Sequence[StepHooks[Any]],
        parameters: Mapping[str, Tensor],
        seen: Container[str],
        skipped: Container[SkipReason],
    ) -> list[Bypass]:
        """Return the layers of each optimizer that have moved, and were in no observed step."""
        found = []
        for hooks in attached:
            if (first := self._first.get(hooks)) is None:
                continue
            known = {name: parameters[name] for name in first.names if name in parameters}
            moved = first.sample.find_changed(known)
            if not (unseen := [name for name in moved if name not in seen]):
                continue
            layers = [known[name] for name in unseen]
            # If this optimizer has stepped, another one with these layers may be idle, and is no
            # reason.
            is_bypass = not hooks.index or any(map(is_stepped_in_backward, layers))
            reason = self._find_reason(hooks, first, layers, attached) if is_bypass else None
            found.append(Bypass(unseen, reason or _explain(hooks, first, seen, skipped)))
        return found

    def _look(
        self, hooks: StepHooks[Any], optimizer: Optimizer, attached: Sequence[StepHooks[Any]]
    ) -> _Look:
        layers = self._layers.find_stepped([optimizer])
        counts = {each: each.index for each in {*attached, hooks}}
        sharded = {name for name, each in layers.items() if is_sharded(each)}
        kind = type(optimizer).__name__
        return _Look(
            kind, [*layers], sharded, counts, WeightSample(layers), count_backward_passes()
        )

    def _compare(
        self,
        hooks: StepHooks[Any],
        last: _Look,
        attached: Sequence[StepHooks[Any]],
        parameters: Mapping[str, Tensor],
    ) -> list[Bypass]:
        """Return layers that moved although no attached optimizer has stepped them.

        A few weights are compared with the copies in `last`. The list is empty if none changed, or
        if nothing points to a reason; otherwise it has one `Bypass`.
        """
        known = {name: parameters[name] for name in last.names if name in parameters}
        stepping = [
            each.optimizer
            for each in attached
            if each.optimizer is not None and each.index != last.counts.get(each, each.index)
        ]
        stepped = self._layers.find_stepped(stepping) if stepping else {}
        names = [name for name in last.sample.find_changed(known) if name not in stepped]
        if not names:
            return []
        reason = self._find_reason(hooks, last, [known[name] for name in names], attached)
        return [] if reason is None else [Bypass(names, reason)]

    def _find_reason(
        self,
        hooks: StepHooks[Any],
        look: _Look,
        moved: Sequence[Tensor],
        attached: Sequence[StepHooks[Any]],
    ) -> str | None:
        """Return the likely reason why layers of an optimizer moved without calls of its hooks."""
        optimizers = [each.optimizer for each in attached if each.optimizer is not None]
        has_backward = count_backward_passes() > look.passes
        reason = find_bypass_reason(
            look.kind, hooks.optimizer, moved, optimizers, has_backward=has_backward
        )
        # Such hooks often change gradients only, so that they count where no step was ever seen.
        has_hooks = has_backward and any(map(has_gradient_hooks, moved))
        if reason is None and not hooks.index and has_hooks:
            return explain_steps_in_backward()
        return reason


def _describe(finding: str, find: Callable[[], list[Bypass]]) -> list[str]:
    """Return notices that begin with a finding; none if weights could not be compared."""
    try:
        return [f"{finding} {few(names)}: {reason}" for names, reason in find()]
    except Exception as error:  # noqa: BLE001 - such as an error of a failed device
        _logger.debug("weights could not be compared: %r", error)
        return []


def _explain_changed(
    attached: Sequence[StepHooks[Any]], changed: Mapping[str, Tensor]
) -> list[Bypass]:
    """Return the changed layers that some unattached optimizer has, one `Bypass` per class.

    Other changed layers are left out: code may have clamped them, or swapped in averaged weights.
    """
    by_kind = _group_by_optimizer(attached, changed) if changed else {}
    return [
        Bypass(layers, f"{kind} has these layers, too, and is not attached; attach it")
        for kind, layers in by_kind.items()
    ]


def _group_by_optimizer(
    attached: Sequence[StepHooks[Any]], layers: Mapping[str, Tensor]
) -> dict[str, list[str]]:
    """Return the names of layers that unattached optimizers have, by class of the optimizer."""
    names = [*layers]
    optimizers = [each.optimizer for each in attached if each.optimizer is not None]
    kinds = find_other_optimizers([*layers.values()], optimizers)
    by_kind: dict[str, list[str]] = {}
    for position in sorted(kinds):
        by_kind.setdefault(kinds[position], []).append(names[position])
    return by_kind


def _explain(
    hooks: StepHooks[Any], first: _Look, seen: Container[str], skipped: Container[SkipReason]
) -> str:
    """Return the reason why layers moved and were never observed, where nothing bypassed hooks.

    Args:
        hooks: The hooks of the layers' optimizer.
        first: The copies of the layers' weights from when the optimizer was attached.
        seen: Names of the layers that were part of an observed step.
        skipped: Reasons for which steps were skipped that were to be observed.
    """
    if not hooks.index:
        return (
            f"step() of {first.kind} was never called; other code changes these weights, such as a "
            "step under another name, or a swap with averaged weights"
        )
    if any(name in seen for name in first.names):
        return "they had no gradient in the observed steps; observe more steps"
    if "no gradients" in skipped:
        return (
            f"the steps of {first.kind} found no gradients in .grad, where AltGrad reads them, and "
            "count as skipped; observe more steps, or an optimizer that steps by .grad"
        )
    return f"no step of {first.kind} was observed; observe more steps"
