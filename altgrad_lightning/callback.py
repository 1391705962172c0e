"""`PrecisionMonitor`: watch a Trainer's optimizer steps and log what each format would keep."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from altgrad import DEFAULT_FORMATS, FloatFormat, measure
from altgrad.quantization import INPUT_DTYPES, Scaling, get_formats

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


class _Snapshot(NamedTuple):
    """A layer just before its optimizer step."""

    weights: Tensor
    gradient: Tensor


class PrecisionMonitor(Callback):
    """Judge number formats from an ordinary run, step by step, in every logger of the Trainer.

    Around each observed optimizer step the weights and the gradients, as applied, are copied; the
    update that really happened is then measured on the grid of every format. Training is not
    touched: no weight, gradient or random number changes.

    This version copies the model once per observed step and observes automatic and manual
    optimization on one device. It does not observe, and says so once, steps under a gradient
    scaler, strategies with more than one process, sparse gradients, parameters that are not
    floating-point or that the module gets during the run, and optimizers that are replaced.

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
        self._charted_layers: tuple[str, ...] | None = None
        self._trainer: Trainer | None = None  # while it observes
        self._every = 0
        self._names: dict[Tensor, str] = {}
        self._snapshots: dict[str, _Snapshot] = {}
        self._measured: LayerFigures = {}
        self._handles: list[RemovableHandle] = []
        self._told: set[str] = set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._detach()
        self.latest, self.latest_step, self._charted_layers = {}, None, None
        if reason := _cannot_observe(trainer):
            self._tell(f"does not observe this run: {reason}")
            return
        named = dict(pl_module.named_parameters())
        self._names = {p: name for name, p in named.items() if p.dtype in INPUT_DTYPES}
        if others := [n for n, p in named.items() if p.requires_grad and p not in self._names]:
            self._tell(f"leaves out parameters of other dtypes: {others}")
        self._tell_of_coarse_weights()
        self._trainer = trainer
        self._every = self.every_n_steps or getattr(trainer, "log_every_n_steps", None) or 0
        for optimizer in trainer.optimizers:
            self._handles += [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if not self._measured:
            return
        self.latest, self._measured = self._measured, {}
        self.latest_step = _logged_step(trainer)
        if self._charted_layers is None:
            self._charted_layers = _worst_layers(self.latest, self.formats, self.layer_charts)
        charts = _charts_of(self.latest, self.formats, self._charted_layers)
        for logger in trainer.loggers:
            logger.log_metrics(charts, step=self.latest_step)

    def on_train_end(self, *_: Any) -> None:
        if self._trainer is not None and self._trainer.global_step and self.latest_step is None:
            self._tell(f"observed no step: none fell on an observed batch (every {self._every})")
        self._detach()

    def on_exception(self, *_: Any) -> None:
        self._detach()

    def teardown(self, *_: Any, **__: Any) -> None:
        self._detach()

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._trainer = None
        self._names.clear()
        self._snapshots.clear()
        self._measured.clear()

    def _tell(self, message: str) -> None:
        """Warn, once in the life of this callback."""
        if message not in self._told:
            self._told.add(message)
            rank_zero_warn(f"PrecisionMonitor {message}")

    def _tell_of_coarse_weights(self) -> None:
        for dtype in sorted({p.dtype for p in self._names}, key=str):
            coarse = [f.name for f in self.formats if not f.is_coarser_than(dtype)]
            if coarse:
                self._tell(
                    f"cannot judge {', '.join(coarse)} for weights already stored in {dtype}: "
                    "updates that stalled are no longer there to see, and those figures are NaN. "
                    "Read unmoved_frac"
                )

    def _is_due(self) -> bool:
        if self._trainer is None or self._every == 0:
            return False
        return (_logged_step(self._trainer) + 1) % self._every == 0

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Copy weights and gradients once the gradients are those that will be applied.

        Lightning runs the backward pass and the clipping inside the optimizer's closure, so that
        with a closure this is after its first call, and only without one already now.
        """
        self._snapshots.clear()
        if not self._is_due():
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._take_snapshots(optimizer)
            return None

        def closure_then_snapshot() -> Any:
            loss = closure()
            if not self._snapshots:
                self._take_snapshots(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], closure_then_snapshot, *args[2:]), kwargs
        return args, {**kwargs, "closure": closure_then_snapshot}

    @torch.no_grad()
    def _take_snapshots(self, optimizer: Optimizer) -> None:
        try:
            for name, parameter in self._parameters_of(optimizer):
                gradient = parameter.grad
                if gradient is None:
                    continue
                if gradient.layout != torch.strided:
                    self._tell(f"leaves out {name}: its gradient is sparse")
                    continue
                self._snapshots[name] = _Snapshot(
                    parameter.detach().clone(), gradient.detach().clone()
                )
        except Exception as fault:  # noqa: BLE001 - whatever it is, it is not the training's
            self._stop(fault)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        snapshots, self._snapshots = self._snapshots, {}
        try:
            for name, parameter in self._parameters_of(optimizer):
                if name in snapshots:
                    weights, gradient = snapshots[name]
                    self._measured[name] = measure(
                        weights, parameter.detach(), gradient, self.formats, self.scaling
                    )
        except Exception as fault:  # noqa: BLE001 - whatever it is, it is not the training's
            self._stop(fault)

    def _parameters_of(self, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in self._names:
                    yield self._names[parameter], parameter

    def _stop(self, fault: Exception) -> None:
        """Observe no more. The hooks stay until the end: torch may be calling them just now."""
        self._trainer = None
        self._snapshots.clear()
        self._measured.clear()
        self._tell(f"stops observing after a fault of its own: {fault!r}")


def _logged_step(trainer: Trainer) -> int:
    """The step at which Lightning logs this batch.

    There is no public name for it; Lightning's own monitors use this one.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped  # noqa: SLF001


def _cannot_observe(trainer: Trainer) -> str | None:
    if trainer.world_size > 1:
        return f"it has {trainer.world_size} processes, and this version knows only one"
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        return "its gradients are scaled, and this version would not tell skipped steps apart"
    return None


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
