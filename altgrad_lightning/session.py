"""`Session`: what `PrecisionMonitor` holds from the start of a training to its end.

The data flow one way: the Trainer steps its optimizers, an `UpdateMonitor` turns each observed step
into a `StepRecord`, and at the end of the batch the session notes it in its `Result` and writes it
to its `Output`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from altgrad import Histogram, LostRankError, StepRecord, UpdateMonitor, model_figures
from altgrad.report import Assessment, Header
from altgrad_lightning.notices import Notices
from altgrad_lightning.output import Output
from altgrad_lightning.packages import Callback
from altgrad_lightning.result import Result
from altgrad_lightning.settings import Settings
from altgrad_lightning.strategies import refused_strategy

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


class Session:
    """A training under observation, from its first batch to its end.

    Args:
        trainer: The Trainer that trains.
        module: The module that it trains.
        callback: The callback that observes.
        settings: The arguments of the callback.
        notices: Where warnings go.
        result: Where findings go; its `state` is what the training resumes from.
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
        # A Trainer that logs at no step has 0 or None here.
        self._every = settings.every_n_steps or getattr(trainer, "log_every_n_steps", None) or 0
        self._optimizers: list[torch.optim.Optimizer] = []
        self._monitor: UpdateMonitor | None = None
        self._monitor_state: dict[str, Any] | None = result.state.get("monitor")
        self._output: Output | None = None
        self._output_state: dict[str, Any] | None = result.state.get("output")
        self._records: list[StepRecord] = []  # of the batch
        self._observed = 0  # batches

    # --- from the first batch to the last

    def start(self, folder: Path | None) -> bool:
        """Attach to the optimizers, and in the first process open what figures are written to.

        Args:
            folder: Where the run file is created; None for no run file.

        Returns:
            True if at least one optimizer is observed.
        """
        if not self.attach():
            return False
        if self._trainer.is_global_zero:
            assert self._monitor is not None
            self._output = Output(
                self._trainer.loggers,
                folder,
                Header.from_json(self._monitor.run_header()),
                self._settings.for_output(),
                self._output_state,
                _logged_step(self._trainer),
                self.say,
            )
            self._result.path = self._output.path
        return True

    @property
    def has_other_optimizers(self) -> bool:
        """Return True if the Trainer's optimizers were replaced since `attach`."""
        return self._trainer.optimizers != self._optimizers

    def attach(self) -> bool:
        """Observe the Trainer's optimizers, and no longer those before.

        Returns:
            True if at least one of them is observed.

        Raises:
            ValueError: A rule matches no layer.
        """
        self._release_monitor()
        # Only now: what the monitor knew of the optimizers before goes with the last reference.
        self._optimizers = [*self._trainer.optimizers]
        if refused := self._refused():
            reasons: list[str | None] = [refused]
        else:
            self._monitor = monitor = self._make_monitor()
            try:
                reasons = [self._attach_to(monitor, each) for each in self._optimizers]
            except LostRankError as error:
                # No second attempt, which would wait again: the other ranks are training.
                self.say(f"does not observe this run: {error}")
                self.end(alone=True)
                return False
        for reason in filter(None, reasons):
            self.say(f"does not observe this run, or a part of it: {reason}")
        return None in reasons

    def finish_batch(self) -> None:
        """Note and write what was observed of the batch, if anything was."""
        if not self._records:
            return
        assert self._monitor is not None
        record = _merge([*self._records])
        self._records.clear()
        step = _logged_step(self._trainer)
        self._result.note(step, record)
        self._observed += 1
        # Pictures take a second or two, so they are drawn ever less often.
        weights = self._monitor.weight_octaves() if _is_power_of_4(self._observed) else None
        if self._output is not None:
            self._output.write(step, record, weights, self._monitor.skipped)

    def why_no_step(self) -> str | None:
        """Return why no step of the whole training was observed; None if one was."""
        observes = self._monitor is not None and self._monitor.is_observing
        if not observes or not self._trainer.global_step or self._result.latest_step is not None:
            return None
        if self._every == 0:
            return "this Trainer logs at no step: pass every_n_steps"
        if self._result.skipped:
            return f"all were skipped, {dict(self._result.skipped)}"
        return f"none fell on an observed batch (every {self._every})"

    def finish(self) -> None:
        """Log the rows that have waited, and the pictures as they are in the end."""
        weights = self._weights_at_the_end()
        if self._output is not None:
            self._output.finish(weights)

    # --- what it has come to

    @property
    def assessment(self) -> Assessment | None:
        """The verdicts as they stand."""
        return self._result.assessment if self._output is None else self._output.assessment()

    @property
    def is_shared(self) -> bool:
        """Return True if all ranks observe the same steps, and wait for each other."""
        return self._monitor is not None and self._monitor.is_shared

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the monitor and of the output; empty if the monitor's is lost."""
        monitor, output = self._monitor_state, self._output_state
        if self._monitor is not None:
            monitor = self._read_state(self._monitor)
        if self._output is not None:
            output = self._output.state_dict()
        return {} if monitor is None else {"monitor": monitor, "output": output}

    def say(self, message: str) -> None:
        """Warn the user, in the first process, which speaks for all."""
        if self._trainer.is_global_zero:
            self._notices.say(message)

    # --- its end

    def flush(self) -> None:
        """Log the rows that have waited, where the training has failed."""
        if self._output is not None:
            with suppress(Exception):  # the user is to see the error that ended the training
                self._output.flush()

    def stop_writing(self) -> None:
        """Close the run file and log no more."""
        output, self._output = self._output, None
        if output is not None:
            self._output_state = output.state_dict()
            self._result.assessment = output.assessment()
            output.close()

    def end(self, *, alone: bool = False) -> None:
        """Observe and write no more, and leave the state in the result.

        Args:
            alone: Whether other ranks may not do the same now, so that none can be waited for.
        """
        self._release_monitor(alone=alone)
        self.stop_writing()
        self._result.state = self.state_dict()

    def _release_monitor(self, *, alone: bool = False) -> None:
        """Detach the monitor and keep its state, unless other ranks would have to be asked."""
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            monitor.detach()
            self._monitor_state = None if alone and monitor.is_shared else self._read_state(monitor)

    # --- the monitor

    def _refused(self) -> str | None:
        if refused := refused_strategy(self._trainer):
            return refused
        if next(self._module.parameters(), None) is None:
            return "there is no parameter to observe in the module"
        return None

    def _make_monitor(self) -> UpdateMonitor:
        monitor = UpdateMonitor(
            self._module,
            self._records.append,
            every_n_steps=self._is_due,
            tell=self._notices.say,  # on every rank: it knows which of them are to hear a message
            **self._settings.for_monitor(),
        )
        if self._monitor_state is not None:
            monitor.load_state_dict(self._monitor_state)
        self._result.skipped = monitor.skipped
        return monitor

    def _attach_to(self, monitor: UpdateMonitor, optimizer: torch.optim.Optimizer) -> str | None:
        """Attach the monitor; return why the optimizer cannot be observed, or None."""
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        try:
            monitor.attach(optimizer, scaler=scaler)
        except (TypeError, ValueError) as error:
            return str(error)
        return None

    def _is_due(self, _index: int) -> bool:
        # Tuners step the same optimizers, with callbacks of their own in place of the Trainer's.
        callbacks = self._trainer.callbacks  # type: ignore[attr-defined]
        if self._every == 0 or self._callback not in callbacks:
            return False
        return (_logged_step(self._trainer) + 1) % self._every == 0

    def _read_state(self, monitor: UpdateMonitor) -> dict[str, Any] | None:
        try:
            return monitor.state_dict()
        except Exception as error:  # noqa: BLE001 - an accelerator that failed; its error counts
            self.say(f"could not save its state: {error!r}")
            return None

    def _weights_at_the_end(self) -> Histogram | None:
        """Return the weights for the last pictures; None if these are drawn already."""
        monitor = self._monitor
        if monitor is None or not self._observed or _is_power_of_4(self._observed):
            return None
        # After an error on this rank the others may not join in.
        return monitor.weight_octaves() if monitor.is_observing or not monitor.is_shared else None


def _logged_step(trainer: Trainer) -> int:
    """Return the step at which Lightning logs the current batch."""
    # There is no public name for it; Lightning's own monitors use this one.
    return trainer.fit_loop.epoch_loop._batches_that_stepped  # noqa: SLF001


def _merge(records: Sequence[StepRecord]) -> StepRecord:
    """Merge the records of a batch, in which several optimizers may have stepped, or one twice."""
    last = records[-1]
    if len(records) == 1:
        return last
    layers = {name: figures for each in records for name, figures in each.layers.items()}
    return StepRecord(
        last.index,
        layers,
        model_figures([*layers.values()]),
        sum(each.own_seconds for each in records),
        sum(each.training_seconds for each in records),
    )


def _is_power_of_4(number: int) -> bool:
    return number.bit_count() == 1 and number.bit_length() % 2 == 1
