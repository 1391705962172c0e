"""`Session`: observe one training, from its start to its end.

Data flow in one direction. The Trainer steps its optimizers, and an `UpdateMonitor` turns each
observed step into a `StepRecord`. At the end of the batch the session merges the records of the
batch into one record, keeps it in a `Result` and writes it to an `Output`.

Read `callback` first, whose hooks call the session. The next file is `altgrad.output.output`.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from altgrad import LostRankError, StepRecord, UpdateMonitor
from altgrad.output import Output, explain_skipped, merge_records, show_summary, write_summary
from altgrad.report import Assessment
from altgrad_lightning.averages import find_averages
from altgrad_lightning.due_batches import DueBatches
from altgrad_lightning.notices import Notices
from altgrad_lightning.packages import Callback
from altgrad_lightning.result import Result
from altgrad_lightning.settings import Settings
from altgrad_lightning.steps import find_interval, logged_step
from altgrad_lightning.store_as import attach_storages
from altgrad_lightning.strategies import explain_refusal

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


class Session:
    """An observer of one training of a Trainer, from its first batch to its end.

    It observes optimizer steps with an `UpdateMonitor`, and writes the figures with an `Output`.

    Args:
        trainer: The Trainer that trains.
        module: The module to train.
        callback: The `PrecisionMonitor` among the Trainer's callbacks.
        settings: The arguments of the callback.
        notices: The notices of this training, each of which is given once.
        result: Object in which the session leaves its latest figures, verdicts and state. The
            session resumes from the `state` in it.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        callback: Callback,
        settings: Settings,
        notices: Notices,
        result: Result,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._callback = callback
        self._settings = settings
        self._notices = notices
        self._result = result
        self._due = DueBatches(find_interval(trainer, settings.every_n_steps))
        self._callbacks = [*trainer.callbacks]  # type: ignore[attr-defined]
        self._due.restore_last(trainer.optimizers, result.state.get("last_batches", []))
        self._optimizers: list[torch.optim.Optimizer] = []
        self._monitor: UpdateMonitor | None = None
        self._monitor_state: dict[str, Any] | None = result.state.get("monitor")
        self._output: Output | None = None
        self._output_state: dict[str, Any] | None = result.state.get("output")
        self._records: list[StepRecord] = []  # of the current batch

    # --- from the first batch to the last

    def start(self, folder: Path | None) -> bool:
        """Begin to observe the Trainer's optimizers, and open run file and loggers on rank 0.

        Args:
            folder: The folder in which to create the run file; None for no run file.

        Returns:
            True if at least one optimizer is observed.
        """
        if not self.attach():
            return False
        if self._trainer.is_global_zero:
            self._output = Output(
                self._trainer.loggers,
                folder,
                self._describe_run,
                self._settings.get_output_settings(),
                self._output_state,
                logged_step(self._trainer),
                self.warn,
            )
            self._result.path = self._output.path
        return True

    @property
    def has_other_optimizers(self) -> bool:
        """True if the Trainer has other optimizers than at the last call of `attach`."""
        return self._trainer.optimizers != self._optimizers

    def attach(self) -> bool:
        """Stop observing any earlier optimizers, and observe the Trainer's current optimizers.

        Returns:
            True if at least one of the Trainer's optimizers is observed.

        Raises:
            ValueError: A `SamplingRule` matches no layer.
        """
        self._release_monitor()
        attach_storages(self._trainer, self._module)
        # Set after the release: the monitor's state must be read while the old optimizers live.
        self._optimizers = [*self._trainer.optimizers]
        if refusal := self._find_refusal():
            reasons: list[str | None] = [refusal]
        else:
            self._monitor = monitor = self._make_monitor()
            try:
                reasons = [self._attach_to(monitor, each) for each in self._optimizers]
            except LostRankError as error:
                # A second attempt would wait for the timeout again, as the other ranks train.
                self.warn(f"does not observe this run: {error}")
                self.end(alone=True)
                return False
        for reason in filter(None, reasons):
            self.warn(f"does not observe this run, or a part of it: {reason}")
        return None in reasons

    def finish_batch(self) -> None:
        """Write the figures of the batch, if a step was observed, and keep them in the `Result`."""
        if self._monitor is None:
            return
        if not self._records:
            # Hooks saw the steps of other batches, even if the overhead budget left them out.
            if self._due.misses_steps(logged_step(self._trainer)):
                self._monitor.warn_about_bypasses()
            return
        record = merge_records([*self._records])
        self._records.clear()
        step = logged_step(self._trainer)
        self._result.note(step, record)
        if self._output is not None:
            self._output.write(step, record, self._monitor.skipped)
            self._result.path = self._output.path  # a file that was deleted may have a new name

    def warn_about_unseen(self) -> None:
        """Warn if no step was observed, or if layers moved and have no observed step."""
        monitor = self._monitor
        if monitor is None or not monitor.is_observing:
            return
        unseen = monitor.describe_unseen()
        if self._trainer.global_step and self._result.latest_step is None:
            if self._output is not None:
                steps, skipped = self._trainer.global_step, self._result.skipped
                self._output.write_unobserved(steps, skipped, self._due.every)
            self.warn(f"observed no step: {self._explain_no_step(have_moved=bool(unseen))}")
            if not self._result.skipped:
                return  # the next notice would name all layers
        for notice in unseen:
            self.warn(notice)

    def _explain_no_step(self, *, have_moved: bool) -> str:
        """Return the reason why no step was observed.

        Args:
            have_moved: True if layers have moved all the same.
        """
        if self._due.every == 0:
            return "this Trainer logs at no step: pass every_n_steps"
        if skipped := explain_skipped(self._result.skipped, have_moved=have_moved):
            return skipped
        return f"none fell on an observed batch (every {self._due.every})"

    def finish(self) -> None:
        """Log numbers that were kept back, draw the last pictures, and close the run file.

        Numbers of early steps are kept back until it is known which layers get charts.
        """
        if self._output is not None:
            self._output.finish()

    def show_summary(self) -> None:
        """Print the verdicts and the command that reports them, if a step was observed."""
        if self._output is not None and self._result.latest_step is not None:
            show_summary(write_summary(self._output.assess().runs, self._output.path))

    def finish_after_error(self) -> None:
        """Write what was observed before an error or Ctrl-C, without waiting for other ranks."""
        for write in (self.finish_batch, self.finish):
            with suppress(Exception):  # or it would hide the error that ended the training
                write()

    # --- findings

    @property
    def assessment(self) -> Assessment | None:
        """The verdicts so far: how well each format would store each layer.

        None on ranks that do not write.
        """
        return self._result.assessment if self._output is None else self._output.assess()

    @property
    def waits(self) -> bool:
        """True while the session observes and no step has been observed yet."""
        observes = self._monitor is not None and self._monitor.is_observing
        return observes and self._result.latest_step is None

    @property
    def is_shared(self) -> bool:
        """True if all ranks observe the same steps, so that each rank waits for the other ranks."""
        return self._monitor is not None and self._monitor.is_shared

    def state_dict(self) -> dict[str, Any]:
        """Return the states of `UpdateMonitor` and `Output`, and when optimizers were observed.

        Returns:
            A dict with the keys ``monitor``, ``output`` and, if any optimizer was observed,
            ``last_batches``: the batch in which each was last observed. Empty if the
            `UpdateMonitor` has no state.
        """
        monitor, output = self._monitor_state, self._output_state
        if self._monitor is not None:
            monitor = self._read_state(self._monitor)
        if self._output is not None:
            output = self._output.state_dict()
        last = self._due.get_last(self._optimizers)
        batches = {"last_batches": last} if last else {}
        return {} if monitor is None else {"monitor": monitor, "output": output} | batches

    def warn(self, notice: str) -> None:
        """Warn the user with a sentence, on the first rank alone, since all ranks have the same."""
        if self._trainer.is_global_zero:
            self._notices.warn(notice)

    # --- the end

    def stop_writing(self) -> None:
        """Close the run file, stop logging, and keep verdicts and state."""
        output, self._output = self._output, None
        if output is not None:
            self._output_state = output.state_dict()
            self._result.assessment = output.assess()
            output.close()

    def end(self, *, alone: bool = False) -> None:
        """Stop observing and writing, and leave the state for checkpoints in the `Result`.

        Args:
            alone: If True, do not wait for other ranks, which may still train.
        """
        self._release_monitor(alone=alone)
        self.stop_writing()
        self._result.state = self.state_dict()

    def _release_monitor(self, *, alone: bool = False) -> None:
        """Detach the `UpdateMonitor` from all optimizers, and keep its state for checkpoints.

        Args:
            alone: If True, do not wait for other ranks. A state that needs all ranks is dropped.
        """
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            monitor.detach()
            self._monitor_state = None if alone and monitor.is_shared else self._read_state(monitor)

    # --- the monitor

    def _find_refusal(self) -> str | None:
        if refusal := explain_refusal(self._trainer):
            return refusal
        if next(self._module.parameters(), None) is None:
            return "the module has no parameter to observe"
        # Without an optimizer, Lightning makes one that does nothing: lightning/pytorch/core/
        # optimizer.py, _MockOptimizer.
        kinds = {type(each).__name__ for each in self._optimizers}
        if kinds <= {"_MockOptimizer"}:
            return (
                "configure_optimizers() of the module returns no optimizer; return that whose "
                "step() moves the weights"
            )
        return None

    def _make_monitor(self) -> UpdateMonitor:
        """Return a new `UpdateMonitor`, with the restored state unless the state is invalid."""
        monitor = UpdateMonitor(
            self._module,
            self._records.append,
            every_n_steps=self._is_due,
            warn=self._notices.warn,  # on every rank: the monitor chooses the ranks of a notice
            **self._settings.get_monitor_arguments(),
        )
        try:
            if self._monitor_state is not None:
                monitor.load_state_dict(self._monitor_state)
        except Exception as error:
            if self._settings.strict:
                raise
            self.warn(f"begins anew, because its state cannot be restored: {error!r}")
            self._monitor_state = None
            return self._make_monitor()
        self._watch_averages(monitor)
        self._result.skipped = monitor.skipped
        return monitor

    def _watch_averages(self, monitor: UpdateMonitor) -> None:
        """Have the monitor watch each average of the weights that the Trainer's callbacks keep.

        A *recipe* says in which formats weights and states would be stored. Its metrics then say,
        too, how far such an average would go from one in float32.
        """
        for name, averaged in find_averages(self._trainer, self._module).items():
            self._watch_average(monitor, averaged, name)

    def _watch_average(self, monitor: UpdateMonitor, averaged: nn.Module, name: str) -> None:
        try:
            monitor.watch_average(averaged, name)
        except ValueError as error:
            self.warn(f"has no figures of the average {name!r}: {error}")

    def _attach_to(self, monitor: UpdateMonitor, optimizer: torch.optim.Optimizer) -> str | None:
        """Attach the `UpdateMonitor` to an optimizer; return the reason if that is impossible."""
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        try:
            monitor.attach(self._settings.find_inner(optimizer), scaler=scaler)
        except TypeError as error:
            kind = type(optimizer).__name__
            return (
                f"{error}. A callback attaches the optimizer inside, whose step has to be all that "
                f"{kind}.step() does to the weights, if you pass "
                f"inner_optimizers={{{kind!r}: 'optimizer'}}, with the name of its attribute"
            )
        except ValueError as error:
            return str(error)
        return None

    def _describe_run(self) -> dict[str, Any]:
        assert self._monitor is not None, "a step was just observed"
        return self._monitor.run_header()

    def _is_due(self, _index: int) -> bool:
        if self._monitor is None or self._is_tuning:
            return False
        # Other callbacks may need a figure before the first batch that is due.
        wants_first = bool(self._settings.callback_metrics) and self.waits
        return self._due.take_step(self._monitor.asking, logged_step(self._trainer)) or wants_first

    @property
    def _is_tuning(self) -> bool:
        """True while a tuner of Lightning, such as its learning rate finder, steps optimizers.

        A tuner replaces all callbacks while it runs: lightning/pytorch/tuner/lr_finder.py and
        batch_size_scaling.py.
        """
        now = {id(each) for each in self._trainer.callbacks}  # type: ignore[attr-defined]
        # The Trainer does not know this callback if another callback passes its hooks on to it.
        is_known = any(each is self._callback for each in self._callbacks)
        mine = [self._callback] if is_known else self._callbacks
        return not any(id(each) in now for each in mine)

    def _read_state(self, monitor: UpdateMonitor) -> dict[str, Any] | None:
        try:
            return monitor.state_dict()
        except Exception as error:  # noqa: BLE001 - such as an error of a failed device
            self.warn(f"could not save its state: {error!r}")
            return None
