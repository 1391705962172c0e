"""Learn when a step of a torch optimizer begins, when its gradients are final, and when it ends.

`StepHooks` registers a hook before and a hook after each step, and calls three methods of its
owner, such as a `StepObserver`. Three cases make this longer than two hooks:

- A closure computes the gradients inside the step, so that the call of the closure is wrapped.
- A subclass may call ``super().step()``, which calls the hooks twice in one step.
- A step that raises an error calls no hook at its end.

Read `optimizers` first; `dtensor` comes next, then `snapshots`, which copies when the gradients are
final.

References:
    https://docs.pytorch.org/docs/stable/generated/torch.optim.Optimizer.register_step_pre_hook.html
    https://docs.pytorch.org/docs/stable/generated/torch.optim.Optimizer.register_step_post_hook.html
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, optimizer as torch_optimizer

Captured = TypeVar("Captured")
"""The type of what the owner of `StepHooks` captures before a step, and gets back after it."""

_Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]  # args and kwargs of `step`


# For each optimizer, its hooks. The entry outlives the hooks, so that `was_hooked` can tell.
_HOOKS: weakref.WeakKeyDictionary[Optimizer, weakref.WeakSet[StepHooks[Any]]]
_HOOKS = weakref.WeakKeyDictionary()
_STEPS_ENDED = [0]  # in all of the process
_OWN_PASSES = [0]  # backward passes of `count_backward_passes`


def is_hooked(optimizer: Optimizer) -> bool:
    """Return True if an optimizer has `StepHooks` now: something observes its steps."""
    return bool(_HOOKS.get(optimizer))


def was_hooked(optimizer: Optimizer) -> bool:
    """Return True if an optimizer has or had `StepHooks`: something observes its steps, or did."""
    return optimizer in _HOOKS


def count_observed_steps() -> int:
    """Return how many steps all `StepHooks` of this process have seen end."""
    return _STEPS_ENDED[0]


class StepHooks(Generic[Captured]):
    """The hooks of one owner on one optimizer: three calls around each step.

    ``is_due(hooks)`` is called when the step begins. If it returns False, the other two are not
    called for this step.

    ``capture(hooks, optimizer)`` is called when the gradients are final and no weight has moved.

    ``finish(hooks, optimizer, captured)`` is called when the step ends, with the result of
    `capture`. If `capture` was not called, `captured` is None and `hooks.unseen` says why:

    - The optimizer does not call its closure.
    - The optimizer moves weights before it calls its closure, as SAM does.
    - The optimizer takes a GradScaler and unscales gradients itself.

    A step that raises an error is not finished, and not counted. A step of a subclass that calls
    ``super().step()`` is one step. The optimizer and the owner are held weakly; once the owner has
    been garbage-collected, nothing is called.

    Args:
        optimizer: A torch optimizer, as `altgrad.observation.optimizers.unwrap` returns it.
        is_due: A bound method of the owner, which decides whether the other two are called.
        capture: A bound method of the owner, which copies weights and gradients.
        finish: A bound method of the owner, which receives what `capture` returned.

    Attributes:
        index: Number of steps that the optimizer has finished since the hooks were registered.
        unseen: The reason why `capture` was not called for the running step.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        is_due: Callable[[StepHooks[Captured]], bool],
        capture: Callable[[StepHooks[Captured], Optimizer], Captured],
        finish: Callable[[StepHooks[Captured], Optimizer, Captured | None], None],
    ) -> None:
        self.index = 0
        self.unseen = ""
        self._closure_position = _find_closure_position(optimizer)
        self._optimizer = weakref.ref(optimizer)
        self._is_due = bind_weakly(is_due)
        self._capture = _exclude_from_graphs(bind_weakly(capture))
        self._finish = bind_weakly(finish)
        # State of the step that is running, or of the last step if it raised an error:
        self._running = False  # a step has begun and not ended
        self._nested = False  # `step` was called inside of `step`, by super().step()
        self._observed = False  # the result of `is_due`
        self._captured: Captured | None = None
        self._handles = (
            optimizer.register_step_pre_hook(_exclude_from_graphs(self._before)),
            optimizer.register_step_post_hook(_exclude_from_graphs(self._after)),
        )
        _HOOKS.setdefault(optimizer, weakref.WeakSet()).add(self)

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer that has these hooks; None once it has been garbage-collected."""
        return self._optimizer()

    def forget(self) -> None:
        """Release what `capture` copied for the running step, and do not call `finish` for it."""
        self._observed, self._captured = False, None

    def remove(self) -> bool:
        """Remove the hooks from the optimizer, unless a step is running.

        torch iterates over the hooks during a step.

        Returns:
            True if the hooks were removed.
        """
        optimizer = self._optimizer()
        if optimizer is not None and count_step_calls(optimizer):
            return False
        for handle in self._handles:
            handle.remove()
        if optimizer is not None:
            _HOOKS[optimizer].discard(self)
        return True

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Arguments | None:
        # A call at depth 1 begins a step. If one is running then, it has raised an error.
        if self._running and count_step_calls(optimizer) > 1:
            self._nested = True
            return None
        self._running, self._nested, self._captured = True, False, None
        self._observed = self._is_due(self)
        if not self._observed:
            return None
        closure = self._find_closure(args, kwargs)
        kind = type(optimizer).__name__
        self.unseen = f"{kind} does not call the closure that it is given, and shows no gradients"
        # A GradScaler passes itself to a `step` with such an argument, which then unscales the
        # gradients itself; torch has deprecated that: torch/amp/grad_scaler.py, GradScaler.step.
        if kwargs.get("grad_scaler") is not None:
            self.unseen = f"{kind} unscales its gradients with a GradScaler that is passed to it"
            return None
        if closure is None:
            self._capture_now(optimizer)
            return None
        counts_at_start = _count_writes(optimizer)

        # The gradients are final when the closure first returns: trainers clip them inside of it.
        # `wraps` keeps the attributes of the closure, which the optimizer may read.
        @functools.wraps(closure)
        def closure_then_capture(*inputs: Any, **options: Any) -> Any:
            first = self._captured is None
            if first and _differ(_count_writes(optimizer), counts_at_start):
                first = False
                self.unseen = (
                    f"{kind} moves weights before it calls its closure, so that the weights from "
                    "before the step are lost; if it wraps an optimizer, as SAM does, attach that"
                )
            loss = closure(*inputs, **options)
            if first:
                self._capture_now(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure_then_capture}
        position = self._closure_position
        return (*args[:position], closure_then_capture, *args[position + 1 :]), kwargs

    def _find_closure(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[..., Any] | None:
        closure = kwargs.get("closure")
        if closure is None and self._closure_position < len(args):
            closure = args[self._closure_position]
        # A module is callable, too: some optimizers take the model as an argument of `step`.
        return closure if callable(closure) and not isinstance(closure, nn.Module) else None

    def _capture_now(self, optimizer: Optimizer) -> None:
        if self._observed:
            self._captured = self._capture(self, optimizer)

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        if not self._running or (self._nested and count_step_calls(optimizer) > 1):
            return
        self._running = False
        if self._observed:
            captured, self._captured = self._captured, None
            self._finish(self, optimizer, captured)
        self.index += 1
        _STEPS_ENDED[0] += 1


def _exclude_from_graphs(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook as a function that `torch.compile` calls, but does not compile.

    Compiled code may round differently, so that copies would not be exact.
    """
    untraced: Callable[..., Any] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    # The reason that torch gives in its error. From torch 2.7 on, torch.compiler.disable takes it
    # as `reason` and keeps it under this private name: torch/_dynamo/decorators.py. Older versions
    # ignore the name.
    untraced.__dict__["_torchdynamo_disable_msg"] = (
        "AltGrad cannot observe an optimizer step that is compiled with fullgraph=True"
    )
    return untraced


def bind_weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls a bound method, and holds the method's object weakly.

    Once the object has been garbage-collected, the function does nothing and returns None.
    """
    reference, function = weakref.ref(method.__self__), method.__func__  # type: ignore[attr-defined]

    def call(*args: Any) -> Any:
        alive = reference()
        return None if alive is None else function(alive, *args)

    return call


def _find_closure_position(optimizer: Optimizer) -> int:
    """Return the position of the closure among the arguments of `step`; ``self`` has position 0."""
    try:
        return [*inspect.signature(type(optimizer).step).parameters].index("closure")
    except (TypeError, ValueError):  # the argument has another name, or there is no signature
        return 1  # as in torch.optim.Optimizer.step(self, closure)


def _count_writes(optimizer: Optimizer) -> list[tuple[int, int] | None]:
    """Return for each parameter a pair of ints that changes if its weights are written or replaced.

    The pair is None for a parameter that cannot have one.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [_count_writes_to(parameter) for parameter in parameters]


def _count_writes_to(parameter: Tensor) -> tuple[int, int] | None:
    try:
        # Autograd counts in-place writes in `_version`, which has no public name. Writes through
        # `.data` are not counted; setting `.data` changes the address:
        # https://docs.pytorch.org/docs/stable/notes/autograd.html#in-place-correctness-checks
        return parameter._version, parameter.data_ptr()  # noqa: SLF001
    except (RuntimeError, ValueError):  # uninitialised, sparse, or made in inference mode
        return None


def _differ(now: list[tuple[int, int] | None], then: list[tuple[int, int] | None]) -> bool:
    return any(a != b for a, b in zip(now, then, strict=False) if a is not None and b is not None)


def count_step_calls(optimizer: Optimizer) -> int:
    """Return how many calls of an optimizer's `step` are running in this thread.

    The result is 0 outside of a step, and 1 in a hook of a step. It is 2 if a subclass has called
    ``super().step()``, which calls the hooks once more.
    """
    # The stack is read, because counting in hooks would fail: a step that raises an error calls no
    # hook at its end.
    return sum(each is optimizer for each in find_stepping())


def find_backward_pass() -> int | None:
    """Return a number of the backward pass that is running in this thread; None outside of one."""
    # torch has no public name for it: torch/utils/checkpoint.py uses it in the same way.
    number: int = torch._C._current_graph_task_id()  # noqa: SLF001
    return None if number < 0 else number


def count_backward_passes() -> int:
    """Return how many backward passes this process has run so far.

    A call runs a pass of its own, of one number on the CPU, which is left out.
    """
    numbers: list[int | None] = []
    with torch.inference_mode(mode=False), torch.enable_grad():
        leaf = torch.zeros((), device="cpu", requires_grad=True)
        leaf.register_hook(  # type: ignore[no-untyped-call]
            lambda _: numbers.append(find_backward_pass())
        )
        leaf.clone().backward()  # type: ignore[no-untyped-call]
    _OWN_PASSES[0] += 1
    return 0 if numbers[0] is None else numbers[0] + 1 - _OWN_PASSES[0]


def find_stepping() -> Iterator[Optimizer]:
    """Yield the optimizer of each call of a `step` that is running in this thread, innermost first.

    Returns:
        An iterator over optimizers, with one entry for each call.
    """
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - the documented way to the stack
    while frame is not None:
        code = frame.f_code
        # The function that torch wraps around every `step`, which has no public name:
        # torch/optim/optimizer.py, Optimizer.profile_hook_step.
        if code.co_name == "wrapper" and code.co_filename == torch_optimizer.__file__:
            optimizer = frame.f_locals.get("self")
            if optimizer is not None:
                yield optimizer
        frame = frame.f_back
