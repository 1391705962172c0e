"""Which optimizers can be observed: the real one under a wrapper, and what must be refused."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from altgrad._messages import few
from altgrad.observation.step_hooks import step_depth

_DEPTH = 8  # wrappers around wrappers; some objects have an `.optimizer` without end


def unwrap(optimizer: Any) -> Optimizer:
    """The optimizer whose `step` calls its hooks, under the wrappers of a trainer.

    Lightning and Fabric hand out wrappers that are no optimizers, accelerate one that is an
    Optimizer by type alone; all keep the real one as ``optimizer``.

    Raises:
        TypeError: There is no torch optimizer inside, or one whose `step` calls no hooks.
    """
    inner = optimizer
    for _ in range(_DEPTH):
        if _calls_hooks(inner):
            return inner  # type: ignore[no-any-return]
        if isinstance(inner, Optimizer) and not _is_trainers(inner):
            raise TypeError(
                f"the step() of {type(inner).__name__} calls no hooks (does its class call "
                "Optimizer.__init__?) and cannot be observed; if it wraps an optimizer whose steps "
                "you want to see, attach that"
            )
        inner = getattr(inner, "optimizer", None)
    raise TypeError(
        f"{type(optimizer).__name__} is no torch.optim.Optimizer and has none as `.optimizer`: "
        "attach the optimizer whose step() changes the parameters"
    )


def _calls_hooks(optimizer: object) -> bool:
    """Whether Optimizer.__init__ made its `step` call hooks, and the dictionary of them."""
    step = getattr(type(optimizer), "step", None)
    has_hooks = "_optimizer_step_pre_hooks" in getattr(optimizer, "__dict__", ())
    return has_hooks and getattr(step, "hooked", False)


def _is_trainers(optimizer: Optimizer) -> bool:
    """Whether it is the wrapper of a trainer, whose `step` does nothing but that of the real one.

    Others, such as Lookahead, add something of their own: the inner steps are not the whole.
    """
    packages = {base.__module__.split(".")[0] for base in type(optimizer).__mro__}
    return bool(packages & {"accelerate", "lightning", "lightning_fabric", "pytorch_lightning"})


def check_observable(
    optimizer: Optimizer, own: Mapping[str, Tensor], *, scaled: bool = False
) -> None:
    """Refuse an optimizer whose steps would be shown wrongly or not at all.

    Args:
        optimizer: The optimizer.
        own: Those of the observed parameters that it steps, by name.
        scaled: Whether a GradScaler calls its `step`.

    Raises:
        ValueError: It steps none of them, or unscales gradients by itself.
        RuntimeError: A step of it is under way.
    """
    kind = type(optimizer).__name__
    if step_depth(optimizer):
        raise RuntimeError(f"a step of {kind} is under way: attach before or after it")
    if not own:
        raise ValueError(
            f"{kind} steps none of the observed parameters: it was made for others, or it keeps "
            "copies of its own, as those of DeepSpeed ZeRO, FSDP1 with flat parameters and apex "
            "do, which cannot be observed; of fully_shard give the module, not its "
            "named_parameters(), which are others after an evaluation"
        )
    if scaled and "grad_scaler" in inspect.signature(type(optimizer).step).parameters:
        raise ValueError(
            f"{kind}.step unscales its gradients with the GradScaler that it is handed, so that "
            "what it applies cannot be seen; torch has deprecated that for `grad_scale`"
        )


def check_unsharded(module: nn.Module) -> None:
    """Refuse a module in FSDP1, whose parameters are, or are views of, shards.

    Raises:
        ValueError: It contains FullyShardedDataParallel.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported, not used
    wrapper = getattr(fsdp, "FullyShardedDataParallel", ())
    if any(isinstance(each, wrapper) for each in module.modules()):
        raise ValueError(
            "the module is wrapped in FullyShardedDataParallel (FSDP1), whose parameters are flat "
            "shards without layers, which cannot be observed; use fully_shard (FSDP2)"
        )


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
            f"optimizer in backward: {few(unseen)} are stepped inside of the backward pass by "
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
