"""What of a tensor lies in this process: all of it, or the shard of a DTensor.

fully_shard (FSDP2) has two sets of parameters: the shards that are stepped, and the whole ones of a
forward.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn


def is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor, told without an import of torch.distributed."""
    return hasattr(tensor, "to_local") and hasattr(tensor, "placements")


def local_of(tensor: Any) -> Tensor:
    """The part that lies here, in the memory of the tensor; call it without gradient recording."""
    if not is_sharded(tensor):
        return tensor  # type: ignore[no-any-return]
    local: Any = tensor.to_local()
    return local.wait() if hasattr(local, "wait") else local  # type: ignore[no-any-return]


def local_gradient_of(parameter: Any, gradient: Any) -> Tensor:
    """The part of a gradient that belongs to what lies here; of a whole one it is cut out.

    Of one that `is_unreduced` no part does.
    """
    if is_sharded(parameter) and gradient.placements != parameter.placements:
        gradient = gradient.redistribute(placements=parameter.placements)
    return local_of(gradient)


def is_unreduced(parameter: Any) -> bool:
    """Whether it has a gradient that is neither whole nor placed as itself, so that no part of it
    belongs to what lies here: sums over processes are still to be made in the optimizer.
    """
    gradient = parameter.grad
    if gradient is None or not is_sharded(parameter):
        return False
    if not is_sharded(gradient) or gradient.device_mesh != parameter.device_mesh:
        return True
    pairs = zip(gradient.placements, parameter.placements, strict=True)
    return any(own != other and not own.is_replicate() for own, other in pairs)


def unreduced_message(name: str, parameter: Any) -> str:
    """What there is to say of such a gradient."""
    return (
        f"the gradient of {name} is placed as {getattr(parameter.grad, 'placements', None)} and "
        f"the parameter as {parameter.placements}: what the step applies is made inside of the "
        "optimizer and cannot be seen. Redistribute such gradients to their parameters' "
        "placements before the step"
    )


def fully_sharded(module: nn.Module) -> list[Any]:
    """The modules in it to which fully_shard was applied, told without importing it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", ())
    return [each for each in module.modules() if isinstance(each, kind)]


def register_shards(module: nn.Module) -> None:
    """Have it name the parameters that its optimizer steps.

    After a forward without a backward, as in an evaluation, fully_shard leaves the outermost module
    with whole parameters in their places, which no optimizer knows and the next step frees. This
    frees them now; the next forward gathers them again.
    """
    for each in fully_sharded(module):
        each.reshard()


def is_sharded_module(module: nn.Module) -> bool:
    """Whether a module has DTensors for parameters, or will have for its next step.

    Those of FSDP2 are none between an evaluation and the next step.
    """
    return bool(fully_sharded(module)) or any(map(is_sharded, module.parameters()))
