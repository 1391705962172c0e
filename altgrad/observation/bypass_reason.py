"""Find the likely reason why weights moved although no hook of an attached optimizer was called.

Weights may be stepped by another optimizer, by code that replaces an optimizer's `step`, or by a
method with another name. `find_bypass_reason` looks for signs of each.

Read `optimizers` and `step_hooks` first. `altgrad.monitor.bypass` finds weights that moved.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import Tensor
from torch.optim import Optimizer

from altgrad.observation.optimizers import USE_FSDP2, calls_hooks, find_wrapped, is_flattened
from altgrad.observation.step_hooks import was_hooked


def find_bypass_reason(
    kind: str,
    optimizer: Optimizer | None,
    moved: Sequence[Tensor],
    attached: Collection[Optimizer],
    *,
    has_backward: bool = True,
) -> str | None:
    """Return the likely reason why no step of an optimizer was seen, with the remedy.

    All objects of the process are searched for other optimizers. That takes up to a second.

    Args:
        kind: Name of the class of an optimizer whose steps are to be observed.
        optimizer: This optimizer; None once it has been garbage-collected.
        moved: The parameters whose weights changed.
        attached: All optimizers whose steps are observed.
        has_backward: True if a backward pass may have run before the weights changed.

    Returns:
        The reason and the remedy, for a warning. None if nothing points to a reason, as after code
        that swaps or edits weights itself.
    """
    if optimizer is not None and hasattr(optimizer, "first_step"):
        return _explain_two_steps(kind)
    if has_backward and any(map(is_stepped_in_backward, moved)):
        return explain_steps_in_backward()
    if found := find_other_optimizers(moved, attached):
        others = ", ".join(sorted({*found.values()}))
        if optimizer is None:
            return (
                f"the {kind} that was attached no longer exists, and {others} has these layers; "
                "attach each optimizer that is made anew"
            )
        return f"{others} has these layers, too, and is not attached; attach it"
    if optimizer is not None and _is_step_replaced(optimizer):
        return (
            f"the step() of this {kind} object was replaced by a function that calls no hooks; "
            "override step() in a class instead"
        )
    return None


def explain_other_steps(
    kind: str, attached: Sequence[tuple[str, Optimizer | None]], *, in_backward: bool
) -> str:
    """Return why the steps of an optimizer that is not attached were not observed, and the remedy.

    Args:
        kind: Name of the class of this optimizer.
        attached: The attached optimizers that have some of the parameters, each with the name of
            its class; None in place of one that was garbage-collected.
        in_backward: True if it has stepped inside a backward pass.

    Returns:
        The reason and the remedy, for a warning.
    """
    if in_backward:
        return explain_steps_in_backward(kind)
    if not attached:
        return f"{kind} has these layers and is not attached; attach it"
    if two_steps := [each for each, one in attached if hasattr(one, "first_step")]:
        return _explain_two_steps(two_steps[0])
    if gone := [each for each, one in attached if one is None]:
        return (
            f"the {gone[0]} that was attached no longer exists, and {kind} has these layers; "
            "attach each optimizer that is made anew"
        )
    return f"{kind} has these layers, too, and is not attached; attach it"


def explain_lost_layers(
    kind: str, parameters: Iterable[Tensor], are_sharded: bool, are_moved: bool
) -> str | None:
    """Return why an attached optimizer no longer has the layers that it had, with the remedy.

    Args:
        kind: Name of the optimizer's class.
        parameters: All parameters of the module, as it has them now.
        are_sharded: True if the layers have become DTensors since.
        are_moved: True if the weights of the layers have changed since.

    Returns:
        The reason and the remedy, for a warning. None if nothing points to a reason, as after code
        that takes a layer out of the training.
    """
    if are_sharded:
        return "they were sharded after attach(); shard the module first, then call attach()"
    if any(map(is_flattened, parameters)):
        return f"they were wrapped in FSDP1 after attach(); {USE_FSDP2}, then call attach()"
    if are_moved:
        return (
            f"{kind} no longer has them in its param_groups, and steps copies of them, as in "
            "DeepSpeed ZeRO and apex; such steps cannot be observed: train with fully_shard or DDP"
        )
    return None


def explain_steps_in_backward(kind: str = "an optimizer") -> str:
    """Return the reason and the remedy for layers that are stepped inside the backward pass."""
    return (
        f"their gradients have hooks inside the backward pass, where {kind} steps that is not "
        "attached; attach each optimizer that these hooks step"
    )


def explain_idle_steps(kind: str) -> str:
    """Return the reason and the remedy for layers that move between steps which move nothing.

    Args:
        kind: Name of the class of the attached optimizer, whose observed steps moved nothing.
    """
    return (
        f"step() of {kind} moved nothing in any observed step, and other code moves these weights "
        "between the steps, such as hooks that step inside the backward pass; attach each optimizer"
        " that steps there; if there is none, such steps cannot be observed"
    )


def _explain_two_steps(kind: str) -> str:
    return (
        f"{kind} steps by first_step() and second_step(), which call no hooks; attach the "
        "optimizer that it wraps"
    )


def find_other_optimizers(
    parameters: Sequence[Tensor], attached: Collection[Optimizer]
) -> dict[int, str]:
    """Find optimizers in this process that call no hooks, and may have stepped some parameters.

    Their class skips the constructor of `Optimizer`. If such an optimizer has states, it has
    stepped the parameters with a state; otherwise it may have stepped all of its parameters.
    Optimizers that do call hooks are left out, because `OtherSteps` sees their steps. So are those
    that another monitor observes, or that were observed earlier: the user knows of them.

    Args:
        parameters: The parameters.
        attached: All optimizers whose steps are observed.

    Returns:
        For each parameter with such an optimizer: its position in `parameters`, and the name of the
        optimizer's class.
    """
    positions = {id(each): position for position, each in enumerate(parameters)}
    seen = {id(each) for each in attached}
    # `type` and not `isinstance`, which reads `__class__` and so runs code of proxy objects.
    optimizers = [each for each in gc.get_objects() if issubclass(type(each), Optimizer)]
    return {
        positions[identity]: type(each).__name__
        for each in optimizers
        if not any(id(one) in seen or was_hooked(one) for one in find_wrapped(each))
        for identity in positions.keys() & _read_stepped(each)
    }


def is_stepped_in_backward(parameter: Tensor) -> bool:
    """Return True if a parameter has hooks that may step it inside the backward pass."""
    # torch has no public name for the hooks of Tensor.register_post_accumulate_grad_hook, nor for
    # the optimizers of torch/distributed/optim/apply_optimizer_in_backward.py.
    names = ("_post_accumulate_grad_hooks", "_in_backward_optimizers")
    return any(getattr(parameter, name, None) for name in names)


def has_gradient_hooks(parameter: Tensor) -> bool:
    """Return True if a parameter has hooks of any kind on its gradient, which may also step it."""
    # Hooks of Tensor.register_hook are under this private name.
    hooks = parameter._backward_hooks  # noqa: SLF001
    return bool(hooks) or is_stepped_in_backward(parameter)


def _is_step_replaced(optimizer: Optimizer) -> bool:
    """Return True if code has replaced `step` on this object, other than a torch scheduler."""
    step = vars(optimizer).get("step")
    # A scheduler's wrapper calls the class's `step`: torch/optim/lr_scheduler.py,
    # patch_track_step_called.
    return step is not None and not hasattr(step, "_wrapped_by_lr_sched")


def _read_stepped(optimizer: Optimizer) -> set[int]:
    """Return the `id` of each parameter that an optimizer may have stepped without a hook."""
    try:
        # The step of a wrapper is that of the optimizer inside, and has its hooks.
        if any(map(calls_hooks, find_wrapped(optimizer))):
            return set()
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        state = getattr(optimizer, "state", None)
        if isinstance(state, Mapping):
            parameters = [each for each in parameters if each in state]
        return {id(each) for each in parameters}
    except Exception:  # noqa: BLE001 - an object whose constructor has not run may lack anything
        return set()
