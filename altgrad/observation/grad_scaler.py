"""Notice the optimizer steps that a GradScaler skips.

`torch.amp.GradScaler.step` does not call the optimizer if a gradient is infinite or NaN. No hook of
the optimizer is called then, and the scaler has no hooks. `SkipNotifier` therefore replaces the
method `step` of one scaler object, and calls its listeners after each skipped step.

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
    """A replacement for the `step` of one GradScaler that reports skipped steps to its listeners.

    One notifier serves all listeners of a scaler. Objects whose methods listen are held weakly. The
    scaler gets its own `step` back when the last listener has gone.

    Args:
        scaler: The GradScaler whose `step` is replaced.
    """

    def __init__(self, scaler: GradScaler) -> None:
        self._scaler = scaler
        self._listeners: list[Callable[..., Any]] = []
        # A method is found on the class; on the object it is one that other code has put there.
        self._was_replaced = "step" in vars(scaler)
        self._step = scaler.step
        scaler.step = self  # type: ignore[method-assign]

    @classmethod
    def get_or_create(cls, scaler: GradScaler) -> SkipNotifier:
        """Return the notifier of a scaler, creating it on first use."""
        step = vars(scaler).get("step")
        return step if isinstance(step, cls) else cls(scaler)

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call a listener with the optimizer after each skipped step.

        Args:
            listener: A bound method; its object is held weakly.

        Returns:
            A function that ends the listening. Once no listener is left, this function also
            restores the scaler's own `step`.
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
        """Return what copy and pickle call to copy this notifier: ``getattr(scaler, "step")``.

        The scaler in that call is the copied one. By default, the copied scaler would have a
        notifier that calls `step` of the original scaler.
        """
        return getattr, (self._scaler, "step")
