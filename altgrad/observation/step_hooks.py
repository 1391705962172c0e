"""When a step of a torch optimizer begins, when its gradients are final, and when it ends."""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, optimizer as torch_optimizer

Captured = TypeVar("Captured")

_Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


_HOOKS: weakref.WeakKeyDictionary[Optimizer, weakref.WeakSet[StepHooks[Any]]]
_HOOKS = weakref.WeakKeyDictionary()


def is_hooked(optimizer: Optimizer) -> bool:
    """Whether any `StepHooks` are around the steps of an optimizer."""
    return bool(_HOOKS.get(optimizer))


class StepHooks(Generic[Captured]):
    """Three calls around each step of one optimizer, however it is stepped.

    ``is_due(hooks)`` at its beginning; unless that is false, ``capture(hooks, optimizer)`` when the
    gradients are those that will be applied and no weight has changed, and
    ``finish(hooks, optimizer, captured)`` at its end, with what `capture` returned, or None if
    there was a closure and the optimizer did not call it. A step that raises is not finished. A
    subclass that calls ``super().step()`` makes one step.

    The optimizer and the object that the three are methods of are held weakly; without it, they
    are not called.

    Where the step would be shown wrongly, `capture` is not called, and `unseen` says why: the
    optimizer moves weights before it calls its closure, as SAM does (told by autograd's count of
    writes, which those through ``.data`` escape), or is handed a GradScaler to unscale with.

    Attributes:
        index: How many steps were finished before this one.
        unseen: Why this step cannot be shown, though it was made; empty if it can.
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
        self._closure_position = _closure_position(optimizer)
        self._optimizer = weakref.ref(optimizer)
        self._is_due = weakly(is_due)
        self._capture = _outside_of_graphs(weakly(capture))
        self._finish = weakly(finish)
        # Of the step that is under way, or that raised:
        self._running = False
        self._nested = False
        self._observed = False
        self._captured: Captured | None = None
        self._handles = (
            optimizer.register_step_pre_hook(_outside_of_graphs(self._before)),
            optimizer.register_step_post_hook(_outside_of_graphs(self._after)),
        )
        _HOOKS.setdefault(optimizer, weakref.WeakSet()).add(self)

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer, as long as it lives."""
        return self._optimizer()

    def forget(self) -> None:
        """Let go of what was captured, and do not finish the step that is under way."""
        self._observed, self._captured = False, None

    def remove(self) -> bool:
        """Take the hooks off; false within a step, where torch iterates over them."""
        optimizer = self._optimizer()
        if optimizer is not None and step_depth(optimizer):
            return False
        for handle in self._handles:
            handle.remove()
        if optimizer is not None:
            _HOOKS[optimizer].discard(self)
        return True

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Arguments | None:
        if self._running and step_depth(optimizer) > 1:
            self._nested = True
            return None
        self._running, self._nested, self._captured = True, False, None
        self._observed = self._is_due(self)
        if not self._observed:
            return None
        closure = self._closure_of(args, kwargs)
        kind = type(optimizer).__name__
        self.unseen = f"{kind} does not call the closure that it is given, and shows no gradients"
        if kwargs.get("grad_scaler") is not None:
            self.unseen = f"{kind} unscales its gradients with a GradScaler that it is handed"
            return None
        if closure is None:
            self._capture_now(optimizer)
            return None
        at_the_beginning = _writes(optimizer)

        @functools.wraps(closure)
        def closure_then_capture(*inputs: Any, **options: Any) -> Any:
            """Only the closure computes the gradients; trainers clip them in it, too."""
            first = self._captured is None
            if first and _differ(_writes(optimizer), at_the_beginning):
                first = False
                self.unseen = (
                    f"{kind} moves weights before it calls its closure, so that those before the "
                    "step are gone; if it wraps an optimizer, as SAM does, attach that"
                )
            loss = closure(*inputs, **options)
            if first:
                self._capture_now(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure_then_capture}
        position = self._closure_position
        return (*args[:position], closure_then_capture, *args[position + 1 :]), kwargs

    def _closure_of(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[..., Any] | None:
        closure = kwargs.get("closure")
        if closure is None and self._closure_position < len(args):
            closure = args[self._closure_position]
        return closure if callable(closure) and not isinstance(closure, nn.Module) else None

    def _capture_now(self, optimizer: Optimizer) -> None:
        if self._observed:
            self._captured = self._capture(self, optimizer)

    def _after(self, optimizer: Optimizer, *_: Any) -> None:
        if not self._running or (self._nested and step_depth(optimizer) > 1):
            return
        self._running = False
        if self._observed:
            captured, self._captured = self._captured, None
            self._finish(self, optimizer, captured)
        self.index += 1


def _outside_of_graphs(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook, as it is also where `torch.compile` compiles the call of `step`."""
    untraced: Callable[..., Any] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    # From torch 2.7 on, `disable` has an argument for this.
    untraced.__dict__["_torchdynamo_disable_msg"] = (
        "AltGrad cannot observe an optimizer step that is compiled with fullgraph=True"
    )
    return untraced


def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """The bound method, without keeping its object alive: once that is gone it returns None."""
    reference, function = weakref.ref(method.__self__), method.__func__  # type: ignore[attr-defined]

    def call(*args: Any) -> Any:
        alive = reference()
        return None if alive is None else function(alive, *args)

    return call


def _closure_position(optimizer: Optimizer) -> int:
    """Where `step` takes its closure among the positional arguments."""
    try:
        return [*inspect.signature(type(optimizer).step).parameters].index("closure")
    except (TypeError, ValueError):  # it has another name, or there is no signature
        return 1


def _writes(optimizer: Optimizer) -> list[tuple[int, int] | None]:
    """What changes with every write to a parameter, and with its memory; None if not to be told."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [_writes_to(parameter) for parameter in parameters]


def _writes_to(parameter: Tensor) -> tuple[int, int] | None:
    try:
        # torch has no public name for the count of writes that autograd relies on.
        return parameter._version, parameter.data_ptr()  # noqa: SLF001
    except (RuntimeError, ValueError):  # not initialised yet, sparse, made in inference mode …
        return None


def _differ(now: list[tuple[int, int] | None], then: list[tuple[int, int] | None]) -> bool:
    return any(a != b for a, b in zip(now, then, strict=False) if a is not None and b is not None)


def step_depth(optimizer: Optimizer) -> int:
    """How many calls of `optimizer.step` this thread is in: 0 outside, 1 in a hook of a step.

    2 means that a subclass called ``super().step()``, which calls the hooks once more. Counting
    in the hooks would not do: a step that raises calls no hook on its way out.
    """
    depth = 0
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - the documented way to the stack
    while frame is not None:
        code = frame.f_code
        # What torch puts around every `step`: Optimizer.profile_hook_step.
        if code.co_name == "wrapper" and code.co_filename == torch_optimizer.__file__:
            depth += frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return depth
