"""Notice the optimizer steps that a GradScaler skips.

`torch.amp.GradScaler.step` does not call the optimizer if a gradient is infinite or NaN. No hook of
the optimizer is called then, and the scaler has no hooks. `SkipNotifier` therefore replaces the
method `step` of one scaler object, and calls functions, its listeners, after each skipped step.

Read `step_hooks` first; `attachments` comes next.

References:
    https://docs.pytorch.org/docs/stable/amp.html#torch.amp.GradScaler.step
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch.amp import GradScaler
from torch.optim import Optimizer

from altgrad.observation.optimizers import unwrap
from altgrad.observation.step_hooks import bind_weakly

Listener: TypeAlias = Callable[[Optimizer], None]


class SkipNotifier:
    """A replacement for the `step` of one GradScaler, which calls listeners after skipped steps.

    A scaler has one notifier for all its listeners. A listener is a bound method, whose object is
    held weakly. The scaler gets its own `step` back when the last listener stops listening.

    Args:
        scaler: The GradScaler whose `step` is replaced.
    """

    def __init__(self, scaler: GradScaler) -> None:
        self._scaler = scaler
        self._listeners: list[Callable[..., Any]] = []
        # `step` is usually an attribute of the class. If the object has one, other code has put it
        # there, and `_restore` puts it back.
        self._was_replaced = "step" in vars(scaler)
        self._step = scaler.step
        scaler.step = self  # type: ignore[method-assign]

    @classmethod
    def get_or_create(cls, scaler: GradScaler) -> SkipNotifier:
        """Return the replacement of a scaler's `step`, putting it in place on first use."""
        step = vars(scaler).get("step")
        return step if isinstance(step, cls) else cls(scaler)

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call a listener with the optimizer, from now on, after each step that the scaler skips.

        Args:
            listener: A bound method. Its object is held weakly.

        Returns:
            A function that takes no argument and ends the calls of this listener. If no listener is
            left then, it also gives the scaler its own `step` back.
        """
        weak = bind_weakly(listener)
        self._listeners.append(weak)

        def stop() -> None:
            if weak in self._listeners:
                self._listeners.remove(weak)
            if not self._listeners:
                self._restore()

        return stop

    def _restore(self) -> None:
        # Other code may have replaced `step` later and call this object from there. Its
        # replacement stays, and this object only passes calls on.
        if vars(self._scaler).get("step") is self:
            del self._scaler.step
            if self._was_replaced:
                self._scaler.step = self._step

    def __call__(self, optimizer: Any, *args: Any, **kwargs: Any) -> float | None:
        """Call the scaler's own `step`, then all listeners if the optimizer's step was skipped."""
        try:
            inner = unwrap(optimizer)
        except Exception:  # noqa: BLE001 - a scaler accepts objects that `unwrap` refuses
            return self._step(optimizer, *args, **kwargs)
        # A hook for this call only, which shows whether the scaler calls the optimizer.
        called: list[Optimizer] = []
        handle = inner.register_step_pre_hook(lambda optimizer, *_: called.append(optimizer))
        try:
            result = self._step(optimizer, *args, **kwargs)
        finally:
            handle.remove()
        if not called:
            # A copy, because a listener may stop listening while it is called.
            for notify in [*self._listeners]:
                notify(inner)
        return result

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Return the call whose result copy and pickle use for this notifier.

        The call is ``getattr(scaler, "step")`` with the copy of the scaler, which has no notifier
        yet. The result is thus the copy's own `step`. By default, the copy would get a notifier
        that calls `step` of the original scaler.
        """
        return getattr, (self._scaler, "step")
