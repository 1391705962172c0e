"""Find the real optimizer under the wrapper of a trainer, and refuse what cannot be observed.

`unwrap` finds the optimizer. Each ``check_…`` raises an error for one kind of step that would be
observed wrongly or not at all, and says what to do instead. `StepObserver.attach` calls the checks.

This is the first file to read; `step_hooks` comes next.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from altgrad._messages import few
from altgrad.observation.step_hooks import count_step_calls

USE_FSDP2 = (
    "use FSDP2: torch.distributed.fsdp.fully_shard(module), before the optimizer is made; in "
    "Lightning strategy=ModelParallelStrategy(), with fully_shard in configure_model(); in "
    "accelerate FullyShardedDataParallelPlugin(fsdp_version=2)"
)
"""What to do in place of FSDP1, as a part of an error."""
_MAX_WRAPPERS = 8  # against endless loops: some objects are their own `.optimizer`


def unwrap(optimizer: Any) -> Optimizer:
    """Return the torch optimizer whose `step` calls hooks, under the wrappers of a trainer.

    `isinstance` cannot tell a wrapper from an optimizer. The wrappers of Lightning and Fabric have
    the class of the real optimizer; the wrapper of accelerate inherits from Optimizer without
    calling its constructor. All of them keep the real optimizer in the attribute ``optimizer``.

    Args:
        optimizer: A torch optimizer, or a wrapper of one.

    Returns:
        The torch optimizer.

    Raises:
        TypeError: The argument contains no torch optimizer, or one whose `step` calls no hooks.

    References:
        ``lightning/pytorch/core/optimizer.py`` (LightningOptimizer)
        ``lightning/fabric/wrappers.py`` (_FabricOptimizer)
        ``accelerate/optimizer.py`` (AcceleratedOptimizer)
    """
    for inner in find_wrapped(optimizer):
        if calls_hooks(inner):
            return inner  # type: ignore[no-any-return]
        is_whole = _is_trainer_wrapper(inner) or _passes_step_on(inner)
        if isinstance(inner, Optimizer) and not is_whole:
            kind = type(inner).__name__
            raise TypeError(
                f"optimizer={kind}: expected an optimizer whose step() calls hooks; the step() of "
                f"{kind} calls no hooks, so that it cannot be observed. Call Optimizer.__init__ in "
                "its class; if it wraps an optimizer whose steps you want to observe, attach that"
            )
    raise TypeError(
        f"optimizer={type(optimizer).__name__}: expected a torch.optim.Optimizer, or a wrapper "
        "that has one as `.optimizer`; attach the optimizer whose step() changes the parameters"
    )


def find_wrapped(optimizer: Any) -> Iterator[Any]:
    """Yield an optimizer, then what it wraps in its attribute ``optimizer``, and so on inwards.

    Args:
        optimizer: A torch optimizer, or a wrapper of one.

    Returns:
        An iterator over up to eight objects.
    """
    inner = optimizer
    for _ in range(_MAX_WRAPPERS):
        if inner is None:
            return
        yield inner
        inner = getattr(inner, "optimizer", None)


def calls_hooks(optimizer: object) -> bool:
    """Return True if the constructor of Optimizer has run, so that `step` calls hooks."""
    # Private names of torch/optim/optimizer.py, since no public function tells either:
    # - _patch_step_function wraps `step` of the class, and marks the result with `hooked`.
    # - The constructor makes the dictionary of the object's hooks.
    step = getattr(type(optimizer), "step", None)
    has_hooks = "_optimizer_step_pre_hooks" in getattr(optimizer, "__dict__", ())
    return has_hooks and getattr(step, "hooked", False)


def _passes_step_on(optimizer: object) -> bool:
    """Return True for a wrapper whose attribute `step` is the method of the optimizer inside."""
    step = getattr(optimizer, "step", None)
    return step is not None and step == getattr(getattr(optimizer, "optimizer", None), "step", None)


def _is_trainer_wrapper(optimizer: object) -> bool:
    """Return True for a trainer's wrapper, whose `step` only calls that of the real optimizer.

    Other wrappers, such as Lookahead, move weights themselves, too: to observe the optimizer inside
    would show only a part of their steps.
    """
    packages = {base.__module__.split(".")[0] for base in type(optimizer).__mro__}
    return bool(packages & {"accelerate", "lightning", "lightning_fabric", "pytorch_lightning"})


def check_observable(
    optimizer: Optimizer, stepped: Mapping[str, Tensor], *, scaled: bool = False
) -> None:
    """Raise an error for an optimizer whose steps would be observed wrongly or not at all.

    Args:
        optimizer: A torch optimizer.
        stepped: The observed parameters that the optimizer steps, by name.
        scaled: True if a GradScaler calls the optimizer's `step`.

    Raises:
        ValueError: The optimizer steps none of the observed parameters, or divides gradients by the
            loss scale inside its `step`.
        RuntimeError: A step of the optimizer is running.
    """
    kind = type(optimizer).__name__
    if count_step_calls(optimizer):
        raise RuntimeError(f"a step of {kind} is under way: attach before or after it")
    if hasattr(optimizer, "fused_backward"):
        raise ValueError(
            f"{kind} steps by fused_backward(), inside the backward pass and without hooks, which "
            "cannot be observed; observe a run with the optimizer whose memory it saves: SGD in "
            "place of LOMO, Adafactor in place of AdaLOMO"
        )
    if not stepped:
        raise ValueError(
            f"{kind} steps none of the observed parameters: expected an optimizer of the observed "
            "module. Optimizers that step copies of the parameters cannot be observed, as those of "
            "DeepSpeed ZeRO, FSDP1 with flat parameters and apex: train with fully_shard or DDP. "
            "With fully_shard, pass the module and not its named_parameters(), which change after "
            "an evaluation"
        )
    # A GradScaler passes itself to a `step` with this argument. torch has deprecated that, and sets
    # the attribute `grad_scale` instead: torch/amp/grad_scaler.py, `has_grad_scaler_kwarg`.
    if scaled and "grad_scaler" in inspect.signature(type(optimizer).step).parameters:
        raise ValueError(
            f"{kind}.step unscales its gradients with the GradScaler that is passed to it, so that "
            "the gradients it applies cannot be observed; read the attribute `grad_scale` in its "
            "step() instead, for which torch has deprecated the argument `grad_scaler`"
        )


def check_unsharded(module: nn.Module | None, parameters: Iterable[Tensor]) -> None:
    """Raise an error for a module in FullyShardedDataParallel (FSDP1), or inside of one.

    The parameters of FSDP1 are flat shards, each of several layers, or views of these.

    Args:
        module: The module that is to be observed; None if only its parameters are known.
        parameters: The parameters that are to be observed.

    Raises:
        ValueError: The module contains a FullyShardedDataParallel, or parameters belong to one.
    """
    # torch.distributed.fsdp is not imported here: without it, there is no such module.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    wrapper = getattr(fsdp, "FullyShardedDataParallel", ())
    modules = () if module is None else module.modules()
    if any(isinstance(each, wrapper) for each in modules) or any(map(is_flattened, parameters)):
        raise ValueError(
            "the module is wrapped in FullyShardedDataParallel (FSDP1), whose parameters are flat "
            f"shards without layers, which cannot be observed; {USE_FSDP2}"
        )


def is_flattened(parameter: Tensor) -> bool:
    """Return True for a flat parameter of FSDP1, and for a view of one.

    A module inside of the wrapper has such views under the names of its layers.
    """
    # There is no public name: torch/distributed/fsdp/_flat_param.py, `_set_fsdp_flattened`.
    return bool(getattr(parameter, "_fsdp_flattened", False))


def check_not_in_backward(
    names: Mapping[Tensor, str], observed: Collection[Optimizer | None]
) -> None:
    """Raise an error if optimizers that are not observed step parameters in the backward pass.

    Args:
        names: The name of each observed parameter.
        observed: The optimizers that are observed.

    Raises:
        ValueError: Some of the parameters have such an optimizer.

    References:
        ``torch/distributed/optim/apply_optimizer_in_backward.py``
    """
    # `_apply_optimizer_in_backward` of torch keeps the optimizers of a parameter in this attribute
    # of the parameter; there is no public way to them.
    unobserved = [
        name
        for parameter, name in names.items()
        if not set(getattr(parameter, "_in_backward_optimizers", ())) <= set(observed)
    ]
    if unobserved:
        raise ValueError(
            f"optimizer in backward: {few(unobserved)} are stepped inside the backward pass by "
            "optimizers that are not attached; attach these too, they are in each parameter's "
            "_in_backward_optimizers"
        )


def check_scaler(scaler: object) -> None:
    """Raise an error unless the argument is a GradScaler or None.

    Args:
        scaler: The `scaler` argument of `StepObserver.attach`.

    Raises:
        TypeError: The argument has another type.
    """
    if not (scaler is None or isinstance(scaler, GradScaler)):
        raise TypeError(f"scaler={scaler!r}: expected a torch.amp.GradScaler or None")


def check_not_captured() -> None:
    """Raise an error if the current step is being captured in a CUDA graph.

    Copies of weights would become part of the graph, and a replay of the graph calls no hook.

    Raises:
        RuntimeError: The current CUDA stream is being captured.

    References:
        https://docs.pytorch.org/docs/stable/generated/torch.cuda.is_current_stream_capturing.html
    """
    # is_current_stream_capturing would initialise CUDA, which takes memory on the device.
    started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if started and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "this optimizer step is being captured in a CUDA graph, whose replays call no hook "
            "and cannot be observed; observe a run that does not capture its optimizer"
        )
