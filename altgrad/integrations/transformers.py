"""`PrecisionCallback`: watch a training by the Trainer of Hugging Face.

The callback makes a `RunWatch` for each call of ``Trainer.train``, and passes it what it learns
from the Trainer's events: the optimizer, the number of the step, and the folders of checkpoints.

Read `run_watch` first. The next file is `accelerate`.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy

from altgrad._messages import Notices, check_int
from altgrad.integrations.run_watch import RunWatch
from altgrad.measurement.measure import DEFAULT_FORMATS
from altgrad.monitor.monitor import UpdateMonitor
from altgrad.observation.optimizers import find_wrapped
from altgrad.output import show_summary
from altgrad.quantization.block_formats import Formats

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

_EVERY_N_STEPS = 10  # as in `altgrad.watch`
STATE_FILE = "altgrad.pt"
"""Name of the file in each checkpoint folder with the state of a `RunWatch`."""
LOGGED = ("kept_update_ratio", "unmoved_frac", "progress_kept")
"""Metrics of the model in the Trainer's logs. The console shows each log, so they are few."""


class PrecisionCallback(TrainerCallback):
    """A callback for the Trainer of Hugging Face that judges number formats from its steps.

    It observes what each format would keep of the weight updates of an ordinary training, writes a
    run file for ``altgrad report``, and prints a summary at the end. The training itself stays
    bit-identical. Each call of ``train`` is a run with a file of its own. A training that resumes
    from a checkpoint goes on in the file of the run that saved it.

    Under DDP the first rank observes. If parameters are sharded (FSDP2), all ranks observe
    together, and the first one writes.

    The loss in the Trainer's logs is joined by a few figures of the model, such as
    ``altgrad/kept_update_ratio/bf16``. TensorBoard, wandb and the like get these if the callback is
    added by `add_to`. In the Trainer's argument ``callbacks`` it would come after them, and only
    ``state.log_history`` and the console would get the figures.

    Args:
        folder: The folder of the run file; None for the Trainer's ``output_dir``.
        formats: One or several number formats to judge, or their names.
        every_n_steps: Interval between observed steps, in steps of the Trainer. None observes the
            steps that the Trainer logs, every ``logging_steps``; if its ``logging_strategy`` is not
            ``"steps"``, every tenth step.
        strict: If True, raise errors of the callback in the training; otherwise warn once.
        **arguments: Further arguments of `altgrad.UpdateMonitor`: `sampling`, `recipes`,
            `max_elements`, `overhead_budget`, `scaling`, `twin_elements`, `seed`.

    Attributes:
        run: The `altgrad.RunWatch` of the current training, else of the last one: it has the latest
            figures, the verdicts and the path of the run file. None before the first training.

    Raises:
        TypeError: An argument has the wrong type or is unknown.
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        formats: Formats = DEFAULT_FORMATS,
        every_n_steps: int | None = None,
        strict: bool = False,
        **arguments: Any,
    ) -> None:
        if every_n_steps is not None:
            check_int("every_n_steps", every_n_steps, 1)
        self._folder = folder
        self._every = every_n_steps
        self._strict = strict
        self._arguments = {"formats": formats, "strict": strict, **arguments}
        # Raises an error for wrong arguments now, and not in the training. The patterns of sampling
        # rules need the model.
        UpdateMonitor([("", torch.zeros(1, device="cpu"))], **{**self._arguments, "sampling": ()})
        self._notices = Notices(type(self).__name__)
        self._logged: object = None  # the record that was logged last
        self.run: RunWatch | None = None

    def add_to(self, trainer: Trainer) -> PrecisionCallback:
        """Add the callback to a Trainer, before the callbacks that log to TensorBoard and others.

        Args:
            trainer: The Trainer.

        Returns:
            The callback.
        """
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    # --- events of the Trainer, in the order in which it calls them

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any
    ) -> None:
        """Start to observe, now that weights and optimizer are restored and on their device.

        Args:
            args: Arguments of the Trainer.
            state: State of the Trainer, which has the number of the step.
            **kwargs: Among others, ``model`` and ``optimizer``.
        """
        self._end()  # of a training that raised an error
        self.run, self._logged = None, None
        self._notices = Notices(type(self).__name__)
        with self._guarded("does not observe this training"):
            self.run = run = self._make_run(args, state, kwargs["model"])
            if state.global_step:
                self._restore(run, args, state)
            run.attach(*find_optimizers(kwargs["optimizer"]))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Write the figures of a step, now that all its optimizers have stepped."""
        with self._guarded("stops observing after an error"):
            if self.run is not None:
                self.run.flush()

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002 - the Trainer's signature
        state: TrainerState,
        *_: Any,
        logs: dict[str, float] | None = None,
        **__: Any,
    ) -> None:
        """Add the latest figures to the log of the loss, unless they were logged before.

        Args:
            args: Arguments of the Trainer.
            state: State of the Trainer, whose ``log_history`` gets the figures.
            logs: The numbers that are logged, which get the figures.
        """
        record = None if self.run is None else self.run.latest
        if record is None or record is self._logged or logs is None or "loss" not in logs:
            return
        self._logged = record
        figures = {
            f"altgrad/{key}": value
            for key, value in record.model.items()
            if key.partition("/")[0] in LOGGED and math.isfinite(value)
        }
        logs.update(figures)
        if state.log_history:  # it has a copy of the logs already
            state.log_history[-1].update(figures)

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Save the state of the run into the checkpoint that the Trainer has just written.

        Args:
            args: Arguments of the Trainer, which have the folder of checkpoints.
            state: State of the Trainer, which has the number of the step.
        """
        if self.run is None:
            return
        with self._guarded("could not save its state, and stops observing"):
            saved = self.run.state_dict()  # on all ranks, which wait for each other if sharded
            folder = _find_checkpoint(args.output_dir, state)
            if state.is_world_process_zero and folder.is_dir():
                torch.save(saved, folder / STATE_FILE)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Stop observing, write the last figures and verdicts, and print the summary."""
        with self._guarded("had an error at the end"):
            if self.run is not None and (summary := self.run.close()):
                sys.stdout.write("\n")  # the progress bar leaves its line open
                show_summary(summary)

    # --- the run

    def _make_run(self, args: TrainingArguments, state: TrainerState, model: Any) -> RunWatch:
        return RunWatch(
            model,
            self._folder or args.output_dir or ".",
            every_n_steps=self._make_schedule(args, state),
            find_step=lambda: state.global_step + 1,  # counted as the Trainer's logs count
            owner=type(self).__name__,
            **self._arguments,
        )

    def _make_schedule(self, args: TrainingArguments, state: TrainerState) -> Callable[[int], bool]:
        """Return a function that returns True for the numbers of steps that are observed."""
        every = self._every
        if every is None and args.logging_strategy != IntervalStrategy.STEPS:
            every = _EVERY_N_STEPS
        if every is not None:
            return lambda step: step % every == 0
        # The Trainer computes `logging_steps` of its state from a share of all steps.
        return lambda step: (
            step % state.logging_steps == 0 or (step == 1 and args.logging_first_step)
        )

    def _restore(self, run: RunWatch, args: TrainingArguments, state: TrainerState) -> None:
        """Restore a run from the checkpoint from which the Trainer resumes.

        The Trainer does not tell callbacks which checkpoint that is. It is looked for in the
        Trainer's argument ``resume_from_checkpoint``, and in ``output_dir``. There, a checkpoint of
        another training may have the same number; its log then differs.
        """
        given = args.resume_from_checkpoint
        folders = [Path(given)] if isinstance(given, (str, os.PathLike)) else []
        folders += [_find_checkpoint(args.output_dir, state)]
        files = [folder / STATE_FILE for folder in folders]
        file = next((each for each in files if each.exists() and _has_log(each, state)), None)
        if file is None:
            self._notices.give(f"begins anew: {folders[0]} has no {STATE_FILE} of this training")
        else:
            run.restore(file)

    @contextmanager
    def _guarded(self, notice: str) -> Iterator[None]:
        """Turn an error into a warning that begins with `notice`, and stop observing."""
        try:
            yield
        except Exception as error:
            if self._strict:
                raise
            self._end()
            self._notices.give(f"{notice}: {error!r}")

    def _end(self) -> None:
        if self.run is not None:
            with suppress(Exception):  # of a run that has failed already
                self.run.close()


def find_optimizers(optimizer: Any) -> list[Any]:
    """Return the optimizers that step the layers, of the optimizer that a Trainer has.

    An optimizer whose name in the Trainer ends in ``_layerwise`` does nothing itself. It has an
    optimizer for each parameter, which steps in the backward pass:
    ``transformers/trainer_pt_utils.py`` (LayerWiseDummyOptimizer).

    Args:
        optimizer: The optimizer of the Trainer, in the wrapper of accelerate.

    Returns:
        The optimizers of the parameters if there are such, and otherwise the optimizer itself.
    """
    for inner in find_wrapped(optimizer):
        if by_parameter := getattr(inner, "optimizer_dict", None):
            return [*by_parameter.values()]
    return [optimizer]


def _find_checkpoint(folder: str | os.PathLike[str] | None, state: TrainerState) -> Path:
    """Return the folder of the Trainer's checkpoint after the current step."""
    return Path(folder or ".", f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def _has_log(file: Path, state: TrainerState) -> bool:
    """Return True if the checkpoint with this file has the same log as a Trainer, or no log.

    A checkpoint with another log belongs to another training.

    Args:
        file: A file in the folder of the checkpoint.
        state: State of the Trainer, with its log.
    """
    saved = file.with_name(TRAINER_STATE_NAME)
    if not saved.exists():
        return True
    log = TrainerState.load_from_json(str(saved)).log_history
    return json.dumps(log) == json.dumps(state.log_history)  # as text, since NaN differs from NaN
