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
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

Captured = TypeVar("Captured")

_Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


class StepHooks(Generic[Captured]):
    """Three calls around each step of one optimizer, however it is stepped.

    ``is_due(hooks)`` at its beginning; unless that is false, ``capture(hooks, optimizer)`` when the
    gradients are those that will be applied and no weight has changed, and
    ``finish(hooks, optimizer, captured)`` at its end, with what `capture` returned, or None if
    there was a closure and the optimizer did not call it. A step that raises is not finished. A
    subclass that calls ``super().step()`` makes one step.

    The optimizer and the object that the three are methods of are held weakly; without it, they
    are not called.

    An optimizer that moves weights before it calls its closure, as SAM does, would be shown with
    the wrong weights: `capture` is then not called, and `moved_early` is true.

    Attributes:
        index: How many steps were finished before this one.
        moved_early: Whether this step moved weights between its beginning and its closure.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        is_due: Callable[[StepHooks[Captured]], bool],
        capture: Callable[[StepHooks[Captured], Optimizer], Captured],
        finish: Callable[[StepHooks[Captured], Optimizer, Captured | None], None],
    ) -> None:
        self.index = 0
        self.moved_early = False
        self._closure_position = _closure_position(optimizer)
        self._optimizer = weakref.ref(optimizer)
        self._is_due = weakly(is_due)
        self._capture = weakly(capture)
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
        return True

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Arguments | None:
        if self._running and step_depth(optimizer) > 1:
            self._nested = True
            return None
        self._running, self._nested, self.moved_early = True, False, False
        self._captured = None
        self._observed = self._is_due(self)
        if not self._observed:
            return None
        closure = self._closure_of(args, kwargs)
        if closure is None:
            self._capture_now(optimizer)
            return None
        at_the_beginning = _versions(optimizer)

        @functools.wraps(closure)
        def closure_then_capture(*inputs: Any, **options: Any) -> Any:
            """Only the closure computes the gradients; trainers clip them in it, too."""
            first = self._captured is None and not self.moved_early
            self.moved_early |= first and _versions(optimizer) != at_the_beginning
            loss = closure(*inputs, **options)
            if first and not self.moved_early:
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
        if closure is None and 0 < self._closure_position < len(args):
            closure = args[self._closure_position]
        return closure if callable(closure) else None

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
    """Where `step` takes its closure among the positional arguments; 0 where it takes none."""
    parameters = inspect.signature(type(optimizer).step).parameters
    if "closure" in parameters:
        return [*parameters].index("closure")
    passes_on = any(each.kind is each.VAR_POSITIONAL for each in parameters.values())
    return 1 if passes_on else 0


def _versions(optimizer: Optimizer) -> list[tuple[int, int]]:
    """What changes with every operation that writes to a parameter, and with its memory."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # torch has no public name for the count of writes that autograd relies on.
    versions = [0 if p.is_inference() else p._version for p in parameters]  # noqa: SLF001
    return list(zip(versions, [p.data_ptr() for p in parameters], strict=True))


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
