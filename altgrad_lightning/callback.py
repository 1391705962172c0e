"""`PrecisionMonitor`: watch a Trainer's optimizer steps and log what each format would keep."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from altgrad import DEFAULT_FORMATS, FloatFormat, OptimizerStep, StepObserver, measure
from altgrad.quantization import INPUT_DTYPES, Scaling, get_formats
from altgrad_lightning.packages import Callback

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

LayerFigures = dict[str, dict[str, float]]
"""What `altgrad.measure` returned, by layer."""

# What a charted layer shows; all of `measure` is in `PrecisionMonitor.latest`.
_CHARTED = ("update_rms", "update_weight_ratio", "unmoved_frac", "ulp_mean", "ulp_zero_frac")
_CHARTED_PER_FORMAT = (
    "kept_update_ratio",
    "stall_frac",
    "stiffness_mean",
    "grid_error_mean",
    "on_grid_frac",
    "grad_stiff_correlation",
    "grad_below_stiffness_frac",
)


class PrecisionMonitor(Callback):
    """Judge number formats from an ordinary run, step by step, in every logger of the Trainer.

    Each observed optimizer step is shown by `altgrad.StepObserver`: weights before and after, and
    the gradients as they were applied. The update that really happened is then measured on the
    grid of every format. Training is not touched: no weight, gradient or random number changes.

    Observed are automatic and manual optimization, any number of optimizers, accumulation,
    clipping, every precision of the Trainer and compiled modules, on one device; steps that were
    none (a GradScaler found inf, there was no gradient, the learning rate is 0) are counted apart.
    Where a layer is stepped several times in a batch, the last step counts. Tuners (learning rate
    finder, batch size scaler) are left alone. What it cannot observe it says once: strategies with
    more than one process, optimizers that step inside of the backward pass or on copies of the
    parameters (DeepSpeed ZeRO), and parameters that are not floating-point.

    It is a callback of `lightning` and of `pytorch_lightning`, whichever are installed.

    Logged keys are ``altgrad/{metric}/{layer}`` and ``altgrad/{metric}/{format}/{layer}``, at the
    step at which Lightning logs what the module logs.

    Args:
        formats: Formats to judge, as `FloatFormat` or by name. Defaults to bf16 and the two FP8
            formats in use.
        every_n_steps: Observe the optimizer step of each n-th batch that steps (in manual
            optimization, of each n-th batch); None follows the Trainer's ``log_every_n_steps``,
            so that the charts have the points of the loss.
        scaling: Which elements share an amax scale, as in `altgrad.quantization.compute_scale`;
            per tensor by default, as FP8 training does. None judges the formats unscaled.
        layer_charts: How many layers are charted: those that keep least of their update at the
            first observed step, fixed from then on. 8 by default, since a board of thousands of
            charts shows nothing. All layers are in `latest`.

    Attributes:
        latest: The figures of every layer at the last observed step, as `altgrad.measure` names
            them; empty before the first.
        latest_step: The step that `latest` was logged at; None before the first.
        skipped: How many steps should have been observed and were none, by reason: see
            `altgrad.StepObserver`.

    Raises:
        ValueError: No, unknown or equally named formats, a wrong scaling, or a number below 1 (0
            for `layer_charts`).
        TypeError: A number that is not an int.
    """

    def __init__(
        self,
        formats: str | FloatFormat | Sequence[str | FloatFormat] = DEFAULT_FORMATS,
        every_n_steps: int | None = None,
        *,
        scaling: Scaling | None = "tensor",
        layer_charts: int = 8,
    ) -> None:
        self.formats = get_formats(formats)
        if not self.formats:
            raise ValueError(f"formats={formats!r}: expected one or more formats")
        if every_n_steps is not None:
            _check_count("every_n_steps", every_n_steps, at_least=1)
        _check_count("layer_charts", layer_charts, at_least=0)
        # Not in the middle of a training: a wrong scaling is an error here.
        measure(torch.ones(1), torch.ones(1), formats=self.formats, scaling=scaling)
        self.every_n_steps = every_n_steps
        self.scaling = scaling
        self.layer_charts = layer_charts

        self.latest: LayerFigures = {}
        self.latest_step: int | None = None
        self.skipped: Counter[Any] = Counter()
        self._charted_layers: tuple[str, ...] | None = None
        self._trainer: Trainer | None = None  # while it observes
        self._every = 0
        self._observer: StepObserver | None = None
        self._optimizers: list[torch.optim.Optimizer] = []
        self._measured: LayerFigures = {}
        self._told: set[str] = set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._detach()
        self.latest, self.latest_step, self._charted_layers = {}, None, None
        self.skipped.clear()
        self._tell_of_dtypes(pl_module)
        self._trainer = trainer
        self._every = self.every_n_steps or getattr(trainer, "log_every_n_steps", None) or 0
        self._attach(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._trainer is not None and trainer.optimizers != self._optimizers:
            self._attach(trainer, pl_module)  # they were replaced

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if not self._measured:
            return
        self.latest, self._measured = self._measured, {}
        self.latest_step = _logged_step(trainer)
        if self._charted_layers is None:
            self._charted_layers = _worst_layers(self.latest, self.formats, self.layer_charts)
        charts = _charts_of(self.latest, self.formats, self._charted_layers)
        try:
            for logger in trainer.loggers:
                logger.log_metrics(charts, step=self.latest_step)
        except Exception as fault:  # noqa: BLE001 - whatever it is, it is not the training's
            self._tell(f"stops observing: a logger failed with {fault!r}")
            self._detach()

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        observing = self._observer is not None and self._observer.is_observing
        if observing and trainer.global_step and self.latest_step is None:
            if self._every == 0:
                why = "this Trainer logs at no step: pass every_n_steps"
            elif self.skipped:
                why = f"all were skipped, {dict(self.skipped)}"
            else:
                why = f"none fell on an observed batch (every {self._every})"
            self._tell(f"observed no step: {why}")
        self._detach()

    def on_exception(self, *_: Any) -> None:
        self._detach()

    def teardown(self, *_: Any, **__: Any) -> None:
        self._detach()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, also of a module that has it as a hyperparameter: detached."""
        nothing: dict[str, Any] = {"_trainer": None, "_observer": None, "_optimizers": []}
        return {**self.__dict__, **nothing, "_measured": {}}

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._observer is not None:
            self._observer.detach()
        self._optimizers = [*trainer.optimizers]
        reasons = [self._make_observer(trainer, pl_module)]
        if self._observer is not None:
            reasons = [self._attach_to(trainer, optimizer) for optimizer in trainer.optimizers]
        for reason in filter(None, reasons):
            self._tell(f"does not observe this run, or a part of it: {reason}")
        if None not in reasons:
            self._detach()

    def _make_observer(self, trainer: Trainer, pl_module: LightningModule) -> str | None:
        """Make it, or return why there can be none."""
        self._observer = None
        if trainer.world_size > 1:
            return f"it has {trainer.world_size} processes, and this version knows only one"
        try:
            # It reads found_inf only where nothing moved: see _measure.
            self._observer = StepObserver(
                pl_module, self._measure, self._is_due, read_found_inf=False
            )
        except ValueError as error:
            return str(error)
        self._observer.skipped = self.skipped
        return None

    def _attach_to(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> str | None:
        """Why it cannot be observed."""
        assert self._observer is not None
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        try:
            self._observer.attach(optimizer, scaler=scaler)
        except (TypeError, ValueError) as error:
            return str(error)
        return None

    def _detach(self) -> None:
        if self._observer is not None:
            self._observer.detach()
        self._observer = None
        self._trainer = None
        self._optimizers = []
        self._measured = {}

    def _tell(self, message: str) -> None:
        """Warn, once in the life of this callback."""
        if message not in self._told:
            self._told.add(message)
            warnings.warn(f"PrecisionMonitor {message}", stacklevel=2)

    def _tell_of_dtypes(self, pl_module: LightningModule) -> None:
        trained = {name: p.dtype for name, p in pl_module.named_parameters() if p.requires_grad}
        if others := [name for name, dtype in trained.items() if dtype not in INPUT_DTYPES]:
            self._tell(f"leaves out parameters of other dtypes: {others}")
        for dtype in sorted({*trained.values()} & {*INPUT_DTYPES}, key=str):
            coarse = [f.name for f in self.formats if not f.is_coarser_than(dtype)]
            if coarse:
                self._tell(
                    f"cannot judge {', '.join(coarse)} for weights already stored in {dtype}: "
                    "updates that stalled are no longer there to see, and those figures are NaN. "
                    "Read unmoved_frac"
                )

    def _is_due(self, _index: int) -> bool:
        if self._trainer is None or self._every == 0:
            return False
        # Tuners put their own callbacks in place of this one and step the same optimizers.
        if self not in self._trainer.callbacks:  # type: ignore[attr-defined]
            return False
        return (_logged_step(self._trainer) + 1) % self._every == 0

    def _measure(self, step: OptimizerStep) -> None:
        figures = {
            name: measure(before, after, gradient, self.formats, self.scaling)
            for name, before, gradient, after in zip(
                step.names, step.before, step.gradients, step.after, strict=True
            )
            if before.dtype in INPUT_DTYPES
        }
        moved = any(layer["update_rms"] > 0 for layer in figures.values())
        if not moved and step.found_inf is not None and step.found_inf.item():
            self.skipped["inf"] += 1
        else:
            self._measured |= figures


def _logged_step(trainer: Trainer) -> int:
    """The step at which Lightning logs this batch.

    There is no public name for it; Lightning's own monitors use this one.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped  # noqa: SLF001


def _check_count(name: str, value: int, *, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}: expected an int")
    if value < at_least:
        raise ValueError(f"{name}={value}: expected {at_least} or more")


def _worst_layers(
    figures: LayerFigures, formats: Sequence[FloatFormat], count: int
) -> tuple[str, ...]:
    """The layers with the lowest kept_update_ratio in any format; those without one come last."""

    def lowest_kept(layer: str) -> float:
        kept = (figures[layer][f"kept_update_ratio/{format.name}"] for format in formats)
        return min((value for value in kept if not math.isnan(value)), default=math.inf)

    return tuple(sorted(figures, key=lowest_kept)[:count])


def _charts_of(
    figures: LayerFigures, formats: Sequence[FloatFormat], layers: Sequence[str]
) -> dict[str, float]:
    """Log keys and values of the charted layers; NaN for one that took no part in this step."""
    metrics = [*_CHARTED]
    metrics += [f"{metric}/{format.name}" for metric in _CHARTED_PER_FORMAT for format in formats]
    return {
        f"altgrad/{metric}/{layer}": figures.get(layer, {}).get(metric, math.nan)
        for metric in metrics
        for layer in layers
    }
