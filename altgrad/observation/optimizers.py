"""Which optimizers can be observed: the real one under a wrapper, and what must be refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from altgrad.observation.step_hooks import step_depth


def unwrap(optimizer: Any) -> Optimizer:
    """The optimizer whose `step` calls its hooks, under the wrappers of a trainer.

    Lightning and Fabric hand out wrappers that are no optimizers, accelerate one that is an
    Optimizer by type alone; all keep the real one as ``optimizer``.

    Raises:
        TypeError: There is no torch optimizer inside.
    """
    inner = optimizer
    while inner is not None:
        # Optimizer.__init__ makes this dict, and the hooks are kept in it.
        if isinstance(inner, Optimizer) and "_optimizer_step_pre_hooks" in vars(inner):
            return inner
        inner = getattr(inner, "optimizer", None)
    raise TypeError(
        f"{type(optimizer).__name__} is no torch.optim.Optimizer and has none as `.optimizer`: "
        "attach the optimizer whose step() changes the parameters"
    )


def check_observable(optimizer: Optimizer, own: Mapping[str, Tensor]) -> None:
    """Refuse an optimizer whose steps would be shown wrongly or not at all.

    Args:
        optimizer: The optimizer.
        own: Those of the observed parameters that it steps, by name.

    Raises:
        ValueError: It steps none of them, or sharded ones.
        RuntimeError: A step of it is under way.
    """
    kind = type(optimizer).__name__
    if step_depth(optimizer):
        raise RuntimeError(f"a step of {kind} is under way: attach before or after it")
    if not own:
        raise ValueError(
            f"{kind} steps none of the observed parameters: it was made for others, or it keeps "
            "copies of its own, as those of DeepSpeed ZeRO, FSDP1 with flat parameters and apex "
            "do, which cannot be observed"
        )
    # DTensors, without importing what would import torch.distributed.
    sharded = [
        name for name, p in own.items() if hasattr(p, "to_local") and hasattr(p, "placements")
    ]
    if sharded:
        raise ValueError(f"sharded parameters cannot be observed yet: {_few(sharded)}")


def check_none_in_backward(
    names: Mapping[Tensor, str], observed: Collection[Optimizer | None]
) -> None:
    """Refuse parameters that optimizers of their own step inside of the backward pass, unseen.

    Raises:
        ValueError: There are some, put there by ``_apply_optimizer_in_backward`` of torch.
    """
    unseen = [
        name
        for parameter, name in names.items()
        if not set(getattr(parameter, "_in_backward_optimizers", ())) <= set(observed)
    ]
    if unseen:
        raise ValueError(
            f"optimizer in backward: {_few(unseen)} are stepped inside of the backward pass by "
            "optimizers of their own; attach these too, they are in each parameter's "
            "_in_backward_optimizers"
        )


def check_scaler(scaler: object) -> None:
    """Refuse what is given as the GradScaler and is none.

    Raises:
        TypeError: It is neither a GradScaler nor None.
    """
    if not (scaler is None or isinstance(scaler, GradScaler)):
        raise TypeError(f"scaler={scaler!r}: expected a torch.amp.GradScaler or None")


def check_not_captured() -> None:
    """Refuse a step that is being captured in a CUDA graph.

    Copies would become a part of the graph, and its replays call no hook.

    Raises:
        RuntimeError: It is.
    """
    started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if started and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "this optimizer step is being captured in a CUDA graph, whose replays call no hook "
            "and cannot be observed: observe a run that does not capture its optimizer"
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
