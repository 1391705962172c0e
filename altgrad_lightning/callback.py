"""`PrecisionMonitor`: watch a Trainer's optimizer steps and log what each format would keep."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from altgrad import DEFAULT_FORMATS, Figures, SamplingRule
from altgrad.observation import SkipReason
from altgrad.quantization import NumberFormat, Scaling
from altgrad.report import Assessment
from altgrad_lightning.notices import Notices
from altgrad_lightning.packages import Callback
from altgrad_lightning.pickles import convert_attributes
from altgrad_lightning.result import Result
from altgrad_lightning.session import Session
from altgrad_lightning.settings import (
    Settings,
    apply_preset,
    checked_formats,
    checked_layer_charts,
)
from altgrad_lightning.strategies import is_idle

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer


class PrecisionMonitor(Callback):
    """Judge number formats from an ordinary run, step by step, in every logger of the Trainer.

    An `altgrad.UpdateMonitor` as a Lightning callback: it measures the update of each observed
    optimizer step on the grid of every format. Training is not touched: no weight, gradient or
    random number changes. It is a callback of `lightning` and of `pytorch_lightning`, whichever
    are installed.

    It observes automatic and manual optimization, any number of optimizers, accumulation, clipping,
    every precision of the Trainer and compiled modules. Under DDP the first process observes; under
    ModelParallelStrategy all processes observe, and the first one writes. Skipped steps (a
    GradScaler found inf, there was no gradient, the learning rate is 0) are counted apart. Where a
    layer is stepped several times in a batch, the last step counts. Steps of tuners (learning rate
    finder, batch size scaler) are not observed. It warns once of what it cannot observe: FSDP1 and
    DeepSpeed, optimizers that step inside the backward pass or on copies of the parameters, and
    parameters that are not floating-point.

    Logged keys are ``altgrad/{metric}`` and ``altgrad/{metric}/{format}`` for the model, and these
    followed by ``/{layer}`` for a layer, at the step at which Lightning logs what the module logs.
    ``altgrad/monitor/…`` holds the share of the time that observing takes, the number of elements
    measured and the number of skipped steps. TensorBoard and wandb also get pictures and verdicts,
    at the 1st, 4th, 16th, … observed step and at the end. The figures of all layers go to the run
    file, which ``altgrad report`` reads. A logger, a picture or a file that fails is left out from
    then on, with one warning, and training goes on.

    Checkpoints hold its state: a resumed run still knows which weights have never moved.

    Args:
        formats: Formats to judge, as in `altgrad.measure`; bf16 and the two FP8 formats in use by
            default.
        every_n_steps: Observe the optimizer step of each n-th batch that steps (in manual
            optimization, of each n-th batch). None follows the Trainer's ``log_every_n_steps``,
            so that the charts have the points of the loss.
        scaling: Which elements share an amax scale, as in `altgrad.measure`; per tensor by default,
            as FP8 training does. None judges the formats unscaled.
        preset: ``"economy"`` (256 elements of a parameter, 4 charted layers, at most 1 % of the
            time), ``"standard"`` (the defaults) or ``"full"`` (all elements, 16 charted layers,
            histograms). An argument that is given another value than its default wins.
        layer_charts: The number of layers that are charted, or patterns of their names, such as
            ``["*.norm.weight"]``. A number charts the layers that keep least of their update at the
            first observed step that has figures; these stay charted. With the default of 8 and
            three formats there are fewer than 300 charts. All layers are in `latest` and in the run
            file.
        histograms: If True, TensorBoard and wandb get histograms of abs(update) / stiffness at each
            observed step, of the model and of the charted layers. They weigh more than all charts.
        run_file: If True, the figures of all layers are written to ``altgrad.jsonl`` in the run's
            log directory (Trainer.log_dir), about 3.5 kB for each layer and observed step with
            four formats. Nothing is written with ``fast_dev_run``.
        max_elements: Maximum number of elements sampled from each parameter, as in `UpdateMonitor`.
            More of them make the error of a sample smaller.
        sampling: Rules for single layers, as in `UpdateMonitor`.
        overhead_budget: The share of all time that observing may take, as in `UpdateMonitor`;
            loggers, pictures and files are not included.
        seed: The seed of the choice of elements.
        strict: If True, re-raise errors of the callback and of loggers in the training; otherwise
            warn once.

    Raises:
        ValueError: Formats are missing, unknown or equally named; `scaling` is unknown; a number is
            out of range; or, when training starts, a rule matches no layer.
        TypeError: An argument has the wrong type.
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
        chosen = apply_preset(
            preset,
            inspect.signature(PrecisionMonitor),
            max_elements=max_elements,
            layer_charts=layer_charts,
            histograms=histograms,
            overhead_budget=overhead_budget,
        )
        self._settings = Settings(
            formats=checked_formats(formats),
            every_n_steps=every_n_steps,
            scaling=scaling,
            layer_charts=checked_layer_charts(chosen["layer_charts"]),
            histograms=chosen["histograms"],
            run_file=run_file,
            max_elements=chosen["max_elements"],
            sampling=tuple(sampling),
            overhead_budget=chosen["overhead_budget"],
            seed=seed,
            strict=strict,
        )
        self._notices = Notices()
        self._result = Result()  # of the current training, or of the last one
        self._loaded: dict[str, Any] = {}  # from a checkpoint, for the training that starts next
        self._session: Session | None = None  # while it observes

    # --- what a user reads

    @property
    def formats(self) -> tuple[NumberFormat, ...]:
        """The formats that are judged."""
        return self._settings.formats

    @property
    def every_n_steps(self) -> int | None:
        """The argument `every_n_steps`."""
        return self._settings.every_n_steps

    @property
    def latest(self) -> Mapping[str, Figures]:
        """The figures of every layer at the last observed step; empty before the first."""
        return self._result.latest

    @property
    def latest_model(self) -> Figures | None:
        """The figures of the model at the last observed step; None before the first."""
        return self._result.latest_model

    @property
    def latest_step(self) -> int | None:
        """The step that the latest figures were logged at; None before the first."""
        return self._result.latest_step

    @property
    def skipped(self) -> Counter[SkipReason]:
        """The number of steps that were due and skipped, by reason."""
        return self._result.skipped

    @property
    def path(self) -> Path | None:
        """The run file; None before training starts, and without one."""
        return self._result.path

    @property
    def assessment(self) -> Assessment | None:
        """The verdicts of every layer as they stand; None before training starts."""
        return self._result.assessment if self._session is None else self._session.assessment

    # --- Lightning's hooks, in the order in which a Trainer calls them

    @property
    def state_key(self) -> str:
        """The key of its state in a checkpoint, which keeps apart callbacks with other formats."""
        names = [format.name for format in self.formats]
        key: str = self._generate_state_key(formats=names, scaling=self._settings.scaling)
        return key

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's state for `on_train_start`, as optimizers may not exist yet."""
        self._loaded = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a session, now that weights and optimizers are restored and on their device."""
        loaded = self._loaded
        self._end()
        self._result = Result(state=loaded)  # without a checkpoint a training is one of its own
        folder = self._run_folder(trainer)
        if is_idle(trainer, pl_module):
            return
        self._session = Session(
            trainer, pl_module, self, self._settings, self._notices, self._result
        )
        if not self._session.start(folder):
            self._end()

    def on_train_batch_start(self, *_: Any) -> None:
        """Attach to optimizers that another callback has replaced, before the new ones step."""
        session = self._session
        if session is None or not session.has_other_optimizers:
            return
        try:
            observes = session.attach()
        except ValueError as error:  # layers were replaced too, and a rule matches none any more
            self._stop(session, f"stops observing: {error}")
        else:
            if not observes:
                self._end()

    def on_train_batch_end(self, *_: Any) -> None:
        """Log the figures of the batch, after all of its optimizers have stepped."""
        if self._session is not None:
            with self._stopping_after_an_error(self._session):
                self._session.finish_batch()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds: the monitor's state, verdicts and the run file's path."""
        if self._session is not None:
            return self._session.state_dict()
        return self._loaded or self._result.state

    def on_train_end(self, *_: Any) -> None:
        """Log the last pictures and end the session, while weights are still on their device."""
        if self._session is not None:
            if why := self._session.why_no_step():
                self._session.say(f"observed no step: {why}")
            with self._stopping_after_an_error(self._session):
                self._session.finish()
        self._end()

    def on_exception(self, *_: Any) -> None:
        """Log what has waited and end the session, alone, as other ranks may not have failed."""
        if self._session is not None:
            self._session.flush()
        self._end(alone=True)

    def teardown(self, *_: Any, **__: Any) -> None:
        """End a session that a tuner cut short, and forget a state that no training took up."""
        self._end(alone=True)

    # --- copies and pickles

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the session: a module with this callback as hyperparameter is saved with it."""
        return {**self.__dict__, "_session": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickle, also one of version 0.1.0."""
        self.__dict__.update(convert_attributes(state))

    # --- the session

    def _run_folder(self, trainer: Trainer) -> Path | None:
        """Return where the run file goes; every rank has to ask, since `log_dir` is broadcast."""
        if not self._settings.run_file or getattr(trainer, "fast_dev_run", False):
            return None
        return Path(trainer.log_dir or trainer.default_root_dir)

    @contextmanager
    def _stopping_after_an_error(self, session: Session) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self._settings.strict:
                raise
            self._stop(session, f"stops observing after an error: {error!r}")

    def _stop(self, session: Session, why: str) -> None:
        session.say(why)
        if session.is_shared:
            session.stop_writing()  # and observe on, since the other ranks wait for this one
        else:
            self._end()

    def _end(self, *, alone: bool = False) -> None:
        """End the session, and forget a checkpoint's state that no training has taken up."""
        if self._session is not None:
            self._session.end(alone=alone)
        self._session = None
        self._loaded = {}
