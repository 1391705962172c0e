"""`PrecisionMonitor`: watch a Trainer's optimizer steps and log what each format would keep."""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from altgrad import (
    DEFAULT_FORMATS,
    Figures,
    Histogram,
    LostRankError,
    SamplingRule,
    StepRecord,
    StepSchedule,
    UpdateMonitor,
    model_figures,
)
from altgrad.quantization import NumberFormat, Scaling, get_formats
from altgrad.report import Assessment
from altgrad_lightning.output import Output, OutputSettings
from altgrad_lightning.packages import Callback
from altgrad_lightning.strategies import is_idle, refused_strategy

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "economy": {"max_elements": 256, "layer_charts": 4, "overhead_budget": 0.01},
    "standard": {},
    "full": {"max_elements": None, "layer_charts": 16, "histograms": True},
}
"""Named sets of arguments of `PrecisionMonitor`."""


class PrecisionMonitor(Callback):
    """Judge number formats from an ordinary run, step by step, in every logger of the Trainer.

    It is an `altgrad.UpdateMonitor` in the Trainer's clothes: the update that each observed
    optimizer step really made is measured on the grid of every format. Training is not touched: no
    weight, gradient or random number changes.

    Observed are automatic and manual optimization, any number of optimizers, accumulation,
    clipping, every precision of the Trainer and compiled modules, on one device, under DDP, where
    the first process observes, and under ModelParallelStrategy, where all do and the first writes.
    Steps that were none (a GradScaler found inf, there was no gradient, the learning rate is 0) are
    counted apart. Where a layer is stepped several times in a batch, the last step counts. Tuners
    (learning rate finder, batch size scaler) are left alone. What it cannot observe it says once:
    FSDP1 and DeepSpeed, optimizers that step inside of the backward pass or on copies of the
    parameters, and parameters that are not floating-point.

    It is a callback of `lightning` and of `pytorch_lightning`, whichever are installed. Its state
    is in their checkpoints: a resumed run still knows which weights have never moved.

    Logged keys are ``altgrad/{metric}`` and ``altgrad/{metric}/{format}`` for the model, and these
    followed by ``/{layer}`` for a layer, at the step at which Lightning logs what the module logs;
    ``altgrad/monitor/…`` says what share of the time observing takes, how many elements it measures
    and how many steps were skipped. TensorBoard and wandb also get pictures and the verdict, at the
    1st, 4th, 16th, … observed step and at the end. All figures of all layers go to the run
    file: ``altgrad report`` reads it. A logger, a picture or a file that fails is left out from
    then on and said once, and training goes on.

    Args:
        formats: Formats to judge, as in `altgrad.measure`. Defaults to bf16 and the two FP8
            formats in use.
        every_n_steps: Observe the optimizer step of each n-th batch that steps (in manual
            optimization, of each n-th batch); None follows the Trainer's ``log_every_n_steps``,
            so that the charts have the points of the loss.
        scaling: Which elements share an amax scale, as in `altgrad.measure`; per tensor by default,
            as FP8 training does. None judges the formats unscaled.
        preset: ``"economy"`` (256 elements of a parameter, 4 charted layers, at most 1 % of the
            time), ``"standard"`` (the defaults) or ``"full"`` (all elements, 16 charted layers,
            histograms): see `PRESETS`. An argument that is given another value than its default
            wins.
        layer_charts: How many layers are charted: those that keep least of their update at the
            first observed step that has figures, fixed from then on; or patterns of their names,
            such as ``["*.norm.weight"]``. 8 by default, since a board of thousands of charts shows
            nothing: with it and three formats there are fewer than 300. All layers are in
            `latest` and in the run file.
        histograms: Whether TensorBoard and wandb get histograms of abs(update) / stiffness at each
            observed step, of the model and of the charted layers: off by default, as they weigh
            more than all charts.
        run_file: Whether all figures of all layers are written to ``altgrad.jsonl`` in the run's
            log directory (Trainer.log_dir); about 3.5 kB for each layer and observed step with
            four formats. Never with ``fast_dev_run``.
        max_elements: As in `UpdateMonitor`, which observes every step by default, and therefore
            fewer elements; more of them make the error of a sample smaller.
        sampling: Rules for single layers, as in `UpdateMonitor`.
        overhead_budget: As in `UpdateMonitor`; what loggers, pictures and files take is not in it.
        seed: As in `UpdateMonitor`.
        strict: Whether what fails in here, loggers included, is raised into the training.

    Attributes:
        latest: The figures of every layer at the last observed step; empty before the first.
        latest_model: Those of the model; None before the first.
        latest_step: The step that they were logged at; None before the first.
        skipped: How many steps should have been observed and were none, by reason: see
            `altgrad.StepObserver`.
        path: Of the run file; None before training starts, and without one.
        assessment: What to do, layer by layer, as it stands; None before training starts.

    Raises:
        ValueError: No, unknown or equally named formats, a wrong scaling, or a number out of range;
            when training starts, a rule that matches no layer.
        TypeError: An argument of the wrong type.
    """

    def __init__(
        self,
        formats: str | NumberFormat | Sequence[str | NumberFormat] = DEFAULT_FORMATS,
        every_n_steps: int | None = None,
        *,
        preset: Literal["economy", "standard", "full"] | None = None,
        scaling: Scaling | None = "tensor",
        layer_charts: int | Sequence[str] = 8,
        histograms: bool = False,
        run_file: bool = True,
        max_elements: int | None = 4096,
        sampling: Sequence[SamplingRule] = (),
        overhead_budget: float | None = None,
        seed: int = 0,
        strict: bool = False,
    ) -> None:
        self.formats = get_formats(formats)
        if not self.formats:
            raise ValueError(f"formats={formats!r}: expected one or more formats")
        if every_n_steps is not None:
            StepSchedule(every_n_steps)  # checks it
        chosen = _with_preset(
            preset,
            {
                "max_elements": max_elements,
                "layer_charts": layer_charts,
                "histograms": histograms,
                "overhead_budget": overhead_budget,
            },
        )
        self.every_n_steps = every_n_steps
        self._output_settings = OutputSettings(
            _checked_layer_charts(chosen["layer_charts"]), chosen["histograms"], run_file, strict
        )
        self._settings: dict[str, Any] = {
            "formats": self.formats,
            "scaling": scaling,
            "max_elements": chosen["max_elements"],
            "overhead_budget": chosen["overhead_budget"],
            "seed": seed,
            "strict": strict,
        }
        self._sampling = tuple(sampling)
        # Not in the middle of a training: what is wrong whatever the module is an error here.
        UpdateMonitor([("", torch.zeros(1))], **self._settings)

        self.latest: Mapping[str, Figures] = {}
        self.latest_model: Figures | None = None
        self.latest_step: int | None = None
        self.skipped: Counter[Any] = Counter()
        self.path: Path | None = None
        self._trainer: Trainer | None = None  # while it observes
        self._every = 0
        self._monitor: UpdateMonitor | None = None
        self._output: Output | None = None
        self._assessment: Assessment | None = None  # of the run before
        self._state: dict[str, Any] | None = None  # of the monitor before this one
        self._output_state: dict[str, Any] | None = None  # likewise
        self._resumed_from: dict[str, Any] | None = None  # until training starts
        self._is_first = True  # of the processes of the run, and speaks for them
        self._observed = 0
        self._optimizers: list[torch.optim.Optimizer] = []
        self._records: list[StepRecord] = []  # of the batch
        self._told: set[str] = set()

    @property
    def assessment(self) -> Assessment | None:
        """What to do, layer by layer, as it stands."""
        return self._assessment if self._output is None else self._output.assessment()

    @property
    def state_key(self) -> str:
        """Under which checkpoints hold its state: several may watch a run, for other formats."""
        names = [format.name for format in self.formats]
        key: str = self._generate_state_key(formats=names, scaling=self._settings["scaling"])
        return key

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints: as of `UpdateMonitor`, the verdicts, and where the run file is."""
        if self._resumed_from is not None:
            return self._resumed_from
        state = self._state if self._monitor is None else self._state_of(self._monitor)
        if state is None:
            return {}
        output = self._output_state if self._output is None else self._output.state_dict()
        return {"monitor": state, "output": output}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint, before training starts."""
        self._resumed_from = state_dict or None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        resumed_from = self._resumed_from or {}
        self._detach()
        self._assessment = None
        # Without a checkpoint it is a run of its own.
        self._state, self._output_state = resumed_from.get("monitor"), resumed_from.get("output")
        self.latest, self.latest_model, self.latest_step, self.path = {}, None, None, None
        self.skipped.clear()
        self._is_first = trainer.is_global_zero
        folder = self._folder_of_run(trainer)
        if is_idle(trainer, pl_module):
            return
        self._trainer, self._observed = trainer, 0
        self._every = self.every_n_steps or getattr(trainer, "log_every_n_steps", None) or 0
        self._attach(trainer, pl_module)
        if self._monitor is not None and trainer.is_global_zero:
            settings, first_step = self._output_settings, _logged_step(trainer)
            self._output = Output(
                trainer, folder, self._monitor, settings, self._output_state, first_step, self._tell
            )
            self.path = self._output.path

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._trainer is None or trainer.optimizers == self._optimizers:
            return
        try:
            self._attach(trainer, pl_module)  # they were replaced
        except ValueError as error:  # and layers with them, so that a rule matches none any more
            self._stop(f"stops observing: {error}")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if not self._records or self._monitor is None:
            return
        with self._stopping_after_a_fault():
            record = self._latest_record(trainer)
            self._observed += 1
            draws = _is_power_of_4(self._observed)  # which takes a second or two
            weights = self._monitor.weight_octaves() if draws else None
            if self._output is not None:
                self._output.write(_logged_step(trainer), record, weights)

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        observing = self._monitor is not None and self._monitor.is_observing
        if observing and trainer.global_step and self.latest_step is None:
            if self._every == 0:
                why = "this Trainer logs at no step: pass every_n_steps"
            elif self.skipped:
                why = f"all were skipped, {dict(self.skipped)}"
            else:
                why = f"none fell on an observed batch (every {self._every})"
            self._tell(f"observed no step: {why}")
        with self._stopping_after_a_fault():
            weights = self._weights_at_the_end()
            if self._output is not None:
                self._output.finish(weights)
        self._detach()

    def on_exception(self, *_: Any) -> None:
        if self._output is not None:
            with suppress(Exception):  # the one that there is counts
                self._output.flush()
        self._detach(alone=True)

    def teardown(self, *_: Any, **__: Any) -> None:
        self._detach(alone=True)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, also of a module that has it as a hyperparameter: detached."""
        nothing = dict.fromkeys(("_trainer", "_monitor", "_output"))
        return {**self.__dict__, **nothing, "_optimizers": [], "_records": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Leave out what 0.1.0 pickled and is no argument any more."""
        state["_settings"].pop("compile", None)
        self.__dict__.update(state)

    def _weights_at_the_end(self) -> Histogram | None:
        """For pictures of the last step; None where it has them, or others might not be asked."""
        monitor = self._monitor
        if monitor is None or not self._observed or _is_power_of_4(self._observed):
            return None
        return monitor.weight_octaves() if monitor.is_observing or not monitor.is_shared else None

    def _latest_record(self, trainer: Trainer) -> StepRecord:
        """That of the batch, which may have stepped more than once."""
        records, self._records = self._records, []
        self.latest = {name: figures for each in records for name, figures in each.layers.items()}
        self.latest_model = records[0].model
        if len(records) > 1:
            self.latest_model = model_figures([*self.latest.values()])
        self.latest_step = _logged_step(trainer)
        return StepRecord(
            records[-1].index,
            self.latest,
            self.latest_model,
            sum(each.own_seconds for each in records),
            sum(each.training_seconds for each in records),
        )

    def _folder_of_run(self, trainer: Trainer) -> Path | None:
        """Of the run file; every process has to ask for it, or those that do wait for ever."""
        if not self._output_settings.run_file or getattr(trainer, "fast_dev_run", False):
            return None
        return Path(trainer.log_dir or trainer.default_root_dir)

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reasons = [self._make_monitor(trainer, pl_module)]
        self._optimizers = [*trainer.optimizers]  # those before were held: state goes with them
        if self._monitor is not None:
            try:
                reasons = [self._attach_to(trainer, optimizer) for optimizer in trainer.optimizers]
            except LostRankError as error:  # nobody is waited for twice: training waits elsewhere
                self._tell(f"does not observe this run: {error}")
                self._detach(alone=True)
                return
        for reason in filter(None, reasons):
            self._tell(f"does not observe this run, or a part of it: {reason}")
        if None not in reasons:
            self._detach()

    def _make_monitor(self, trainer: Trainer, pl_module: LightningModule) -> str | None:
        """Make it, or return why there can be none."""
        self._end_monitor()  # its optimizers were replaced
        if refused := refused_strategy(trainer):
            return refused
        if next(pl_module.parameters(), None) is None:
            return "there is no parameter to observe in the module"
        self._monitor = UpdateMonitor(
            pl_module,
            self._keep,
            every_n_steps=self._is_due,
            sampling=self._sampling,
            tell=self._tell,
            **self._settings,
        )
        if self._state is not None:
            self._monitor.load_state_dict(self._state)
        if self._output is not None:
            self._output.monitor = self._monitor
        self.skipped = self._monitor.skipped
        return None

    def _attach_to(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> str | None:
        """Why it cannot be observed."""
        assert self._monitor is not None
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        try:
            self._monitor.attach(optimizer, scaler=scaler)
        except (TypeError, ValueError) as error:
            return str(error)
        return None

    @contextmanager
    def _stopping_after_a_fault(self) -> Iterator[None]:
        try:
            yield
        except Exception as fault:
            if self._settings["strict"]:
                raise
            self._stop(f"stops observing after a fault: {fault!r}")

    def _stop(self, why: str) -> None:
        """Observe no more; where others observe the same steps, only write no more."""
        self._tell(why)
        if self._monitor is not None and self._monitor.is_shared:
            self._end_output()
        else:
            self._detach()

    def _detach(self, *, alone: bool = False) -> None:
        """Observe no more; `alone` where other processes may not do the same now."""
        self._end_monitor(alone=alone)
        self._end_output()
        self._resumed_from = None
        self._trainer = None
        self._optimizers = []
        self._records = []

    def _end_output(self) -> None:
        output, self._output = self._output, None
        if output is not None:
            self._output_state = output.state_dict()
            self._assessment = output.assessment()
            output.close()

    def _end_monitor(self, *, alone: bool = False) -> None:
        """What it learnt stays, unless all processes would have to be asked."""
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            monitor.detach()
            self._state = None if alone and monitor.is_shared else self._state_of(monitor)

    def _state_of(self, monitor: UpdateMonitor) -> dict[str, Any] | None:
        """Of an accelerator that has failed it cannot be had, which is not to hide that failure."""
        try:
            return monitor.state_dict()
        except Exception as fault:  # noqa: BLE001 - whatever it is, it is not the training's
            self._tell(f"could not save its state: {fault!r}")
            return None

    def _tell(self, message: str) -> None:
        """Warn, once in the life of this callback."""
        if self._is_first and message not in self._told:
            self._told.add(message)
            warnings.warn(f"PrecisionMonitor {message}", stacklevel=2)

    def _keep(self, record: StepRecord) -> None:
        self._records.append(record)

    def _is_due(self, _index: int) -> bool:
        if self._trainer is None or self._every == 0:
            return False
        # Tuners put their own callbacks in place of this one and step the same optimizers.
        if self not in self._trainer.callbacks:  # type: ignore[attr-defined]
            return False
        return (_logged_step(self._trainer) + 1) % self._every == 0


def _is_power_of_4(number: int) -> bool:
    return number.bit_count() == 1 and number.bit_length() % 2 == 1


def _logged_step(trainer: Trainer) -> int:
    """The step at which Lightning logs this batch.

    There is no public name for it; Lightning's own monitors use this one.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped  # noqa: SLF001


def _checked_layer_charts(layer_charts: int | Sequence[str]) -> int | tuple[str, ...]:
    expected = "expected how many layers, or a list of patterns"
    if isinstance(layer_charts, int):
        if isinstance(layer_charts, bool):
            raise TypeError(f"layer_charts={layer_charts!r}: {expected}")
        if layer_charts < 0:
            raise ValueError(f"layer_charts={layer_charts}: expected 0 or more")
        return layer_charts
    if isinstance(layer_charts, str) or not all(isinstance(each, str) for each in layer_charts):
        raise TypeError(f"layer_charts={layer_charts!r}: {expected}")
    return tuple(layer_charts)


def _with_preset(preset: str | None, chosen: dict[str, Any]) -> dict[str, Any]:
    """What the preset says, but for what is chosen otherwise than by default."""
    if preset is None:
        return chosen
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r}: expected one of {', '.join(map(repr, PRESETS))}")
    defaults = inspect.signature(PrecisionMonitor).parameters
    by_default = {name for name, value in chosen.items() if value == defaults[name].default}
    return chosen | {k: value for k, value in PRESETS[preset].items() if k in by_default}
