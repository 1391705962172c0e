"""`watch`: watch a loop with Lightning Fabric.

Read `run_watch` first. This is the last file of this room. It imports no Lightning: the packages
`lightning` and `lightning_fabric` each define the same classes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from altgrad.integrations.run_watch import RunWatch, list_optimizers
from altgrad.monitor.schedule import StepSchedule

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def watch(
    fabric: Fabric,
    model: nn.Module,
    optimizer: Any,
    folder: str | os.PathLike[str],
    *,
    every_n_steps: int | StepSchedule | Callable[[int], bool] = 10,
    **arguments: Any,
) -> RunWatch:
    """Observe a training with Lightning Fabric, and write a run file for ``altgrad report``.

    Call this function before or after ``fabric.setup``, on every process. With a strategy that
    replaces the parameters, such as ModelParallelStrategy, call it after. With the precision
    ``"bf16-true"``, only a call after it warns of formats that are no coarser than the weights.
    The first process writes. Figures also go to Fabric's loggers.

    Put the result into the dict that ``fabric.save`` saves and ``fabric.load`` fills, such as
    ``{"model": model, "altgrad": run}``, to go on with the run after a checkpoint, or to go back to
    one in mid-run.

    Args:
        fabric: The Fabric.
        model: The module that is trained, set up or not.
        optimizer: The optimizer, set up or not, or a list of all optimizers.
        folder: The folder of the run file.
        every_n_steps: Interval between observed steps, in steps, or a `StepSchedule`, or a function
            of a step's number.
        **arguments: Further arguments of `altgrad.UpdateMonitor`, such as `formats` and `recipes`.

    Returns:
        The `RunWatch`. In a ``with`` statement it prints a summary at the end.

    Raises:
        TypeError: An argument has the wrong type, or the optimizer is unknown.
        ValueError: An argument is out of range, or the optimizer's steps cannot be observed.
    """
    run = RunWatch(
        _unwrap(model),
        folder,
        every_n_steps=every_n_steps,
        find_loggers=lambda: fabric.loggers,
        **arguments,
    )
    # The precision fp16-mixed has a GradScaler: lightning/fabric/plugins/precision/amp.py.
    scaler = getattr(fabric.strategy.precision, "scaler", None)
    return run.attach(*list_optimizers(optimizer), scaler=scaler)


def _unwrap(model: nn.Module) -> nn.Module:
    """Return the module that ``fabric.setup`` has wrapped; another module as it is."""
    # `_FabricModule` of lightning/fabric/wrappers.py has no public name.
    kinds = [kind.__name__ for kind in type(model).__mro__]
    inner = model.module if "_FabricModule" in kinds else model
    assert isinstance(inner, nn.Module)
    return inner
