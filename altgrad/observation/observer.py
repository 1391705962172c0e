"""Observe each step of a torch optimizer: `StepObserver` combines the other files of this room.

A step passes through the methods in this order: `_is_due` decides whether to observe it, `_capture`
copies weights and gradients, and `_finish` delivers the `StepOutcome` to the callback.

This is the last file to read here; `altgrad.monitor.monitor` uses it, and measures each step.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from altgrad._messages import Notices
from altgrad.observation.attachments import Attachments, find_scalers
from altgrad.observation.dtensor import describe_unreduced, find_unreduced
from altgrad.observation.optimizers import (
    check_not_captured,
    check_not_in_backward,
    check_observable,
    check_scaler,
    check_unsharded,
    unwrap,
)
from altgrad.observation.parameter_names import ParameterRegistry
from altgrad.observation.snapshots import Chosen, Elements, Memory, Snapshot, Snapshots
from altgrad.observation.step import (
    EveryStep,
    OptimizerStep,
    SkipReason,
    StepOutcome,
    make_step,
)
from altgrad.observation.step_hooks import StepHooks


class _Captured(NamedTuple):
    """The copies of one step, or the error of copying, and the time that copying took.

    Attributes:
        snapshots: The copy of each parameter; empty after an error.
        error: The error; None if there was none.
        seconds: Time that the host took to copy, in seconds.
    """

    snapshots: list[Snapshot]
    error: Exception | None
    seconds: float


_Hooks: TypeAlias = StepHooks[_Captured]


class RankError(RuntimeError):
    """An error that all ranks raise with the same message.

    `describe_error` returns the message without the line of code that raised it, since that line
    would differ between ranks.
    """


_logger = logging.getLogger("altgrad")


class StepObserver:
    """An observer that shows each step of a torch optimizer to a callback.

    A step is shown as weights before, weights after, and the gradients that were applied. The
    gradients include every change since the backward pass, such as clipping. All copies are exact,
    bit for bit.

    Training is not affected: the observer writes only to its copies and draws no random number. An
    error in the observer or in the callback ends the observation with one warning, and training
    goes on. A step that is not observed costs one call of `should_observe`.

    Attach the observer after other hooks on the optimizer: a hook that is registered later may
    change gradients that the observer has copied already. Keep a reference to the observer: without
    one it is garbage-collected, and its hooks are removed.

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
        module: The module whose parameters to observe, or pairs of name and parameter as
            `named_parameters` returns them. Or a `ParameterRegistry`, which several objects can
            share, so that all use the same names.
        on_step: Callback that takes the `OptimizerStep` of each observed step. It is called under
            `torch.no_grad`, before the optimizer's `step` returns. Optional with `on_outcome`.
        should_observe: Function that takes the number of earlier steps of the optimizer, and
            returns True if the coming step is to be observed. If None, every step is observed.
        on_outcome: Callback that takes the `StepOutcome` of each observed step, for skipped and
            failed steps, too. It is called instead of `on_step`. The callback counts skipped steps
            itself, and raises the error of a failed step if the observation is to end.
        elements: Function that takes name and parameter, and returns the elements to observe:
            indices into the flattened local shard, int64 (elements), or None for every element. It
            is called once for each parameter. Up to about ten thousand elements, observing all is
            faster than a sample. If None, every element is observed.
        should_copy: Function that takes the name of a parameter and the number of earlier steps of
            the optimizer, and returns True if the coming step is to show the parameter. If None,
            each step shows all parameters.
        leave_out: Callback `(names, reason)` for parameters whose gradients cannot be observed. The
            step is then shown without these. If None, the step fails with an error.
        memory: Function that takes an optimizer, and returns an
            `altgrad.observation.snapshots.Memory` that provides the memory for its copies. If None,
            each parameter has memory of its own.
        every_step: Object whose methods are called in each step, observed or not. None for no
            calls.
        read_found_inf: If True, find out at once whether a fused optimizer under a GradScaler
            skipped the step; the host waits for the device then. If False, such skipped steps are
            shown, too, and the callback reads `OptimizerStep.found_inf`.
        strict: If True, re-raise an error of the observer or the callback in the training loop;
            otherwise warn once and stop observing.
        warn: Function that is called with the text of each warning, in place of `warnings.warn`.

    Attributes:
        registry: The observed parameters by name.
        skipped: Number of observed steps that moved no weight, by reason. ``"inf"``: gradients were
            infinite or NaN under a GradScaler. ``"no gradients"``: no observed parameter had one.
            ``"learning rate 0"``: the rate was 0 for all parameters, and none moved. If the rate is
            0 for some parameters only, the step is shown without these.

    Raises:
        TypeError: `module` is neither a module nor pairs of name and parameter, or both callbacks
            are None.
        ValueError: `module` has no parameter.
    """

    def __init__(
        self,
        module: nn.Module | Iterable[tuple[str, Tensor]] | ParameterRegistry,
        on_step: Callable[[OptimizerStep], object] | None = None,
        should_observe: Callable[[int], bool] | None = None,
        *,
        on_outcome: Callable[[StepOutcome], object] | None = None,
        elements: Elements | None = None,
        should_copy: Callable[[str, int], bool] | None = None,
        leave_out: Callable[[Sequence[str], str], object] | None = None,
        memory: Callable[[Optimizer], Memory] | None = None,
        every_step: EveryStep | None = None,
        read_found_inf: bool = True,
        strict: bool = False,
        warn: Callable[[str], object] | None = None,
    ) -> None:
        if on_step is None and on_outcome is None:
            raise TypeError("on_step=None: expected a callable, or one as on_outcome")
        self.registry = (
            module if isinstance(module, ParameterRegistry) else ParameterRegistry(module)
        )
        self.skipped: Counter[SkipReason] = Counter()
        self._on_step = on_step
        self._on_outcome = on_outcome
        self._should_observe = should_observe
        self._elements = elements
        self._should_copy = should_copy
        self._leave_out = leave_out
        self._memory = memory
        self._every_step = every_step
        self._due: weakref.WeakSet[_Hooks] = weakref.WeakSet()  # hooks whose step is observed now
        self._read_found_inf = read_found_inf
        self._strict = strict
        self._notices = Notices(type(self).__name__, warn)
        self._stopped = False
        self._peak_bytes = 0
        self._attached = Attachments(self)
        self._snapshots: WeakKeyDictionary[_Hooks, Snapshots] = WeakKeyDictionary()
        # A plain dict and not a weak one: `Module.to` swaps the parameters of fully_shard, and
        # torch cannot swap tensors with weak references: torch/utils/__init__.py, swap_tensors.
        self._chosen: Chosen = {}
        self._chosen_names = self.registry.names  # the names as of the last removal from `_chosen`
        self._asking = threading.local()  # two threads may step two optimizers
        self._failed: dict[_Hooks, Exception] = {}  # errors of should_observe, until the step ends

    @property
    def names(self) -> tuple[str, ...]:
        """The unique names of the parameters, without what wrappers add, such as ``module.``."""
        return tuple(self.registry.names.values())

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters by name, as the module had them when its names were last read."""
        return self.registry.parameters

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers whose steps are observed, except those that are garbage-collected."""
        return self._attached.optimizers

    @property
    def hooks(self) -> tuple[StepHooks[Any], ...]:
        """The hooks on each optimizer given to `attach`; empty once an error has ended observation.

        Those of an optimizer that has been garbage-collected are included until the next `attach`.
        """
        return () if self._stopped else tuple(self._attached.hooks)

    @property
    def is_observing(self) -> bool:
        """True if an attached optimizer exists and no error has ended the observation."""
        return bool(self._attached.optimizers) and not self._stopped

    @property
    def is_replica(self) -> bool:
        """True on each rank but 0 for a module in DistributedDataParallel: a copy of rank 0's."""
        modules = () if self.registry.module is None else self.registry.module.modules()
        if not any(isinstance(each, nn.parallel.DistributedDataParallel) for each in modules):
            return False
        return torch.distributed.get_rank() > 0  # DistributedDataParallel needs a process group

    @property
    def asking(self) -> Optimizer:
        """The optimizer that is about to step, for use inside of `should_observe`.

        Raises:
            RuntimeError: `should_observe` is not being called.
        """
        hooks: _Hooks | None = getattr(self._asking, "hooks", None)
        optimizer = None if hooks is None else hooks.optimizer
        if optimizer is None:
            raise RuntimeError(
                "asking: expected a call of should_observe to be running; read it inside of "
                "should_observe only"
            )
        return optimizer

    @property
    def peak_bytes(self) -> int:
        """The largest amount of memory that copies have taken so far, in bytes.

        `detach` logs this size, by the logger ``altgrad`` at level INFO.
        """
        return self._peak_bytes

    def attach(self, *optimizers: Any, scaler: GradScaler | None = None) -> StepObserver:
        """Observe the steps of optimizers from now on.

        Optimizers that were attached earlier stay attached. If an error has ended the observation,
        the earlier optimizers are detached, and the observation begins again with the new ones.

        Args:
            optimizers: Torch optimizers, or wrappers of Lightning, Fabric or accelerate.
            scaler: The GradScaler that steps the optimizers, if any. Steps that it skips are
                counted only if it is passed here, or belongs to a wrapper of accelerate.

        Returns:
            The observer, for ``with StepObserver(…).attach(…):``.

        Raises:
            TypeError: An argument is not an optimizer or a wrapper of one, or `scaler` is not a
                GradScaler.
            ValueError: An optimizer cannot be observed, for example because it steps none of the
                observed parameters.
            RuntimeError: A step of one of the optimizers is running.
        """
        for optimizer in self.check(*optimizers, scaler=scaler):
            hooks = StepHooks(optimizer, self._is_due, self._capture, self._finish)
            self._attached.hooks.append(hooks)
            memory = self._memory and self._memory(optimizer)
            self._snapshots[hooks] = Snapshots(self._elements, self._chosen, memory)
        for each in find_scalers(optimizers, scaler):
            self._attached.listen(each, self._count_skip_by_scaler)
        self._stopped = False
        for name, reason in self.registry.unreadable.items():
            self._notices.give_once(f"leaves out {name}: {reason}")
        return self

    def check(self, *optimizers: Any, scaler: GradScaler | None = None) -> list[Optimizer]:
        """Raise the errors that `attach` would raise, without attaching.

        Args:
            optimizers: Torch optimizers, or wrappers of Lightning, Fabric or accelerate.
            scaler: The GradScaler that steps the optimizers, if any.

        Returns:
            The optimizers that `attach` would add, without wrappers.
        """
        if self._stopped:
            self._attached.remove_all()
        self._attached.forget_collected()
        check_scaler(scaler)
        check_unsharded(self.registry.module, self.registry.names)
        attached = {*self.optimizers}
        # dict.fromkeys removes duplicates and keeps the order.
        new = [each for each in dict.fromkeys(map(unwrap, optimizers)) if each not in attached]
        is_scaled = bool(find_scalers(optimizers, scaler))
        for optimizer in new:
            stepped = {
                name: parameter for name, parameter, _ in self.registry.find_stepped(optimizer)
            }
            check_observable(optimizer, stepped, scaled=is_scaled)
        check_not_in_backward(self.registry.names, {*attached, *new})
        return new

    def detach(self) -> None:
        """Stop observing, and release all copies.

        Hooks of a step that is running cannot be removed. They stay, without effect, until the next
        `detach` or until the observer is garbage-collected.
        """
        if self._attached.hooks and self._peak_bytes:
            _logger.info("the copies of observed steps took up to %d bytes", self._peak_bytes)
        self._stop()
        self._attached.remove_all()

    def __enter__(self) -> StepObserver:  # noqa: PYI034 - typing has Self only from Python 3.11 on
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    # --- during a step

    def _is_due(self, hooks: _Hooks) -> bool:
        """Return True if `_capture` and `_finish` are to be called in the coming step.

        They are called if the step is to be observed: `_capture` copies weights and gradients
        before the step, and `_finish` passes these and the new weights to the callback. If the
        user has given an object `every_step`, they are called in every step, to call its methods.
        """
        self._due.discard(hooks)
        if self._is_observed(hooks):
            self._due.add(hooks)
            return True
        return self._every_step is not None and not self._stopped

    def _is_observed(self, hooks: _Hooks) -> bool:
        if self._stopped or self._should_observe is None:
            return not self._stopped
        self._asking.hooks = hooks
        try:  # a step that is not observed should cost little more than this call
            return bool(self._should_observe(hooks.index)) and not self._stopped
        except Exception as error:  # noqa: BLE001 - no error of the user's function ends training
            self._failed[hooks] = error  # delivered with the outcome when the step ends
            return True
        finally:
            self._asking.hooks = None

    def _capture(self, hooks: _Hooks, optimizer: Optimizer) -> _Captured:
        is_observed = hooks in self._due
        if self._every_step is not None:
            self._every_step.capture(optimizer, is_observed=is_observed)
        if hooks in self._failed or not is_observed:
            return _Captured([], None, 0.0)
        start = time.perf_counter()
        try:
            snapshots = self._copy(hooks, optimizer)
        except Exception as error:  # noqa: BLE001 - no error of copying ends training
            return _Captured([], error, time.perf_counter() - start)
        return _Captured(snapshots, None, time.perf_counter() - start)

    def _copy(self, hooks: _Hooks, optimizer: Optimizer) -> list[Snapshot]:
        check_not_captured()
        parameters = self._find_parameters(optimizer)
        left_out = self._find_left_out(parameters, hooks.index)
        grad_scale = getattr(optimizer, "grad_scale", None)
        snapshots = self._snapshots[hooks].take(parameters, grad_scale, left_out)
        nbytes = sum(each.peak_bytes for each in self._snapshots.values())
        self._peak_bytes = max(self._peak_bytes, nbytes)
        return snapshots

    def _find_parameters(self, optimizer: Optimizer) -> list[tuple[str, Tensor, bool]]:
        """Return the observed parameters that an optimizer steps.

        Each entry is the name, the parameter, and True if its learning rate is 0. If the names of
        the module were read again, the chosen elements of parameters that it no longer has are
        forgotten.
        """
        parameters = self.registry.find_stepped(optimizer)
        names = self.registry.names
        if names is not self._chosen_names:  # the registry has read the module again
            self._chosen_names = names
            for gone in self._chosen.keys() - names.keys():
                del self._chosen[gone]
        return parameters

    def _find_left_out(self, parameters: list[tuple[str, Tensor, bool]], index: int) -> set[str]:
        """Return the names of parameters that are not copied in this step.

        These are parameters that `should_copy` leaves out, and those whose gradients cannot be
        observed.

        Raises:
            ValueError: A gradient cannot be observed, and there is no `leave_out` callback.
        """
        due, left_out = parameters, set()
        if self._should_copy is not None:
            due = [each for each in parameters if self._should_copy(each[0], index)]
            left_out = {name for name, _, _ in parameters} - {name for name, _, _ in due}
        unreduced = find_unreduced({name: parameter for name, parameter, _ in due})
        if not unreduced:
            return left_out
        name, parameter = next(iter(unreduced.items()))
        reason = describe_unreduced(name, parameter)
        if self._leave_out is None:
            raise ValueError(f"{reason}, or leave {name} out of what is observed")
        self._leave_out([*unreduced], reason)
        return left_out | {*unreduced}

    def _finish(self, hooks: _Hooks, optimizer: Optimizer, captured: _Captured | None) -> None:
        if self._every_step is not None:
            self._every_step.finish(optimizer, hooks.unseen if captured is None else "")
        if hooks not in self._due:
            return
        try:
            with torch.no_grad():
                self._deliver(self._make_outcome(hooks, optimizer, captured))
        except Exception as error:
            self._stop()
            if self._strict:
                raise
            self._report(
                f"stops observing after an error: {describe_error(error)}. Training goes on; "
                "strict=True would raise it"
            )
            # The error refers to its frames, and their local variables to the error and to copies:
            # a cycle, which would live until the garbage collector runs.
            traceback.clear_frames(error.__traceback__)

    def _report(self, notice: str) -> None:
        """Pass a notice to the user's `warn` function, or to `warnings.warn` if that fails."""
        try:
            self._notices.give(notice)
        except Warning:  # the user made warnings errors
            raise
        except Exception as failed:  # noqa: BLE001 - no error of the user's function ends training
            warnings.warn(f"{type(self).__name__} {notice}; warn= failed: {failed!r}", stacklevel=3)

    def _make_outcome(
        self, hooks: _Hooks, optimizer: Optimizer, captured: _Captured | None
    ) -> StepOutcome:
        start = time.perf_counter()
        step, skipped, error = None, None, self._failed.pop(hooks, None)
        seconds = 0.0
        if captured is None:
            error = error or RuntimeError(hooks.unseen)
        else:
            seconds, error = captured.seconds, error or captured.error
        if captured is not None and error is None:
            try:
                step = make_step(captured.snapshots, optimizer, hooks.index)
                skipped = self._find_skip_reason(step)
            except Exception as caught:  # noqa: BLE001 - delivered with the outcome
                error = caught
        seconds += time.perf_counter() - start
        return StepOutcome(optimizer, hooks.index, step, skipped, error, seconds)

    def _find_skip_reason(self, step: OptimizerStep) -> SkipReason | None:
        if not step.names:
            return "no gradients"
        if self._read_found_inf and step.found_inf is not None and step.found_inf.item():
            return "inf"
        return "learning rate 0" if len(step.resting) == len(step.names) else None

    def _deliver(self, outcome: StepOutcome) -> None:
        if self._on_outcome is not None:
            self._on_outcome(outcome)
        elif outcome.error is not None:
            raise outcome.error
        elif outcome.skipped is not None:
            self.skipped[outcome.skipped] += 1
        elif self._on_step is not None and outcome.step is not None:
            self._on_step(outcome.step.without_resting())

    def _count_skip_by_scaler(self, optimizer: Optimizer) -> None:
        for hooks in [*self._attached.hooks]:  # a copy: should_observe may detach
            if hooks.optimizer is not optimizer or not self._is_observed(hooks):
                continue
            if hooks in self._failed:  # no step will end that could deliver the error
                self._due.add(hooks)
                self._finish(hooks, optimizer, None)
            else:
                self.skipped["inf"] += 1

    # --- ending the observation

    def _stop(self) -> None:
        self._stopped = True
        for hooks in self._attached.hooks:
            hooks.forget()
        for snapshots in self._snapshots.values():
            snapshots.clear()
        self.registry.forget_optimizers()
        self._failed.clear()
        if self._every_step is not None:
            self._every_step.stop()


def describe_error(error: Exception) -> str:
    """Return the text of an error, with the function and line of code that raised it if known."""
    if isinstance(error, RankError):
        return str(error)
    try:
        text = repr(error)
    except Exception:  # noqa: BLE001 - a class of the user may fail to write itself
        text = type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    return (
        f"{text} in {frames[-1].name}, {frames[-1].filename}:{frames[-1].lineno}"
        if frames
        else text
    )
