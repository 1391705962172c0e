"""Keep the hooks and listeners of one observer, and remove them together.

`Attachments` owns the `StepHooks` of optimizers and the listeners of GradScalers that one observer
has registered. It removes them on request, and by itself when the observer is garbage-collected.

Read `step_hooks` and `grad_scaler` first; `observer` comes next and creates one `Attachments`.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch.amp import GradScaler
from torch.optim import Optimizer

from altgrad.observation.grad_scaler import SkipNotifier
from altgrad.observation.step_hooks import StepHooks

_Hooks = list[StepHooks[Any]]
_Listening = dict[GradScaler, Callable[[], None]]  # for each scaler, a function to stop listening


class Attachments:
    """The hooks and listeners of one observer, removed when the observer is garbage-collected.

    Args:
        observer: The observer, which is held weakly.

    Attributes:
        hooks: The `StepHooks` of each attached optimizer.
    """

    def __init__(self, observer: object) -> None:
        self.hooks: _Hooks = []
        self._listening: _Listening = {}
        # The arguments must not refer to the observer, or finalize would keep it alive for ever.
        # atexit=False: when the interpreter ends there is nothing left to clean up or warn about.
        # https://docs.python.org/3/library/weakref.html#weakref.finalize
        weakref.finalize(observer, _clean_up, self.hooks, self._listening).atexit = False

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers whose steps are observed, but those that are garbage-collected."""
        return [each for hooks in self.hooks if (each := hooks.optimizer) is not None]

    def listen(self, scaler: GradScaler, listener: Callable[[Optimizer], None]) -> None:
        """Call a listener, from now on, after each step that a GradScaler skips.

        Only the first call for a scaler has an effect, since an observer has a single listener.

        Args:
            scaler: The GradScaler.
            listener: A bound method that takes the optimizer. Its object is held weakly.
        """
        if scaler not in self._listening:
            self._listening[scaler] = SkipNotifier.get_or_create(scaler).listen(listener)

    def forget_collected(self) -> None:
        """Drop the hooks of optimizers that have been garbage-collected."""
        self.hooks[:] = [hooks for hooks in self.hooks if hooks.optimizer is not None]

    def remove_all(self) -> None:
        """Remove all hooks and listeners, except the hooks of a step that is running.

        The hooks of a running step stay in `hooks` until a later call, since torch is iterating
        over them.
        """
        _remove_all(self.hooks, self._listening)


def find_scalers(optimizers: Iterable[Any], scaler: GradScaler | None) -> list[GradScaler]:
    """Return the given GradScaler and those that wrappers of optimizers hold.

    Args:
        optimizers: Optimizers or wrappers. The wrapper of accelerate (accelerate/optimizer.py,
            AcceleratedOptimizer) has its GradScaler, if any, in the attribute ``scaler``.
        scaler: The GradScaler that the user gave; None if there is none.

    Returns:
        The GradScalers, the given one first.
    """
    candidates = (scaler, *(getattr(optimizer, "scaler", None) for optimizer in optimizers))
    return [each for each in candidates if isinstance(each, GradScaler)]


def _remove_all(hooks: _Hooks, listening: _Listening) -> None:
    hooks[:] = [each for each in hooks if not each.remove()]
    for stop_listening in listening.values():
        stop_listening()
    listening.clear()


def _clean_up(hooks: _Hooks, listening: _Listening) -> None:
    alive = [each for each in hooks if each.optimizer is not None]
    unused = bool(alive) and all(each.index == 0 for each in alive)
    _remove_all(hooks, listening)
    # Warn last: where warnings are errors, the hooks must be gone all the same.
    if unused:
        warnings.warn(
            "a StepObserver was collected before its first step: hold it in a variable, or use "
            "it in a `with` statement, as long as it observes",
            stacklevel=2,
        )
