"""Find the local shard of a tensor: a plain tensor itself, or the part of a DTensor on this rank.

All that the room knows of DTensor and of fully_shard (FSDP2) is in this file. It never imports
torch.distributed, so that a run on one device does not load that package.

A module under fully_shard has two sets of parameters. The optimizer steps DTensors, which hold the
shards. A forward pass puts whole parameters in their place, which are freed afterwards.

`readable` comes next. `parameter_names` calls `register_shards` before it reads names.

References:
    https://docs.pytorch.org/docs/stable/distributed.tensor.html
    https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)
"""The usual types of tensors that are no DTensors: comparing types is faster than `is_sharded`."""


def is_sharded(tensor: object) -> bool:
    """Return True for a DTensor, which is known by its attributes: no import is needed."""
    return hasattr(tensor, "to_local") and hasattr(tensor, "placements")


def to_local_tensor(tensor: Any) -> Tensor:
    """Return the local shard of a tensor, which shares memory with it.

    Call this function under `torch.no_grad`: autograd records `DTensor.to_local` otherwise.

    Args:
        tensor: A plain tensor or a DTensor.

    Returns:
        The local shard of a DTensor, with its dtype. A plain tensor is returned as it is.
    """
    if not is_sharded(tensor):
        return tensor  # type: ignore[no-any-return]
    local: Any = tensor.to_local()
    # to_local may return an AsyncCollectiveTensor, whose data arrive with wait():
    # https://docs.pytorch.org/docs/stable/distributed.tensor.html (DTensor.to_local)
    return local.wait() if hasattr(local, "wait") else local  # type: ignore[no-any-return]


def to_local_tensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the local shards of many tensors, in their order."""
    return [each if type(each) in _PLAIN else to_local_tensor(each) for each in tensors]


def get_local_gradients(parameters: Iterable[Any]) -> list[Tensor]:
    """Return the gradient of each parameter's local shard, as a dense tensor.

    If every rank holds the whole gradient, it is cut to the local shard.

    Args:
        parameters: Parameters that have a gradient, none of which `find_unreduced` returns.

    Returns:
        One tensor for each parameter, with the dtype of the gradient and the shape of the shard.
    """
    return [
        each.grad
        if type(each.grad) in _PLAIN and each.grad.layout == torch.strided
        else _get_local_gradient(each, each.grad)
        for each in parameters
    ]


def _get_local_gradient(parameter: Any, gradient: Any) -> Tensor:
    if is_sharded(parameter) and gradient.placements != parameter.placements:
        # The change is from Replicate to Shard, which cuts a tensor and needs no communication.
        gradient = gradient.redistribute(placements=parameter.placements)
    local = to_local_tensor(gradient)
    return local if local.layout == torch.strided else local.to_dense()


def find_unreduced(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters whose gradient does not yet match their local shard.

    Such a gradient is neither whole on every rank nor placed like its parameter. The optimizer
    reduces or redistributes it inside its step, where it cannot be observed.

    Args:
        parameters: Parameters by name, with or without a gradient.

    Returns:
        The parameters with such a gradient, by name.
    """
    return {
        name: each
        for name, each in parameters.items()
        if type(each) not in _PLAIN and _is_unreduced(each)
    }


def _is_unreduced(parameter: Any) -> bool:
    gradient = parameter.grad
    if gradient is None or not is_sharded(parameter):
        return False
    if not is_sharded(gradient) or gradient.device_mesh != parameter.device_mesh:
        return True
    # Each dimension of the device mesh has a placement. A whole gradient (Replicate) can be cut,
    # and an equal placement needs no change.
    pairs = zip(gradient.placements, parameter.placements, strict=True)
    return any(one != other and not one.is_replicate() for one, other in pairs)


def describe_unreduced(name: str, parameter: Any) -> str:
    """Return why a gradient that does not match its local shard cannot be observed, and the remedy.

    Args:
        name: The name of the parameter.
        parameter: The parameter, a DTensor that `find_unreduced` has returned.
    """
    return (
        f"the gradient of {name} is placed as {getattr(parameter.grad, 'placements', None)} and "
        f"the parameter as {parameter.placements}: the gradient that the step applies is computed "
        "inside the optimizer, where it cannot be observed. Redistribute such gradients to their "
        "parameters' placements before the step"
    )


def find_fully_sharded(module: nn.Module) -> list[Any]:
    """Return the modules inside a module to which fully_shard was applied."""
    # fully_shard makes each module an FSDPModule. If the program has not imported
    # torch.distributed.fsdp, there is none.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", ())
    return [each for each in module.modules() if isinstance(each, kind)]


def register_shards(module: nn.Module) -> None:
    """Make `module.named_parameters()` return the shards, which are what the optimizer steps.

    After a forward pass without a backward pass, as in an evaluation, the outermost module under
    fully_shard still has whole parameters, which no optimizer has. The method `reshard` of
    FSDPModule puts the shards back; the next forward pass gathers whole parameters again.
    """
    for each in find_fully_sharded(module):
        each.reshard()


def is_sharded_module(module: nn.Module) -> bool:
    """Return True if the optimizer of a module steps DTensors.

    After an evaluation, the parameters of a module under fully_shard may be whole tensors; the
    result is True then, too.
    """
    return bool(find_fully_sharded(module)) or any(map(is_sharded, module.parameters()))
