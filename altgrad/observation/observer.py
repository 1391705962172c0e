"""`StepObserver`: weights and gradients around each step of a torch optimizer, as they were."""

from __future__ import annotations

import logging
import time
import traceback
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from altgrad.observation.dtensor import is_unreduced, register_shards, unreduced_message
from altgrad.observation.grad_scaler import SkipTeller
from altgrad.observation.optimizers import (
    check_none_in_backward,
    check_not_captured,
    check_observable,
    check_scaler,
    check_unsharded,
    unwrap,
)
from altgrad.observation.parameter_names import parameter_names
from altgrad.observation.snapshots import Chosen, Elements, Memory, Snapshot, Snapshots
from altgrad.observation.step import OptimizerStep, step_of
from altgrad.observation.step_hooks import StepHooks

SkipReason: TypeAlias = Literal["inf", "no gradients", "learning rate 0"]
"""Why a step was none: see `StepObserver.skipped`."""

Look: TypeAlias = Callable[[], "OptimizerStep | SkipReason"]
"""Shows the step, or says why it was none; raises what has failed."""

_Hooks: TypeAlias = StepHooks["list[Snapshot] | Exception"]

_logger = logging.getLogger("altgrad")


class FaultElsewhereError(RuntimeError):
    """Another process has failed to observe, and says so; here it is only to be heeded."""


class StepObserver:
    """Show each step of a torch optimizer to a callback: weights before and after, and gradients.

    The gradients are those that the step applies, whoever changed them since the backward pass,
    and the weights are bit for bit those that the step found and left. Training is not touched:
    nothing is changed but the copies, no random number is drawn, and what fails in here or in the
    callback is warned of once and ends the observation, not the training.

    A step that is not observed costs a call of `should_observe` and a comparison of its result.

    Hooks of other code that change gradients are seen if they were registered earlier: attach last.
    It observes as long as you hold it: without a reference it is collected, and its hooks go.

    Examples:
        >>> import torch
        >>> from altgrad import StepObserver
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> def on_step(step):
        ...     print(step.index, step.names, (step.after[0] - step.before[0]).item())
        >>> with StepObserver(model, on_step).attach(optimizer):
        ...     loss = model(torch.ones(1, 1)).sum()
        ...     loss.backward()
        ...     optimizer.step()
        0 ('weight',) -0.5

    Args:
        module: The module whose parameters to observe, or their names and themselves, as
            `named_parameters` gives them.
        on_step: Called after each observed step, without gradient recording, before the
            optimizer's `step` returns.
        should_observe: Called before each step with what will be `OptimizerStep.index`; whether
            to observe it. None observes all.
        elements: Called once for each parameter of more than 2,048 elements with its name and
            itself; flat indices of the elements to observe, or None for all of them, which up to
            some ten thousand is faster. Without it, and of small parameters, all are observed.
        should_copy: Called at each observed step with the name of each parameter and the step's
            index; whether the parameter is part of it. None takes all.
        memory: Called once for each optimizer with it; what it returns is asked where the copies
            of each parameter are to be: see `altgrad.observation.snapshots.Memory`. By default
            each has memory of its own.
        read_found_inf: Whether to find out at once if a fused optimizer under a GradScaler
            skipped the step, for which the host waits for the device. False shows such steps too,
            with `OptimizerStep.found_inf`, for the callback to read with its results.
        strict: Whether what fails in here or in the callback is raised into the training.

    Attributes:
        agree: None, or what is called instead of `on_step` with the optimizer, the step's index and
            a function that shows the step: also where it was none, or something failed, so that
            other processes that observe it can be told. Set before `attach`; `elements` is then
            asked about small parameters, too.
        leave_out: None, or what is called with the names of parameters of which no gradients can
            be shown, and why; None makes that a fault.
        skipped: How many steps should have been observed and were none, by reason: ``"inf"``, not
            finite gradients under a GradScaler; ``"no gradients"`` of any observed parameter;
            ``"learning rate 0"`` of all that have one, with nothing moved (where only some have
            it, the step is shown without those).

    Raises:
        TypeError: `module` is neither a module nor pairs of name and parameter.
        ValueError: There is no parameter.
    """

    def __init__(
        self,
        module: nn.Module | Iterable[tuple[str, Tensor]],
        on_step: Callable[[OptimizerStep], object],
        should_observe: Callable[[int], bool] | None = None,
        *,
        elements: Elements | None = None,
        memory: Callable[[Optimizer], Memory] | None = None,
        should_copy: Callable[[str, int], bool] | None = None,
        read_found_inf: bool = True,
        strict: bool = False,
    ) -> None:
        self.skipped: Counter[SkipReason] = Counter()
        self.agree: Callable[[Optimizer, int, Look], object] | None = None
        self.leave_out: Callable[[list[str], str], object] | None = None
        self._module = module if isinstance(module, nn.Module) else None
        if self._module is not None:
            register_shards(self._module)
        self._names = parameter_names(module)
        if not self._names:
            raise ValueError("there is no parameter to observe, neither in a module nor as pairs")
        self._nameless: set[Tensor] = set()  # parameters of optimizers, not of the module
        self._on_step = on_step
        self._should_observe = should_observe
        self._read_found_inf = read_found_inf
        self._strict = strict
        self._stopped = False
        self._elements = elements
        self._memory = memory
        self._should_copy = should_copy
        self._copy_seconds = 0.0
        self._chosen: Chosen = {}
        self._peak_bytes = 0
        self._snapshots: dict[_Hooks, Snapshots] = {}
        self._hooks: list[_Hooks] = []
        self._asking: _Hooks | None = None
        self._scalers: dict[GradScaler, Callable[[], None]] = {}  # and what ends listening to each
        # Nothing that could refer to the observer: it would never be collected.
        weakref.finalize(self, _collected, self._hooks, self._scalers).atexit = False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters, unique and without what wrappers add to them."""
        return tuple(self._names.values())

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters by their names, as far as steps have shown them."""
        return {name: parameter for parameter, name in self._names.items()}

    @property
    def optimizers(self) -> list[Optimizer]:
        """Those that are attached."""
        return [each for hooks in self._hooks if (each := hooks.optimizer) is not None]

    @property
    def is_observing(self) -> bool:
        """Whether it is attached and nothing has failed."""
        return bool(self._hooks) and not self._stopped

    @property
    def is_replica(self) -> bool:
        """Whether it is of a DistributedDataParallel in another process than the first."""
        modules = () if self._module is None else self._module.modules()
        if not any(isinstance(each, nn.parallel.DistributedDataParallel) for each in modules):
            return False
        return torch.distributed.get_rank() > 0

    @property
    def asking(self) -> Optimizer:
        """The optimizer whose step `should_observe` is being asked about.

        Raises:
            RuntimeError: It is not being asked.
        """
        optimizer = None if self._asking is None else self._asking.optimizer
        if optimizer is None:
            raise RuntimeError("asking is for should_observe, while it is being asked")
        return optimizer

    @property
    def copy_seconds(self) -> float:
        """What the host took to copy for the last step that was copied, in seconds."""
        return self._copy_seconds

    @property
    def peak_bytes(self) -> int:
        """The most memory that copies have taken so far, in bytes.

        Logged once, when it detaches, by the logger ``altgrad`` at INFO.
        """
        return self._peak_bytes

    def attach(self, *optimizers: Any, scaler: GradScaler | None = None) -> StepObserver:
        """Observe the steps of these optimizers from now on.

        Those attached before stay so, unless a fault has ended the observation: then it begins
        anew, with these.

        Args:
            optimizers: Optimizers of torch, or the wrappers of Lightning, Fabric or accelerate
                around them.
            scaler: The GradScaler that calls their `step`, if there is one: it skips steps
                without a word to the optimizer, and they are counted only if it is known. That
                of accelerate's wrapper is known.

        Returns:
            The observer, for ``with StepObserver(…).attach(…):``.

        Raises:
            TypeError: Something that neither is nor wraps an optimizer, or is no GradScaler.
            ValueError: An optimizer whose steps cannot be observed: it steps none of the
                parameters, or the module has parameters that other optimizers
                step inside of the backward pass.
            RuntimeError: A step of the optimizer is under way.
        """
        new = self.check(*optimizers, scaler=scaler)
        for optimizer in new:
            hooks = StepHooks(optimizer, self._is_due, self._take, self._finish)
            self._hooks.append(hooks)
            memory = self._memory and self._memory(optimizer)
            self._snapshots[hooks] = Snapshots(
                self._elements, self._chosen, memory, asks_of_all=self.agree is not None
            )
        for each in _scalers_of(optimizers, scaler):
            if each not in self._scalers:
                self._scalers[each] = SkipTeller.of(each).listen(self._count_skip_by_scaler)
        self._stopped = False
        return self

    def check(self, *optimizers: Any, scaler: GradScaler | None = None) -> list[Optimizer]:
        """Raise what `attach` would raise; returns those that it would attach."""
        if self._stopped:
            self._take_off()
        self._hooks[:] = [hooks for hooks in self._hooks if hooks.optimizer is not None]
        self._snapshots = {hooks: self._snapshots[hooks] for hooks in self._hooks}
        check_scaler(scaler)
        if self._module is not None:
            check_unsharded(self._module)
        attached = {*self.optimizers}
        new = [each for each in dict.fromkeys(map(unwrap, optimizers)) if each not in attached]
        is_scaled = bool(_scalers_of(optimizers, scaler))
        for optimizer in new:
            own = {name: parameter for name, parameter, _ in self._parameters_of(optimizer)}
            check_observable(optimizer, own, scaled=is_scaled)
        check_none_in_backward(self._names, {*attached, *new})
        return new

    def detach(self) -> None:
        """Observe no more, and let go of every copy; harmless when nothing is attached.

        Within `on_step` torch cannot let its hooks go: until the next `detach`, or until the
        observer is collected, they stay and do nothing.
        """
        if self._hooks and self._peak_bytes:
            _logger.info("the copies of observed steps took up to %d bytes", self._peak_bytes)
        self._stop()
        self._take_off()

    def __enter__(self) -> StepObserver:  # noqa: PYI034 - typing has Self only from Python 3.11 on
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _is_due(self, hooks: _Hooks) -> bool:
        if self._stopped or self._should_observe is None:
            return not self._stopped
        self._asking = hooks
        try:  # not _guard, which would take longer than all the rest of a step not observed
            return bool(self._should_observe(hooks.index))
        except Exception as fault:  # noqa: BLE001 - whatever it is, it is not the training's
            self._stop_after(fault)
            return False

    def _take(self, hooks: _Hooks, optimizer: Optimizer) -> list[Snapshot] | Exception:
        if self.agree is None:
            with self._guard():
                return self._copy(hooks, optimizer)
            return []
        try:
            return self._copy(hooks, optimizer)
        except Exception as fault:  # noqa: BLE001 - as above
            return fault

    def _copy(self, hooks: _Hooks, optimizer: Optimizer) -> list[Snapshot]:
        start = time.perf_counter()
        check_not_captured()
        parameters = self._parameters_of(optimizer)
        if self._should_copy is not None:
            wanted = self._should_copy
            parameters = [each for each in parameters if wanted(each[0], hooks.index)]
        if self.leave_out is not None:
            unseen = {name: each for name, each, _ in parameters if is_unreduced(each)}
            if unseen:
                self.leave_out([*unseen], unreduced_message(*next(iter(unseen.items()))))
            parameters = [each for each in parameters if each[0] not in unseen]
        grad_scale = getattr(optimizer, "grad_scale", None)
        snapshots = self._snapshots[hooks].take(parameters, grad_scale)
        nbytes = sum(each.peak_bytes for each in self._snapshots.values())
        self._peak_bytes = max(self._peak_bytes, nbytes)
        self._copy_seconds = time.perf_counter() - start
        return snapshots

    def _finish(
        self, hooks: _Hooks, optimizer: Optimizer, taken: list[Snapshot] | Exception | None
    ) -> None:
        with self._guard(), torch.no_grad():

            def look() -> OptimizerStep | SkipReason:
                return self._look(hooks, optimizer, taken)

            if self.agree is not None:
                self.agree(optimizer, hooks.index, look)
            elif isinstance(seen := look(), OptimizerStep):
                self._on_step(seen)
            else:
                self.skipped[seen] += 1

    def _look(
        self, hooks: _Hooks, optimizer: Optimizer, taken: list[Snapshot] | Exception | None
    ) -> OptimizerStep | SkipReason:
        """What `on_step` is called with, unless the step was none."""
        if taken is None:
            raise RuntimeError(hooks.unseen)
        if isinstance(taken, Exception):
            raise taken
        start = time.perf_counter()
        step = step_of(taken, optimizer, hooks.index, show_resting=self.agree is not None)
        self._copy_seconds += time.perf_counter() - start
        if not taken:
            return "no gradients"
        if self._read_found_inf and step.found_inf is not None and step.found_inf.item():
            return "inf"
        return step if step.names else "learning rate 0"

    def _count_skip_by_scaler(self, optimizer: Optimizer) -> None:
        for hooks in [*self._hooks]:
            if hooks.optimizer is optimizer and self._is_due(hooks):
                self.skipped["inf"] += 1

    def _parameters_of(self, optimizer: Optimizer) -> list[tuple[str, Tensor, bool]]:
        """Name and parameter of those that have a name, and whether their learning rate is 0."""
        own = [
            (parameter, rests)
            for group, rests in [(g, bool(g.get("lr") == 0)) for g in optimizer.param_groups]
            for parameter in group["params"]
        ]
        if any(p not in self._names and p not in self._nameless for p, _ in own):
            self._look_again([parameter for parameter, _ in own])
        return [(self._names[p], p, rests) for p, rests in own if p in self._names]

    def names_of(self, optimizer: Optimizer) -> list[str]:
        """Names of the observed parameters that an optimizer steps."""
        return [name for name, _, _ in self._parameters_of(optimizer)]

    def read_names(self) -> None:
        """The module may have got new parameters, and let go of others."""
        if self._module is not None:
            register_shards(self._module)
            before, self._names = self._names, parameter_names(self._module)
            for choice in [p for p in self._chosen if self._names.get(p) != before.get(p)]:
                del self._chosen[choice]

    def _look_again(self, parameters: list[Tensor]) -> None:
        self.read_names()
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        known = {*parameters, *(parameter for group in groups for parameter in group["params"])}
        self._nameless = known - self._names.keys()

    def _stop(self) -> None:
        self._stopped = True
        for hooks in self._hooks:
            hooks.forget()
        for snapshots in self._snapshots.values():
            snapshots.clear()
        self._nameless.clear()

    def _take_off(self) -> None:
        _take_off(self._hooks, self._scalers)
        self._snapshots = {hooks: self._snapshots[hooks] for hooks in self._hooks}

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except Exception as fault:  # noqa: BLE001 - as above
            self._stop_after(fault)

    def _stop_after(self, fault: Exception) -> None:
        """End the observation, not the training, where something fails in here."""
        self._stop()
        if self._strict:
            raise fault
        if isinstance(fault, FaultElsewhereError):
            return
        place = traceback.extract_tb(fault.__traceback__)[-1]
        warnings.warn(
            f"StepObserver stops observing after a fault: {fault!r} in {place.name}, "
            f"{place.filename}:{place.lineno}. Training goes on; strict=True would raise it",
            stacklevel=2,
        )


def _scalers_of(optimizers: Iterable[Any], scaler: GradScaler | None) -> list[GradScaler]:
    """The one that is given, and those of wrappers around the optimizers."""
    candidates = (scaler, *(getattr(optimizer, "scaler", None) for optimizer in optimizers))
    return [each for each in candidates if isinstance(each, GradScaler)]


def _take_off(hooks: list[_Hooks], scalers: dict[GradScaler, Callable[[], None]]) -> None:
    """Leave nothing on optimizers and scalers; hooks that torch is calling now stay in the list."""
    hooks[:] = [each for each in hooks if not each.remove()]
    for stop_listening in scalers.values():
        stop_listening()
    scalers.clear()


def _collected(hooks: list[_Hooks], scalers: dict[GradScaler, Callable[[], None]]) -> None:
    alive = [each for each in hooks if each.optimizer is not None]
    unused = bool(alive) and all(each.index == 0 for each in alive)
    _take_off(hooks, scalers)
    if unused:
        warnings.warn(
            "a StepObserver was collected before its first step: hold it in a variable, or use "
            "it in a `with` statement, as long as it is to observe",
            stacklevel=2,
        )
