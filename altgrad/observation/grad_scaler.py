"""Steps that a GradScaler skips without a word to the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch.amp import GradScaler
from torch.optim import Optimizer

from altgrad.observation.optimizers import unwrap
from altgrad.observation.step_hooks import weakly

Listener: TypeAlias = Callable[[Optimizer], None]


class SkipTeller:
    """Calls its listeners after each ``scaler.step(optimizer)`` that did not step the optimizer.

    A GradScaler that finds gradients that are not finite does not call the optimizer, so that no
    hook fires, and it has no hooks of its own: its `step` is replaced, on this one object, by an
    object that calls it, one for all listeners. The objects that they are methods of are held
    weakly.
    """

    def __init__(self, scaler: GradScaler) -> None:
        self._scaler = scaler
        self._listeners: list[Callable[..., Any]] = []
        self._was_replaced = "step" in vars(scaler)
        self._step = scaler.step
        scaler.step = self  # type: ignore[method-assign]

    @classmethod
    def of(cls, scaler: GradScaler) -> SkipTeller:
        """The one that the scaler has, or a new one."""
        step = vars(scaler).get("step")
        return step if isinstance(step, cls) else cls(scaler)

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call this bound method, too; returns what ends it, and the last restores `step`."""
        weak = weakly(listener)
        self._listeners.append(weak)

        def stop() -> None:
            if weak in self._listeners:
                self._listeners.remove(weak)
            if not self._listeners:
                self._restore()

        return stop

    def _restore(self) -> None:
        # Unless someone replaced it again: it is theirs now, and this one only passes through.
        if vars(self._scaler).get("step") is self:
            del self._scaler.step
            if self._was_replaced:
                self._scaler.step = self._step

    def __call__(self, optimizer: Any, *args: Any, **kwargs: Any) -> float | None:
        try:
            inner = unwrap(optimizer)
        except Exception:  # noqa: BLE001 - a scaler is content with less than an optimizer
            return self._step(optimizer, *args, **kwargs)
        called: list[Optimizer] = []
        handle = inner.register_step_pre_hook(lambda optimizer, *_: called.append(optimizer))
        try:
            result = self._step(optimizer, *args, **kwargs)
        finally:
            handle.remove()
        if not called:
            for tell in [*self._listeners]:
                tell(inner)
        return result

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Copies and pickles of the scaler have a `step` of their own in this place."""
        return getattr, (self._scaler, "step")
