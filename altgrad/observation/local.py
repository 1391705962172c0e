"""What of a tensor lies in this process: all of it, or the shard of a DTensor."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor, told without an import of torch.distributed."""
    return hasattr(tensor, "to_local") and hasattr(tensor, "placements")


def local_of(tensor: Any) -> Tensor:
    """The part that lies here, in the memory of the tensor; call it without gradient recording."""
    if not is_sharded(tensor):
        return tensor  # type: ignore[no-any-return]
    local: Any = tensor.to_local()
    return local.wait() if hasattr(local, "wait") else local  # type: ignore[no-any-return]


def local_gradient_of(name: str, parameter: Any, gradient: Any) -> Tensor:
    """The part of a gradient that belongs to the part of its parameter that lies here.

    Raises:
        ValueError: It is placed otherwise than the parameter, so that no part of it does: sums of
            it over processes are still to be made, inside of the optimizer.
    """
    if is_sharded(parameter) and getattr(gradient, "placements", None) != parameter.placements:
        raise ValueError(
            f"the gradient of {name} is placed as {getattr(gradient, 'placements', None)} and the "
            f"parameter as {parameter.placements}: what the step applies is made inside of the "
            "optimizer and cannot be seen. Redistribute such gradients to their parameters' "
            f"placements before the step, or leave them out: SamplingRule({name!r}, enabled=False)"
        )
    return local_of(gradient)
