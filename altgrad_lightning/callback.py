"""`PrecisionMonitor`: observe the optimizer steps of a Trainer and log what each format keeps.

The hooks of the callback start a `Session`, which observes, when training starts; call the session
at each batch; and end the session.

Read this file first. The next file is `session`, and `settings` checks the arguments.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from altgrad import DEFAULT_FORMATS, Figures, Recipe, SamplingRule
from altgrad.observation import SkipReason
from altgrad.output import ChartKind, check_charts, check_layer_charts, write_state
from altgrad.quantization import NumberFormat, Scaling
from altgrad.report import Assessment
from altgrad_lightning.callback_metrics import CallbackMetrics
from altgrad_lightning.handover import Handover
from altgrad_lightning.notices import Notices
from altgrad_lightning.packages import Callback
from altgrad_lightning.pickles import convert_attributes, find_own_attributes
from altgrad_lightning.result import Result
from altgrad_lightning.session import Session
from altgrad_lightning.settings import (
    Settings,
    apply_preset,
    check_formats,
    check_keys,
    check_name,
)
from altgrad_lightning.steps import find_interval
from altgrad_lightning.strategies import is_idle

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


class PrecisionMonitor(Callback):
    """A Lightning callback that judges number formats from the steps of an ordinary training.

    It tells how well each format would store the weights of each layer. `PrecisionMonitor` is an
    `altgrad.UpdateMonitor` for a Trainer of `lightning` or `pytorch_lightning`. It measures
    what each format would keep of the weight update of an observed optimizer step. Training stays
    bit-identical: weights, gradients and random numbers are only read.

    Automatic and manual optimization are observed, with any number of optimizers, accumulation,
    clipping, every precision of the Trainer and compiled modules. Under DDP the first rank
    observes. Under ModelParallelStrategy all ranks observe, and the first rank writes. If a layer
    is stepped several times in a batch, the last step counts.

    Skipped steps, those that moved no weight, are counted by reason: a GradScaler found inf, no
    gradients, learning rate 0.
    Steps of Lightning's tuners (learning rate finder, batch size scaler) are left out.

    In each training, the callback warns once of each thing that it cannot observe: FSDP1 and
    DeepSpeed, optimizers that step inside the backward pass or on copies of the parameters,
    parameters that are not floating-point.

    Logged keys:

    - ``altgrad/progress_kept/{recipe}``, ``altgrad/frozen_layers/{recipe}`` (the number of layers
      that have not moved so far), ``altgrad/lost_now`` (the share of the progress that the run
      loses as it is stored) and ``altgrad/monitor/own_share`` (of the time, for observing): the
      headline. A twin, a sample of each layer, is trained as the recipe for storing weights says.
      A format without a twin has ``altgrad/kept_update_ratio/{format}``.
    - ``altgrad/{metric}`` and ``altgrad/{metric}/{format}``: DIAG-01 to 04 of the model, and
      ``altgrad/{metric}/{layer}`` and ``altgrad/{metric}/{format}/{layer}`` of a layer that
      `layer_charts` chooses, a charted layer.
    - With ``charts="all"`` all other metrics of the model, some of the charted layers, and
      ``altgrad/monitor/…``: the number of measured elements and the number of skipped steps.

    In TensorBoard a tag is ``{group}/{metric}[/{layer}]``, and each format and recipe is a run, in
    the folder ``altgrad/{name}`` of the log folder.

    Figures are logged at the same step as the values that the module logs. TensorBoard and wandb
    also get pictures and verdicts, at the 1st, 4th, 16th, … observed step and at the end. The
    figures of all layers go to the run file, which ``altgrad report`` reads. After an error, a
    logger, picture or file is left out with one warning, and training goes on.

    Checkpoints hold the state of the callback, so that a resumed run still knows which weights have
    never moved.

    Args:
        formats: Formats to judge, as in `altgrad.measure`; by default bf16 and the FP8 formats
            e4m3fn and e5m2.
        every_n_steps: Interval between observed steps, in batches that step an optimizer (in manual
            optimization, in batches). An optimizer that does not step in a due batch is observed
            at its next step. None follows the Trainer's ``log_every_n_steps``, so that
            figures and loss are logged at the same steps.
        scaling: The elements that share an amax scale, as in `altgrad.measure`. The default
            ``"tensor"`` is customary in FP8 training. None judges the formats unscaled.
        preset: ``"economy"`` (256 elements of a layer, 4 charted layers, no twins, at most 1 % of
            the time), ``"standard"`` (the defaults) or ``"full"`` (all elements, all charts of 16
            layers, histograms). An argument with another value than its default takes precedence.
        layer_charts: The number of charted layers, or patterns of the names of layers, such as
            ``["*.norm.weight"]``. A number charts the layers that keep least of their progress at
            the first observed step with figures; up to as many join them later, from layers that
            appear later. None charts up to 8, as many as leave at most 80 charts: 4 with the
            default formats. All layers are in `latest` and in the run file.
        charts: ``"default"`` for the headline and DIAG-01 to 04, at most 80 charts with the default
            formats, or ``"all"`` for all metrics, about 490.
        histograms: If True, log histograms of abs(update) / stiffness to TensorBoard and wandb at
            each observed step, for the model and the charted layers. The stiffness is the distance
            between a format's neighbouring numbers at a weight. The histograms take more disk space
            than all charts.
        run_file: If True, write the figures of all layers to ``altgrad.jsonl`` in the log directory
            of the run (Trainer.log_dir). The file takes about 0.5 kB for each layer and observed
            step with the default formats and recipes. With ``fast_dev_run`` nothing is
            written.
        max_elements: Maximum number of elements sampled from each layer, as in `UpdateMonitor`.
            A larger sample has a smaller error.
        sampling: Rules for single layers, as in `UpdateMonitor`.
        recipes: Recipes whose twins are stepped at every step, as in `UpdateMonitor`: names, such
            as ``["bf16-sr", "bf16-true"]``, or `altgrad.Recipe` objects. None takes those that
            belong to `formats`; ``()`` steps no twin.
        twin_elements: Maximum number of elements of each layer that twins step.
        inner_optimizers: Wrappers of optimizers that only pass their steps on, perhaps with another
            learning rate: by the name of the wrapper's class, the attribute that has the optimizer
            inside, such as ``{"NoamOptimizer": "optimizer"}``. The optimizer inside is observed, so
            its step has to be all that the wrapper does to the weights.
        overhead_budget: The share of all time that observing may take, as in `UpdateMonitor`. The
            time of loggers, pictures, files and twins is not included.
        seed: Seed of the samples.
        strict: If True, re-raise errors of the callback and of loggers in the training loop;
            otherwise warn once.
        name: Name of the callback's state in checkpoints. It is needed if a Trainer has several
            callbacks with the same formats and scaling, for all but one of them.
        callback_metrics: Keys of figures of the model, such as ``"kept_update_ratio/bf16"`` or
            ``"progress_kept/bf16-sr"``, for EarlyStopping and ModelCheckpoint. They find them as
            ``altgrad/{key}``, on every rank, from the first observed step on, which is then that of
            the first batch. If a later step has no finite figure, the last one stays.
        summary: If True, print the verdicts and the path of the run file at the end of a training.
        progress_bar: If True, show in the Trainer's progress bar which share of the progress is
            kept so far: by the run itself if its weights are stored low, else by the first recipes.

    Raises:
        ValueError: Formats are missing or unknown, or two have the same name; `scaling` is unknown;
            a recipe is unknown; a number is out of range; or, when training starts, a rule matches
            no layer.
        TypeError: An argument has the wrong type.
    """

    def __init__(
        self,
        formats: str | NumberFormat | Sequence[str | NumberFormat] = DEFAULT_FORMATS,
        every_n_steps: int | None = None,
        *,
        preset: Literal["economy", "standard", "full"] | None = None,
        scaling: Scaling | None = "tensor",
        layer_charts: int | Sequence[str] | None = None,
        charts: ChartKind = "default",
        histograms: bool = False,
        run_file: bool = True,
        max_elements: int | None = 4096,
        sampling: Sequence[SamplingRule] = (),
        recipes: str | Recipe | Sequence[str | Recipe] | None = None,
        twin_elements: int = 256,
        inner_optimizers: Mapping[str, str] | None = None,
        overhead_budget: float | None = None,
        seed: int = 0,
        strict: bool = False,
        name: str | None = None,
        callback_metrics: Sequence[str] = (),
        summary: bool = True,
        progress_bar: bool = False,
    ) -> None:
        chosen = apply_preset(
            preset,
            inspect.signature(PrecisionMonitor),
            max_elements=max_elements,
            layer_charts=layer_charts,
            charts=charts,
            histograms=histograms,
            recipes=recipes,
            overhead_budget=overhead_budget,
        )
        checked = check_formats(formats)
        self._settings = Settings(
            formats=checked,
            every_n_steps=every_n_steps,
            scaling=scaling,
            layer_charts=check_layer_charts(chosen["layer_charts"]),
            charts=check_charts(chosen["charts"]),
            histograms=chosen["histograms"],
            run_file=run_file,
            max_elements=chosen["max_elements"],
            sampling=tuple(sampling),
            recipes=chosen["recipes"],
            twin_elements=twin_elements,
            inner_optimizers=dict(inner_optimizers or {}),
            overhead_budget=chosen["overhead_budget"],
            seed=seed,
            strict=strict,
            name=check_name(name),
            callback_metrics=check_keys(callback_metrics),
            summary=summary,
            progress_bar=progress_bar,
        )
        self._notices = Notices()
        self._result = Result()  # of the current training, else of the last one
        self._handover = Handover()  # from the process that trains, if that is another one
        self._loaded: dict[str, Any] = {}  # from a checkpoint, for the next training
        self._session: Session | None = None  # while a training is observed
        self._metrics: CallbackMetrics | None = None  # of the current training, on every rank

    # --- arguments and findings

    @property
    def formats(self) -> tuple[NumberFormat, ...]:
        """The number formats that are judged."""
        return self._settings.formats

    @property
    def every_n_steps(self) -> int | None:
        """The argument `every_n_steps`: the interval in batches between observed steps, or None."""
        return self._settings.every_n_steps

    @property
    def latest(self) -> Mapping[str, Figures]:
        """The figures of every layer at the last observed step, by name; empty before that step."""
        return self._findings.latest

    @property
    def latest_model(self) -> Figures | None:
        """The figures of the model at the last observed step; None before that step."""
        return self._findings.latest_model

    @property
    def latest_step(self) -> int | None:
        """The step at which `latest` and `latest_model` were logged; None before such a step."""
        return self._findings.latest_step

    @property
    def skipped(self) -> Counter[SkipReason]:
        """The number of steps that were to be observed but moved no weight, by reason."""
        return self._findings.skipped

    @property
    def path(self) -> Path | None:
        """The path of the run file; None before training starts, and if no run file is written."""
        return self._findings.path

    @property
    def assessment(self) -> Assessment | None:
        """The verdicts so far: how well each format would store each layer.

        None before training starts.
        """
        return self._findings.assessment if self._session is None else self._session.assessment

    @property
    def _findings(self) -> Result:
        """The findings of the current or last training, also of one in a child process."""
        if (passed := self._handover.take()) is not None:
            self._result = passed
        return self._result

    # --- Lightning's hooks, in the order in which a Trainer calls them

    @property
    def state_key(self) -> str:
        """The key of the callback's state in a checkpoint: formats, scaling and any `name`."""
        arguments: dict[str, Any] = {"formats": [format.name for format in self.formats]}
        arguments["scaling"] = self._settings.scaling
        if self._settings.name is not None:
            arguments["name"] = self._settings.name
        key: str = self._generate_state_key(**arguments)
        return key

    def setup(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Raise an error if another callback has the same `state_key` in checkpoints.

        Raises:
            ValueError: Another callback of the Trainer has the same `state_key`.
        """
        keys = [each.state_key for each in trainer.callbacks]  # type: ignore[attr-defined]
        if keys.count(self.state_key) > 1:
            raise ValueError(
                f"name={self._settings.name!r}: expected another name for each PrecisionMonitor "
                "with the same formats and scaling, whose states have the same key in a "
                "checkpoint; pass name=… to all but one of them"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's state for `on_train_start`, when the optimizers exist."""
        self._loaded = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to observe, now that weights and optimizers are restored and on their device."""
        loaded = self._loaded
        self._end()
        # Without a checkpoint, nothing is taken from an earlier training.
        self._result, self._notices = Result(state=loaded), Notices()
        keys, every = self._settings.callback_metrics, find_interval(trainer, self.every_n_steps)
        self._metrics = CallbackMetrics(keys, every, trainer) if keys else None
        folder = self._run_folder(trainer)
        if is_idle(trainer, pl_module):
            return
        self._session = Session(
            trainer, pl_module, self, self._settings, self._notices, self._result
        )
        if not self._session.start(folder):
            self._end()

    def on_train_batch_start(self, *_: Any) -> None:
        """Observe the new optimizers, if another callback or the module has replaced the old."""
        session = self._session
        if session is None or not session.has_other_optimizers:
            return
        try:
            observes = session.attach()
        except (
            ValueError
        ) as error:  # the layers were replaced, too, and a rule matches none of them
            self._stop(session, f"stops observing: {error}")
        else:
            if not observes:
                self._end()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Log the figures of the batch's observed steps, once all its optimizers have stepped."""
        self._finish_batch()
        if self._metrics is not None:
            waits = self._session is not None and self._session.waits
            self._metrics.pass_on(trainer, self.latest_model, waits=waits)
        if self._settings.progress_bar and self.latest_model is not None:
            # All that the bar shows, texts as well: lightning/pytorch/callbacks/progress.
            shown = cast("dict[str, Any]", trainer.progress_bar_metrics)
            shown["altgrad"] = write_state(self.latest_model)

    def state_dict(self) -> dict[str, Any]:
        """Return the monitor's state, the verdicts and the run file's path, for a checkpoint."""
        # A checkpoint may be saved before the end of the batch, by a callback that comes first.
        self._finish_batch()
        if self._session is not None:
            return self._session.state_dict()
        return self._loaded or self._findings.state

    # A Trainer refuses two callbacks with a state and the same key, and names no remedy. It takes a
    # wrapper for what it wraps, here a method without a state, and leaves the error to `setup`:
    # `is_overridden` in lightning/pytorch/utilities/model_helpers.py.
    vars(state_dict)["__wrapped__"] = Callback.state_dict

    def on_train_end(self, *_: Any) -> None:
        """Log the last pictures and stop observing, while weights are still on their device."""
        if self._session is not None:
            self._session.warn_about_unseen()
            with self._stopping_after_an_error(self._session):
                self._session.finish()
                if self._settings.summary:
                    self._session.show_summary()
        self._end()

    def on_exception(self, *arguments: Any) -> None:
        """Log what was observed before an error or Ctrl-C, without waiting for other ranks.

        After Ctrl-C the summary is printed, as at the end of the training.
        """
        if self._session is not None:
            self._session.finish_after_error()
            if any(isinstance(each, KeyboardInterrupt) for each in arguments):
                with suppress(Exception):  # or it would hide the interrupt
                    self._session.warn_about_unseen()
                    if self._settings.summary:
                        self._session.show_summary()
        self._end(alone=True)

    def teardown(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Stop observing if `on_train_end` was not called, as when a tuner interrupts a training.

        A state that was loaded from a checkpoint and not used stays for the next checkpoint. If
        Lightning has spawned this process, the findings go to the process that called it.
        """
        if self._session is None and self._loaded:
            self._result.state = self._loaded
        self._end(alone=True)
        if trainer.is_global_zero:
            self._handover.give(self._result)

    # --- copies and pickles

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for a pickle: without `Session`, Trainer and module.

        A module that has the callback as a hyperparameter is saved with a pickle of the callback.
        """
        return {**find_own_attributes(self), "_session": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the attributes from a pickle of this version or of version 0.1.0."""
        self.__dict__.update({"_handover": Handover(), **convert_attributes(state)})

    # --- the session

    def _run_folder(self, trainer: Trainer) -> Path | None:
        """Return the folder for the run file, or None if no run file is written.

        All ranks must call this method: `Trainer.log_dir` broadcasts the folder of the first rank.
        """
        if not self._settings.run_file or getattr(trainer, "fast_dev_run", False):
            return None
        return Path(trainer.log_dir or trainer.default_root_dir)

    def _finish_batch(self) -> None:
        if self._session is not None:
            with self._stopping_after_an_error(self._session):
                self._session.finish_batch()

    @contextmanager
    def _stopping_after_an_error(self, session: Session) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self._settings.strict:
                raise
            self._stop(session, f"stops observing after an error: {error!r}")

    def _stop(self, session: Session, notice: str) -> None:
        session.warn(notice)
        if session.is_shared:
            session.stop_writing()  # but observe on: the other ranks wait for this one at each step
        else:
            self._end()

    def _end(self, *, alone: bool = False) -> None:
        """Stop observing, and delete a loaded state that no training used.

        Args:
            alone: If True, do not wait for other ranks, which may still train.
        """
        if self._session is not None:
            self._session.end(alone=alone)
        self._session = None
        self._loaded = {}
