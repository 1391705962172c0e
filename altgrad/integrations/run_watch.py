"""`watch`: observe a training in any loop, write its run file, and judge it at the end.

`watch` makes a `RunWatch`, which connects two objects. An `UpdateMonitor` turns each observed step
of the optimizers into a `StepRecord`. An `Output` writes the records to a run file and to loggers.

Read `step_numbers` first. The next file is `transformers`; it, `accelerate` and `fabric` use
`RunWatch` each in its own way.
"""

from __future__ import annotations

import difflib
import inspect
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from altgrad._messages import Notices
from altgrad.integrations.step_numbers import StepNumbers
from altgrad.measurement.measure import DEFAULT_FORMATS
from altgrad.measurement.merging import merge_records
from altgrad.measurement.step_record import StepRecord
from altgrad.monitor.monitor import UpdateMonitor
from altgrad.monitor.policy import StepPolicy
from altgrad.monitor.schedule import StepSchedule
from altgrad.observation.dtensor import is_sharded
from altgrad.observation.optimizers import unwrap
from altgrad.observation.step_hooks import find_backward_pass
from altgrad.output import (
    ChartKind,
    Output,
    OutputSettings,
    WriterLogger,
    check_charts,
    check_layer_charts,
    explain_skipped,
    show_summary,
    write_summary,
)
from altgrad.quantization.block_formats import Formats
from altgrad.report import Assessment

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def watch(
    model: nn.Module | Sequence[tuple[str, Tensor]],
    optimizer: Any,
    folder: str | os.PathLike[str],
    *,
    formats: Formats = DEFAULT_FORMATS,
    every_n_steps: int | StepSchedule | Callable[[int], bool] = 10,
    writer: SummaryWriter | None = None,
    scaler: GradScaler | None = None,
    state: Mapping[str, Any] | None = None,
    strict: bool = False,
    **arguments: Any,
) -> RunWatch:
    """Observe the steps of an optimizer in any training loop, and write a run file.

    The run file, ``altgrad.jsonl`` in `folder`, says how much of each weight update a number format
    would keep. The command ``altgrad report`` shows it. The training itself stays bit-identical.

    Observing goes on until `RunWatch.close`, or as long as the optimizer lives: the result need not
    be kept. The run file is complete up to the last observed step, even if the process is killed.

    Under DistributedDataParallel, call this function on every rank: the first one observes. If
    parameters are sharded by fully_shard, all ranks observe together, and the first one writes.

    Examples:
        >>> import altgrad, tempfile, torch
        >>> model = torch.nn.LayerNorm(512)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> run = altgrad.watch(model, optimizer, tempfile.mkdtemp(), every_n_steps=1)
        >>> (model(torch.randn(8, 512)) - 1).square().mean().backward()
        >>> optimizer.step()
        >>> run.latest.layers["weight"]["stall_frac/bf16"]
        1.0
        >>> summary = run.close()

    Args:
        model: The module that is trained, or pairs of name and parameter.
        optimizer: The optimizer, or a list of all optimizers. Wrappers of trainers are known.
        folder: The folder of the run file; it is created if it is missing.
        formats: One or several number formats to judge, or their names.
        every_n_steps: Interval in steps, a `StepSchedule`, or a function of a step's number that
            returns True if the step is to be observed. Steps of the training count from 0, and go
            on counting in a resumed run: see `RunWatch` for several optimizers.
        writer: A SummaryWriter that gets the figures, too, with pictures and verdicts.
        scaler: The GradScaler that calls the optimizer's `step`, if there is one.
        state: A result of `RunWatch.state_dict`, from a checkpoint, to go on with that run.
        strict: If True, re-raise errors of observing and writing in the training loop; otherwise
            warn once, and leave out what failed.
        **arguments: Further arguments of `UpdateMonitor`: `sampling`, `recipes`, `max_elements`,
            `overhead_budget`, `scaling`, `twin_elements`, `seed`, `warn`. Then `layer_charts` and
            `charts`, which figures the writer gets: see `RunWatch`.

    Returns:
        The `RunWatch`. In a ``with`` statement it prints a summary at the end.

    Raises:
        TypeError: An argument has the wrong type, or the optimizer is unknown.
        ValueError: An argument is out of range, `state` is damaged, or the steps of the optimizer
            cannot be observed.
    """
    run = RunWatch(
        model,
        folder,
        every_n_steps=every_n_steps,
        find_loggers=lambda: [] if writer is None else [WriterLogger(writer)],
        formats=formats,
        strict=strict,
        **arguments,
    )
    if state is not None:
        run.load_state_dict(state)
    return run.attach(*list_optimizers(optimizer), scaler=scaler)


def _check_names(arguments: Mapping[str, Any]) -> None:
    """Raise TypeError if `UpdateMonitor` knows no argument of a name."""
    known = inspect.signature(UpdateMonitor).parameters
    for name, value in arguments.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {near[0]}?" if near else "see altgrad.watch for those it knows"
            raise TypeError(f"{name}={value!r}: unknown argument; {remedy}")


def list_optimizers(optimizer: Any) -> list[Any]:
    """Return a list of optimizers for one optimizer, or for a list or tuple of several."""
    return [*optimizer] if isinstance(optimizer, (list, tuple)) else [optimizer]


class RunWatch:
    """A training under observation: its figures go to a run file, and are judged at the end.

    `altgrad.watch` returns a `RunWatch` that is attached to the optimizers. The run file is opened
    at their first step.

    Steps of the training have numbers from 0. Several optimizers share a number, and a record, as
    long as each of them steps once; see `altgrad.integrations.step_numbers`. `flush` and `attach`
    end a step, too.

    A record is written when all optimizers have stepped, else when the next number begins. If the
    process is killed before that, the record is lost.

    Args:
        model: The module that is trained, or pairs of name and parameter.
        folder: The folder of the run file.
        every_n_steps: Interval in steps, a `StepSchedule`, or a function of a step's number that
            returns True if the step is to be observed.
        find_loggers: Function that returns the loggers, called at the first step.
        find_step: Function that returns the number of the coming step. None to count steps.
        owner: Name at the beginning of each warning.
        warn: Function that is called with each notice, in place of `warnings.warn`.
        strict: If True, errors are raised; otherwise each gives a warning.
        layer_charts: The number of layers with charts of their own, or patterns of their names;
            None for up to 8 layers, as many as leave at most 80 charts.
        charts: ``"default"`` charts the headline (what is kept, and which layers are frozen) and
            the diagnostics DIAG-01 to 04 of docs/metrics.md; ``"all"`` charts all metrics.
        **arguments: Further arguments of `UpdateMonitor`.

    Attributes:
        monitor: The `UpdateMonitor` that observes the steps.
        latest: The record of the last observed step; None before the first.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[tuple[str, Tensor]],
        folder: str | os.PathLike[str],
        *,
        every_n_steps: int | StepSchedule | Callable[[int], bool] = 10,
        find_loggers: Callable[[], Iterable[Any]] = tuple,
        find_step: Callable[[], int] | None = None,
        owner: str = "altgrad.watch",
        warn: Callable[[str], object] | None = None,
        strict: bool = False,
        layer_charts: int | Sequence[str] | None = None,
        charts: ChartKind = "default",
        **arguments: Any,
    ) -> None:
        _check_names(arguments)
        self._settings = OutputSettings(
            check_layer_charts(layer_charts), check_charts(charts), strict=strict
        )
        self._folder = Path(folder).absolute()  # the current folder may change
        self._policy = StepPolicy(every_n_steps, overhead_budget=None)
        self._find_loggers = find_loggers
        self._find_step = find_step
        self._strict = strict
        self._notices = Notices(owner, warn)
        self.latest: StepRecord | None = None
        self._numbers = StepNumbers()
        self._records: list[StepRecord] = []  # of the last step that began
        self._thread = threading.local()  # its `optimizer` steps: two threads may step two
        self._lock = threading.RLock()
        self._optimizers: list[weakref.ref[Optimizer]] = []
        self._scaler: GradScaler | None = None
        self._handles: list[RemovableHandle] = []
        self._output: Output | None = None
        self._output_state: Mapping[str, Any] | None = None
        self._is_open = True
        self._make_monitor = partial(
            UpdateMonitor,
            model,
            self._note,
            every_n_steps=self._is_due,
            warn=self._notices.give_once,
            strict=strict,
            **arguments,
        )
        self.monitor = self._make_monitor()

    # --- findings

    @property
    def path(self) -> Path | None:
        """The path of the run file; None before the first step, and on ranks that do not write."""
        return None if self._output is None else self._output.path

    @property
    def assessment(self) -> Assessment | None:
        """The verdicts so far: how well each format would store each layer.

        None before the first step, and on ranks that do not write.
        """
        return None if self._output is None else self._output.assess()

    def summarize(self) -> str:
        """Return what the run could be stored as, what to do, and the path of the run file.

        Empty before the first step, and on ranks that do not write.
        """
        if self._output is None:
            return ""
        runs = self._output.assess().runs
        return write_summary(runs, self.path, has_observed=self._has_record)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, for a checkpoint.

        If parameters are sharded, all ranks have to call this method.

        Returns:
            The states of the `UpdateMonitor` and of the run file and verdicts, and the number of
            steps so far. Another rank than the first has no state of a file.
        """
        monitor = self.monitor.state_dict()  # first: it ends a step in backward, and has its record
        self.flush()
        output = self._output_state if self._output is None else self._output.state_dict()
        return {"monitor": monitor, "output": output, "steps": self._numbers.last + 1}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`: the run goes on from the step at which the state was saved.

        This is also a way back in mid-run, together with the weights of that step: later steps are
        then taken out of the run file and the verdicts. The run has a new `monitor` afterwards.

        Args:
            state: A result of `state_dict`.

        Raises:
            RuntimeError: The run is closed.
            ValueError: An entry of the state is missing or damaged; the run is as it was before.
        """
        self._check_open("load_state_dict")
        if missing := [name for name in ("monitor", "output", "steps") if name not in state]:
            raise ValueError(
                f"state={sorted(state)}: expected the entries of RunWatch.state_dict(), of which "
                f"{missing} are missing; leave out the state to begin anew"
            )
        first_step, monitor = state["steps"], self._make_monitor()
        if not isinstance(first_step, int) or isinstance(first_step, bool) or first_step < 0:
            raise ValueError(
                f"state['steps']={first_step!r}: expected an int of at least 0; leave out the state"
                " to begin anew"
            )
        monitor.load_state_dict(state["monitor"])  # raises errors before anything has changed
        optimizers = self._find_optimizers()
        self._detach()
        self._records.clear()
        if self._output is not None:
            self._output.close()
        self.monitor, self._output, self._output_state = monitor, None, state["output"]
        self._numbers = StepNumbers(first_step)
        if optimizers:
            self.attach(*optimizers, scaler=self._scaler)

    def save(self, file: Path, *, is_writer: bool) -> None:
        """Save a `state_dict` for `restore`, or give a notice why that is not possible.

        Args:
            file: The file to write, in the folder of a checkpoint.
            is_writer: True on the rank that writes the file. All ranks have to call this method.

        Raises:
            Exception: If `strict`, an error of making the state or writing the file.
        """
        try:
            state = self.state_dict()
            if is_writer:
                torch.save(state, file)
        except Exception as error:
            if self._strict:
                raise
            self._notices.give(f"could not save its state to {file}: {error!r}")

    def restore(self, file: Path) -> None:
        """Restore what `save` has saved, or give a notice why that is not possible.

        A run that is closed stays as it is.

        Args:
            file: The file to read, in the folder of a checkpoint.

        Raises:
            Exception: If `strict`, an error of reading the file or restoring the state.
        """
        if not self._is_open:
            return
        goes_on = (
            "goes on with its own count of steps" if self._numbers.has_begun else "begins anew"
        )
        if not file.exists():
            self._notices.give(f"{goes_on}: {file.parent} has no {file.name} of an earlier run")
            return
        try:
            self.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        except Exception as error:
            if self._strict:
                raise
            self._notices.give(f"{goes_on}, because {file} cannot be restored: {error!r}")

    # --- from the first step to the last

    def attach(self, *optimizers: Any, scaler: GradScaler | None = None) -> RunWatch:
        """Start observing the steps of some optimizers, unless the first rank does it for this one.

        Optimizers that were attached before stay attached, such as those of an earlier phase.

        Args:
            optimizers: Optimizers of torch, or wrappers of trainers around optimizers.
            scaler: The GradScaler that calls `step` of the optimizers, if there is one.

        Returns:
            The `RunWatch`.

        Raises:
            TypeError: An optimizer neither is nor wraps a torch optimizer.
            ValueError: The steps of an optimizer cannot be observed.
            RuntimeError: The run is closed.
        """
        self._check_open("attach")
        if _get_rank() and not any(map(is_sharded, self.monitor.parameters.values())):
            return self
        self.monitor.attach(*optimizers, scaler=scaler)
        self.flush()
        self._numbers.end()
        self._scaler = scaler or self._scaler
        known = self._find_optimizers()
        for each in dict.fromkeys(map(unwrap, optimizers)):
            if each not in known:
                self._optimizers.append(weakref.ref(each))
                self._handles.append(each.register_state_dict_pre_hook(self._stay_alive))
        return self

    def flush(self) -> None:
        """Write the record of the last step now, instead of when the next step begins."""
        with self._lock:
            if not self._records:
                return
            self.latest = merge_records(self._records)
            self._records.clear()
            self._numbers.end()
            if self._output is not None:
                self._output.write(self._numbers.last, self.latest, self.monitor.skipped)

    def close(self) -> str:
        """Stop observing, write the last figures and verdicts, and close the run file.

        Returns:
            The summary of `summarize`.
        """
        if self._is_open:
            self._is_open = False
            # The stack is called from its end, and also after an error: notices may be errors.
            with ExitStack() as ending:
                if self._output is not None:
                    ending.callback(self._output.close)
                    ending.callback(self._output.finish)
                ending.callback(self.flush)
                ending.callback(self._detach)
                if self._output is not None and not self._has_record:
                    steps, every = self._numbers.last + 1, self._policy.every_n_steps
                    self._output.write_unobserved(steps, self.monitor.skipped, every)
                for notice in self._describe_unseen():
                    self._notices.give_once(notice)
        return self.summarize()

    def __enter__(self) -> RunWatch:  # noqa: PYI034 - typing has Self only from Python 3.11 on
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            summary = self.close()
        except Exception:
            if kind is None:  # do not hide the exception that ended the training
                raise
        else:
            if summary and (kind is None or issubclass(kind, KeyboardInterrupt)):
                show_summary(summary)

    # --- one step

    def _is_due(self, index: int) -> bool:
        """Return True if the coming step is to be observed; begin a new record if it has one.

        Args:
            index: Number of steps of the optimizer since it was attached, before this one.
        """
        with self._lock:
            # All that step in backward count as one optimizer.
            optimizer = self.monitor.asking if find_backward_pass() is None else None
            find = self._find_step or partial(self._numbers.find_next, optimizer, index)
            if (step := find()) > self._numbers.last:
                self.flush()
                self._numbers.begin(step)
            self._numbers.join(optimizer, index)
            if self._output is None and not _get_rank():
                self._open()
        if is_due := self._policy.is_wanted(step):
            self._thread.optimizer = optimizer
        return is_due

    def _note(self, record: StepRecord) -> None:
        """Keep a record; write it if no other optimizer can add to it."""
        with self._lock:
            self._records.append(record)
            # Another thread may have begun the next step: this record is then part of that one.
            self._numbers.join(vars(self._thread).pop("optimizer", None), record.index)
            if len(self._records) >= len(self._find_optimizers()):
                self.flush()

    def _find_optimizers(self) -> list[Optimizer]:
        """Return the attached optimizers that are still alive."""
        return [each for reference in self._optimizers if (each := reference()) is not None]

    def _check_open(self, method: str) -> None:
        if not self._is_open:
            raise RuntimeError(
                f"{method}: expected a run that is not closed; call altgrad.watch for a new run"
            )

    def _stay_alive(self, _: Optimizer) -> None:
        """Do nothing: the optimizer has this method as a hook, and thus keeps the `RunWatch`."""

    def _detach(self) -> None:
        self._optimizers.clear()
        for each in self._handles:
            each.remove()
        self._handles.clear()
        self.monitor.detach()

    def _open(self) -> None:
        # At the first step: a state may be loaded until then, and loggers may appear.
        self._output = Output(
            self._find_loggers(),
            self._folder,
            self.monitor.run_header,
            self._settings,
            self._output_state,
            self._numbers.last,
            self._notices.give_once,
        )

    def _describe_unseen(self) -> list[str]:
        """Return notices if no step was observed, or if layers moved and have no observed step."""
        if not self.monitor.is_observing:
            return []
        unseen = self.monitor.describe_unseen()
        if not self._numbers.has_begun or self._has_record:
            return unseen
        if self.monitor.warn_about_bypasses():  # the reason, of which no observed step follows
            return []
        notice = f"observed no step: {self._explain_no_step(have_moved=bool(unseen))}"
        # If no step was due, the other notices would name all layers.
        return [notice, *(unseen if self.monitor.skipped else [])]

    @property
    def _has_record(self) -> bool:
        """True after the first observed step of this process."""
        return self.latest is not None or bool(self._records)

    def _explain_no_step(self, *, have_moved: bool) -> str:
        """Return the reason why no step was observed.

        Args:
            have_moved: True if layers have moved all the same.
        """
        skipped = explain_skipped(self.monitor.skipped, have_moved=have_moved)
        return skipped or "none was due: see every_n_steps"


def _get_rank() -> int:
    """Return the rank of this process in the default process group; 0 without a group."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0
    return distributed.get_rank()
