"""Run a twin's optimizer so that the rest of the process does not notice.

A twin steps a sample of the training with an optimizer of its own. `step_quietly` steps that one
without the global hooks of torch, which are meant for the optimizers of the training.
`keeping_settings` restores settings of torch that the optimizer, or the function that makes it,
leaves changed.

Read `generators` first; `factory` comes next.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch.optim import Optimizer


def step_quietly(optimizer: Optimizer) -> None:
    """Step an optimizer without torch's global optimizer hooks, and restore settings afterwards.

    Hooks that are registered in the optimizer itself run. If there are none, a profiler gets no
    record ``Optimizer.step``, unless `step` calls ``super().step()``.

    Args:
        optimizer: The optimizer. It belongs to a twin, a sample of the training that is stepped on
            its own.
    """
    with keeping_settings(), _silencing_global_hooks():
        _find_plain_step(optimizer)()


@contextmanager
def keeping_settings() -> Iterator[None]:
    """Restore settings of torch on exit: grad mode, default dtype, determinism, and threads."""
    before = [read() for read, _ in _SETTINGS]
    try:
        yield
    finally:
        for (read, write), value in zip(_SETTINGS, before, strict=True):
            if read() != value:
                write(value)


# --- settings


def _read_determinism() -> tuple[bool, bool]:
    enabled = torch.are_deterministic_algorithms_enabled()
    return enabled, torch.is_deterministic_algorithms_warn_only_enabled()


def _write_determinism(value: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])


_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], object]], ...] = (
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (_read_determinism, _write_determinism),
    (torch.get_num_threads, torch.set_num_threads),
)
"""Functions that read and write each setting of torch that an optimizer might change."""


# --- hooks

# register_optimizer_step_pre_hook and register_optimizer_step_post_hook write to these dicts, which
# have no public name: torch/optim/optimizer.py. In a version without them, hooks run for twins, and
# a test fails.
_GLOBAL_HOOKS: tuple[dict[int, Callable[..., Any]], ...] = tuple(
    getattr(sys.modules[Optimizer.__module__], name, {})
    for name in ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
)
_LOCK = threading.RLock()


class _Silent:
    """A wrapper of a global optimizer hook that skips it in the thread that made the wrapper.

    Args:
        hook: The hook.
    """

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook = hook
        self._thread = threading.get_ident()

    def __call__(self, *args: Any) -> Any:
        return None if threading.get_ident() == self._thread else self.hook(*args)


@contextmanager
def _silencing_global_hooks() -> Iterator[None]:
    """Skip torch's global optimizer hooks in this thread; others may step the training now."""
    if not any(_GLOBAL_HOOKS):
        yield
        return
    with _LOCK:
        silent = [{key: _Silent(hook) for key, hook in [*each.items()]} for each in _GLOBAL_HOOKS]
        # Only values change, because another thread may iterate over the dicts.
        for hooks, replaced in zip(_GLOBAL_HOOKS, silent, strict=True):
            hooks.update(replaced)
        try:
            yield
        finally:
            for hooks, replaced in zip(_GLOBAL_HOOKS, silent, strict=True):
                hooks.update({k: each.hook for k, each in replaced.items() if k in hooks})


def _find_plain_step(optimizer: Optimizer) -> Callable[[], object]:
    """Return the `step` of an optimizer without the wrapper that calls hooks and the profiler.

    A `step` with another wrapper, or of an optimizer with hooks, is returned as it is.
    """
    step = optimizer.step
    function = getattr(step, "__func__", None)
    # Names without a public equivalent, made in Optimizer.__init__: torch/optim/optimizer.py.
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)  # noqa: SLF001
    if any(hooks) or _WRAPPER is None or getattr(function, "__code__", None) is not _WRAPPER:
        return step
    return MethodType(function.__wrapped__, optimizer)  # type: ignore[union-attr]


def _find_wrapper() -> object:
    """Return the code object of the wrapper that torch puts around each `step`.

    None if this version of torch has none.
    """
    # Other decorators copy the mark `hooked` of the wrapper, but they have other code.
    wrap = getattr(Optimizer, "profile_hook_step", None)
    return None if wrap is None else getattr(wrap(lambda: None), "__code__", None)


_WRAPPER = _find_wrapper()
