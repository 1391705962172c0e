"""`watch`: watch a loop with an Accelerator of Hugging Face's accelerate.

Read `run_watch` first. The next file is `fabric`, which does the same for Lightning Fabric.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn

from altgrad.integrations.run_watch import RunWatch, list_optimizers
from altgrad.monitor.schedule import StepSchedule
from altgrad.observation.dtensor import is_sharded
from altgrad.output import WriterLogger

if TYPE_CHECKING:
    from accelerate import Accelerator  # type: ignore[import-untyped]

_RUNS: WeakKeyDictionary[Accelerator, int] = WeakKeyDictionary()
"""The number of the last run of each Accelerator; the names of files differ by it."""


def watch(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    folder: str | os.PathLike[str],
    *,
    every_n_steps: int | StepSchedule | Callable[[int], bool] = 10,
    **arguments: Any,
) -> RunWatch:
    """Observe a training with an Accelerator, and write a run file for ``altgrad report``.

    Call this function before or after ``accelerator.prepare``, on every process. With FSDP, which
    replaces the parameters, call it after. The first process writes. Figures also go to the
    Accelerator's trackers, such as TensorBoard.

    ``accelerator.save_state`` also saves the state of the run, into the file ``altgrad.pt``, and
    ``load_state`` restores it. In mid-run, ``load_state`` is a way back: later steps are then taken
    out of the run file. A checkpoint without the file gives a warning, and the run goes on.

    Args:
        accelerator: The Accelerator.
        model: The module that is trained, prepared or not.
        optimizer: The optimizer, prepared or not, or a list of all optimizers.
        folder: The folder of the run file.
        every_n_steps: Interval between observed steps, in steps, or a `StepSchedule`, or a function
            of a step's number.
        **arguments: Further arguments of `altgrad.UpdateMonitor`, such as `formats` and `recipes`.

    Returns:
        The `RunWatch`. In a ``with`` statement it prints a summary at the end.

    Raises:
        TypeError: An argument has the wrong type, or the optimizer is unknown.
        ValueError: An argument is out of range, or the optimizer's steps cannot be observed, as
            before ``prepare`` with FSDP2.
    """
    _check_prepared(accelerator, model)
    run = RunWatch(
        accelerator.unwrap_model(model),  # under DDP the names would begin with "module."
        folder,
        every_n_steps=every_n_steps,
        find_loggers=lambda: [_make_logger(each) for each in accelerator.trackers],
        **arguments,
    )
    run.attach(*list_optimizers(optimizer), scaler=accelerator.scaler)
    _save_and_load(accelerator, run)
    return run


def _check_prepared(accelerator: Accelerator, model: nn.Module) -> None:
    """Raise ValueError if `prepare` has yet to shard a module, whose parameters it replaces."""
    # accelerate has FSDP2 from version 1.6 on.
    if getattr(accelerator, "is_fsdp2", False) and not any(map(is_sharded, model.parameters())):
        raise ValueError(
            "model: expected a module that accelerator.prepare() has sharded, because FSDP2 "
            "replaces its parameters; call watch after prepare()"
        )


def _save_and_load(accelerator: Accelerator, run: RunWatch) -> None:
    """Save the state of a run in each checkpoint of an Accelerator, and restore it from there."""
    # Not by `register_for_checkpointing`: load_state then raises an error for each checkpoint that
    # was saved without the run, or with it if the run is no longer registered.
    number = _RUNS[accelerator] = _RUNS.get(accelerator, -1) + 1
    name = f"altgrad-{number}.pt" if number else "altgrad.pt"

    def save(_models: object, _weights: object, folder: str) -> None:
        run.save(Path(folder, name), is_writer=accelerator.is_main_process)

    def load(_models: object, folder: str) -> None:
        run.restore(Path(folder, name))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


class TrackerLogger:
    """A logger that logs numbers with a tracker of accelerate.

    Args:
        tracker: The tracker.

    Attributes:
        name: The name of the tracker.
        version: None: a tracker has no version of a run.
    """

    def __init__(self, tracker: Any) -> None:
        self._tracker = tracker
        self.name = tracker.name
        self.version = None

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers.

        Args:
            metrics: The numbers by key.
            step: The step to log them at.
        """
        self._tracker.log(dict(metrics), step=step)


def _make_logger(tracker: Any) -> WriterLogger | TrackerLogger:
    """Return the logger of a tracker; that of TensorBoard also shows pictures and verdicts."""
    # Its `tracker` is a SummaryWriter: accelerate/tracking.py, TensorBoardTracker.
    is_tensorboard = tracker.name == "tensorboard"
    return WriterLogger(tracker.tracker) if is_tensorboard else TrackerLogger(tracker)
