"""`OtherSteps`: notice optimizers that step observed parameters, and are not observed themselves.

torch calls the *global* hooks of a process before and after the step of every optimizer. They tell
exactly which optimizer steps which parameters, also where an observed optimizer steps the same.

Read `step_hooks` and `weight_sample` first. `altgrad.monitor.bypass` turns the findings into
notices.

References:
    ``register_optimizer_step_pre_hook`` and ``register_optimizer_step_post_hook`` of
    ``torch.optim.optimizer``
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from altgrad.observation.dtensor import to_local_tensor
from altgrad.observation.optimizers import find_wrapped
from altgrad.observation.step_hooks import (
    bind_weakly,
    count_observed_steps,
    find_backward_pass,
    find_stepping,
    is_hooked,
    was_hooked,
)
from altgrad.observation.weight_sample import WeightSample


class _Begun(NamedTuple):
    """A step of an optimizer that has begun.

    Attributes:
        observed: Number of observed steps of the process until then.
        layers: The observed layers that the optimizer has, by name.
        sample: A few weights of each, from before the step.
    """

    observed: int
    layers: Mapping[str, Tensor]
    sample: WeightSample


class OtherSteps:
    """A record of the optimizers that step observed parameters, and are not observed themselves.

    A step of a layer counts if it changed sampled weights, or has a gradient and a learning rate
    other than 0. It does not count if it is a part of an observed step, as inside of Lookahead, or
    if an observed step is a part of it, as inside of a wrapper. Optimizers that another observer
    observes, or did earlier, are left out: the user knows of them.

    A step that `torch.compile` compiles has no hook, which would change its code. When it is
    compiled, all layers with a gradient count.

    Args:
        find_names: Function that returns the name of each observed parameter.

    Attributes:
        in_backward: The names of the classes of optimizers that stepped inside a backward pass.
    """

    def __init__(self, find_names: Callable[[], Mapping[Tensor, str]]) -> None:
        self.in_backward: set[str] = set()
        self._find_names = find_names
        self._found: dict[str, dict[str, None]] = {}  # layers by the class of their optimizer
        self._begun: WeakKeyDictionary[Optimizer, _Begun] = WeakKeyDictionary()
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
        compiled = bind_weakly(self._note_compiled)
        self._found.clear()
        self.in_backward.clear()
        self._handles += [
            register_optimizer_step_pre_hook(_divide(bind_weakly(self._begin), compiled)),
            register_optimizer_step_post_hook(_divide(bind_weakly(self._end), compiled)),
        ]

    def stop(self) -> None:
        """Remove the global hooks. What was found stays."""
        _remove_all(self._handles)

    def _begin(self, optimizer: Optimizer) -> None:
        # The order is by cost: most optimizers of a process end here.
        if is_hooked(optimizer) or was_hooked(optimizer):
            return
        names = self._find_names()
        layers = {names[each]: each for each in _list_parameters(optimizer) if each in names}
        # What is known already is not read again: the host would wait for the device.
        if layers.keys() - self._found.get(type(optimizer).__name__, {}).keys():
            self._begun[optimizer] = _Begun(count_observed_steps(), layers, WeightSample(layers))

    def _end(self, optimizer: Optimizer) -> None:
        begun = self._begun.pop(optimizer, None)
        if begun is None or begun.observed != count_observed_steps():
            return
        if any(map(is_hooked, find_stepping())):
            return
        moved = {*begun.sample.find_changed(begun.layers), *_find_applied(optimizer, begun.layers)}
        if moved:
            self._add(optimizer, [name for name in begun.layers if name in moved])

    def _note_compiled(self, optimizer: Optimizer) -> None:
        """Record an optimizer while its step is compiled, since compiled steps call no hook."""
        if any(map(was_hooked, find_wrapped(optimizer))) or any(map(is_hooked, find_stepping())):
            return
        names = self._find_names()
        with_gradient = [each for each in _list_parameters(optimizer) if each.grad is not None]
        if layers := [names[each] for each in with_gradient if each in names]:
            self._add(optimizer, layers)

    def _add(self, optimizer: Optimizer, layers: Iterable[str]) -> None:
        kind = type(optimizer).__name__
        self._found.setdefault(kind, {}).update(dict.fromkeys(layers))
        if find_backward_pass() is not None:
            self.in_backward.add(kind)


def _list_parameters(optimizer: Optimizer) -> list[Tensor]:
    return [each for group in optimizer.param_groups for each in group["params"]]


def _find_applied(optimizer: Optimizer, layers: Mapping[str, Tensor]) -> list[str]:
    """Return the layers with a gradient and a learning rate other than 0, after a step.

    The step may have moved them although a sample of their weights is unchanged, as in an
    embedding of which a batch uses a few rows.
    """
    resting = {
        id(each)
        for group in optimizer.param_groups
        if float(group.get("lr", 1.0)) == 0
        for each in group["params"]
    }
    return [
        name for name, each in layers.items() if id(each) not in resting and _has_gradient(each)
    ]


def _has_gradient(parameter: Tensor) -> bool:
    """Return True if a gradient other than 0 is there, on this rank."""
    if parameter.grad is None:
        return False
    gradient = to_local_tensor(parameter.grad)
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    return bool((gradient != 0).any())


def _divide(
    hook: Callable[[Optimizer], None], compiled: Callable[[Optimizer], None]
) -> Callable[..., None]:
    """Return a global hook that is no part of compiled steps, and raises no error.

    Args:
        hook: Function that is called in steps that run as they are.
        compiled: Function that is called while a step is compiled.
    """

    # The compiler calls this function itself, and its result is a constant in the compiled code:
    # https://docs.pytorch.org/docs/stable/generated/torch.compiler.assume_constant_result.html
    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def note(identity: int) -> None:
        with suppress(Exception):
            # The compiler passes constants alone. The optimizer is found by a search of 0.1 s.
            compiled(next(each for each in gc.get_objects() if id(each) == identity))

    def call(optimizer: Optimizer, *_: Any) -> None:
        # Constant while torch compiles a step, so that the graph has nothing of this hook.
        if torch.compiler.is_compiling():
            note(id(optimizer))
            return
        with suppress(Exception):  # an unusual optimizer must not end the training
            hook(optimizer)

    return call


def _remove_all(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
