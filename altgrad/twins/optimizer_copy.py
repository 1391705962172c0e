"""`copy_optimizer`: make an optimizer that steps other parameters as a given one steps its own.

A twin steps a sample of the training with such a copy. The instance is copied, because it knows
more than the arguments of its constructor: flags that are in no group, and hyperparameters that
were changed since. To call the class again with ``**defaults`` raises an error for AdamW and for
optimizers of other libraries.

Read `shared_objects` first; `writes` comes next, which `hyperparameters` needs to keep a copy up to
date.
"""

from __future__ import annotations

import copy
import gc
import types
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

from altgrad.twins.shared_objects import LEAVES, find_shared

Groups: TypeAlias = Sequence[tuple[int, Sequence[nn.Parameter]]]
"""For each group of a copy: the index of the original's group whose hyperparameters it gets, and
the parameters of the copy."""

# Made anew for each copy: torch/optim/optimizer.py, Optimizer.__init__.
_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
# Set by GradScaler for the duration of one step: torch/amp/grad_scaler.py, GradScaler.step.
_SET_FOR_ONE_STEP = ("grad_scale", "found_inf")
NO_HYPERPARAMETERS = ("params", "param_names")
"""Keys of a parameter group that are not hyperparameters, but parameters and their names."""


class CannotCopyError(ValueError):
    """An error that says which part of an optimizer prevents a copy."""


def copy_optimizer(optimizer: Optimizer, groups: Groups, *, fused: bool = False) -> Optimizer:
    """Return an optimizer of the same class, with the same settings, for other parameters.

    The constructor of the class is not called. Attributes and hyperparameters are deep copies, so
    that the copy shares nothing with the original that either could change. The copy starts without
    hooks, and without the methods that a learning rate scheduler replaced in the instance. It has
    no states of parameters. The caller must set those that a class makes in its constructor, as
    Adagrad does.

    Args:
        optimizer: The optimizer to copy. It stays as it is.
        groups: For each group of the copy, the index of the group of `optimizer` whose
            hyperparameters are copied, and the parameters of the group.
        fused: If True, the copy steps with the fused implementation of the class.

    Returns:
        The copy.

    Raises:
        CannotCopyError: A part of `optimizer` cannot be copied, leads to its parameters, or would
            be shared with the copy. Or `fused` is True, and the class has no fused implementation.
    """
    twin: Optimizer = object.__new__(type(optimizer))
    copier = _Copier(optimizer, twin)
    for name, value in vars(optimizer).items():
        if not _is_remade(optimizer, name):
            twin.__dict__[name] = copier.copy(value, name)
    for name in _HOOKS:
        twin.__dict__[name] = OrderedDict()
    twin.state = defaultdict(dict)
    for key, value in optimizer.state.items():
        if not isinstance(key, Tensor):  # counts of the whole optimizer, as some libraries keep
            twin.state[key] = copier.copy(value, f"state[{key!r}]")
    twin.param_groups = [
        {"params": [*parameters], **copier.copy_hyperparameters(index)}
        for index, parameters in groups
    ]
    if fused:
        use_fused(twin)
    return twin


def copy_hyperparameters(optimizer: Optimizer, index: int) -> dict[str, Any]:
    """Return copies of the hyperparameters of a group, without its parameters and their names.

    Args:
        optimizer: The optimizer. It stays as it is.
        index: The index of the group.

    Returns:
        The values by key.

    Raises:
        CannotCopyError: A hyperparameter cannot be copied, or leads to a parameter.
    """
    return _Copier(optimizer, None).copy_hyperparameters(index)


def copy_value(value: Any) -> Any:
    """Return a deep copy of a hyperparameter; a tensor is cloned without its autograd graph."""
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


class _Copier:
    """A copier of the attributes and hyperparameters of one optimizer.

    It refuses those from which a copy could reach the parameters of the training.

    Args:
        optimizer: The optimizer to copy from.
        twin: The copy, which replaces `optimizer` where a part refers to it. None if there is no
            copy.
    """

    def __init__(self, optimizer: Optimizer, twin: Optimizer | None) -> None:
        self._optimizer = optimizer
        self._twin = twin
        self._parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}

    def copy(self, value: Any, name: str) -> Any:
        """Return a deep copy of a part of the optimizer.

        Args:
            value: The attribute or hyperparameter.
            name: Its name for errors.

        Returns:
            The copy.

        Raises:
            CannotCopyError: The part leads to a parameter or to an optimizer, has no deep copy, or
                contains a function that can change an object of the training.
        """
        kind = type(self._optimizer).__name__
        if reached := self._find_reached(value):
            raise CannotCopyError(
                f"{kind}.{name} leads to {reached}: expected only settings, because a copy must "
                "never move the weights of the training; use a factory, which makes the optimizer"
            )
        if shared := find_shared(value, known=self._optimizer):
            raise CannotCopyError(
                f"{kind}.{name} leads to {shared}: expected functions that keep nothing, because a "
                "copy must never change what the training uses; keep the object in an attribute of "
                f"{kind}, of which each copy has its own, or use a factory"
            )
        if isinstance(value, Tensor):
            return copy_value(value)
        try:
            return copy.deepcopy(value, {id(self._optimizer): self._twin})
        except Exception as error:
            raise CannotCopyError(
                f"{kind}.{name} cannot be copied ({type(error).__name__}: {error}): expected what "
                "copy.deepcopy accepts; use a factory, which makes the optimizer"
            ) from error

    def copy_hyperparameters(self, index: int) -> dict[str, Any]:
        """Return copies of the hyperparameters of a group, without its parameters and their names.

        Args:
            index: The index of the group.

        Returns:
            The values by key.

        Raises:
            CannotCopyError: A value leads to a parameter, or has no deep copy.
        """
        return {
            key: self.copy(value, f"param_groups[{index}][{key!r}]")
            for key, value in self._optimizer.param_groups[index].items()
            if key not in NO_HYPERPARAMETERS
        }

    def _find_reached(self, value: Any) -> str:
        """Return words for a parameter or optimizer that a value refers to; empty if there is none.

        The optimizer itself is allowed, since a deep copy replaces it by the new one. That is not
        so behind functions and weak references, which a deep copy shares.
        """
        todo, seen = [(value, False)], set[tuple[int, bool]]()
        while todo:
            each, is_shared = todo.pop()
            if (id(each), is_shared) in seen or isinstance(each, LEAVES):
                continue
            seen.add((id(each), is_shared))
            if id(each) in self._parameters or isinstance(each, nn.Parameter):
                return "a parameter"
            if each is self._optimizer and not is_shared:
                continue
            if isinstance(each, Optimizer):
                return f"the optimizer {type(each).__name__}"
            is_shared |= isinstance(each, (types.FunctionType, weakref.ref))
            todo += [(inner, is_shared) for inner in _list_references(each)]
        return ""


def _list_references(value: Any) -> Iterator[Any]:
    """Yield the objects that an object refers to.

    The globals of a function and the graph of a tensor are left out.
    """
    if isinstance(value, types.FunctionType):
        yield from (value.__closure__, value.__defaults__, value.__kwdefaults__, value.__dict__)
    elif isinstance(value, weakref.ref):
        yield value()
    elif isinstance(value, Tensor):  # its graph and gradient are not copied
        yield getattr(value, "__dict__", None)
    else:
        yield from gc.get_referents(value)


def _is_remade(optimizer: Optimizer, name: str) -> bool:
    """Return True for an attribute of the instance that is not copied.

    A method in the instance, such as the `step` that learning rate schedulers put there, hides the
    method of the class and would step the original.
    """
    is_method = callable(getattr(type(optimizer), name, None))
    return is_method or name in {"param_groups", "state", *_HOOKS, *_SET_FOR_ONE_STEP}


def use_fused(optimizer: Optimizer) -> None:
    """Make an optimizer step with the fused implementation of its class, in all groups.

    Raises:
        CannotCopyError: The class has no fused implementation.
    """
    for group in optimizer.param_groups:
        if "fused" not in group and "fused" not in optimizer.defaults:
            raise CannotCopyError(
                f"fused=True: expected an optimizer with a fused implementation, and "
                f"{type(optimizer).__name__} has no argument `fused`; leave out this recipe"
            )
        group.update(fused=True, foreach=False)
