"""`OtherSteps`: notice optimizers that step observed parameters, and are not observed themselves.

torch calls the *global* hooks of a process before and after the step of every optimizer. They tell
exactly which optimizer steps which parameters, also where an observed optimizer steps the same.

Read `step_hooks` first. `altgrad.monitor.bypass` turns the findings into notices.

References:
    ``register_optimizer_step_pre_hook`` and ``register_optimizer_step_post_hook`` of
    ``torch.optim.optimizer``
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from altgrad.observation.step_hooks import (
    bind_weakly,
    count_observed_steps,
    find_stepping,
    is_hooked,
    was_hooked,
)


class OtherSteps:
    """A record of the optimizers that step observed parameters, and are not observed themselves.

    A step counts if it has a gradient and a learning rate other than 0. It does not count if it is
    a part of an observed step, as inside of Lookahead, or if an observed step is a part of it, as
    inside of a wrapper. Optimizers that another observer observes, or did earlier, are left out:
    the user knows of them. So are steps that `torch.compile` compiles, since a hook would change
    their code.

    Args:
        find_names: Function that returns the name of each observed parameter.
    """

    def __init__(self, find_names: Callable[[], Mapping[Tensor, str]]) -> None:
        self._find_names = find_names
        self._found: dict[str, dict[str, None]] = {}  # layers by the class of their optimizer
        self._begun: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._handles: list[Any] = []
        # The global hooks outlive this object unless they are removed.
        weakref.finalize(self, _remove_all, self._handles).atexit = False

    @property
    def found(self) -> Mapping[str, list[str]]:
        """The names of the layers that were stepped, by the name of the optimizer's class."""
        return {kind: [*names] for kind, names in self._found.items()}

    def start(self) -> None:
        """Forget what was found, and begin to listen."""
        self.stop()
        self._found.clear()
        self._handles += [
            register_optimizer_step_pre_hook(_exclude_compiled(bind_weakly(self._begin))),
            register_optimizer_step_post_hook(_exclude_compiled(bind_weakly(self._end))),
        ]

    def stop(self) -> None:
        """Remove the global hooks. What was found stays."""
        _remove_all(self._handles)

    def _begin(self, optimizer: Optimizer) -> None:
        if not is_hooked(optimizer):
            self._begun[optimizer] = count_observed_steps()

    def _end(self, optimizer: Optimizer) -> None:
        begun = self._begun.pop(optimizer, None)
        # The order is by cost: most optimizers of a process end here.
        if begun is None or was_hooked(optimizer) or begun != count_observed_steps():
            return
        names = self._find_names()
        layers = [names[each] for each in _find_moved(optimizer) if each in names]
        if layers and not any(map(is_hooked, find_stepping())):
            found = self._found.setdefault(type(optimizer).__name__, {})
            found.update(dict.fromkeys(layers))


def _find_moved(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters that a step has moved, as their gradients and learning rates tell."""
    # A rate that is a tensor may be on a device, and is not read: the host would wait.
    groups = [
        group
        for group in optimizer.param_groups
        if isinstance(group.get("lr"), Tensor) or group.get("lr") != 0
    ]
    return [each for group in groups for each in group["params"] if each.grad is not None]


def _exclude_compiled(hook: Callable[[Optimizer], None]) -> Callable[..., None]:
    """Return a global hook that is no part of compiled steps, and raises no error."""

    def call(optimizer: Optimizer, *_: Any) -> None:
        # Constant while torch compiles a step, so that the graph has nothing of this hook.
        if torch.compiler.is_compiling():
            return
        with suppress(Exception):  # an unusual optimizer must not end the training
            hook(optimizer)

    return call


def _remove_all(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
