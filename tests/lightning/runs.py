"""Small runs of a Trainer, readers of their logs, and the true figures of a last step."""

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from altgrad import DEFAULT_FORMATS, Figures, get_format, measure
from altgrad.measurement.catalogue import NOW, TWIN_METRICS
from altgrad.measurement.figures import tensor_figures
from altgrad.measurement.measurer import Measurer
from altgrad.measurement.metrics import FORMULAS, Share
from altgrad.quantization import compute_scale, effective_update, get_formats
from altgrad.quantization.format_set import FormatSet
from altgrad.quantization.scale_groups import Amaxes
from altgrad_lightning import PrecisionMonitor

Step = list[tuple[Tensor, Tensor, Tensor]]
"""The weights before, the weights after and the gradient of each layer."""
Attached = Callable[..., tuple[PrecisionMonitor, pl.Trainer, "Net"]]
"""A function that makes an observing monitor, its Trainer and its module."""


class RecordingAdamW(torch.optim.AdamW):
    """An AdamW that records weights and gradients of each step, as the truth for tests."""

    steps: list[Step]

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        taken: list[list[Tensor]] = []
        parameters = self.param_groups[0]["params"]

        def recording_closure() -> Any:
            loss = closure() if closure else None
            taken[:] = [
                [p.detach().clone(), p.grad.clone()] for p in parameters if p.grad is not None
            ]
            return loss

        result = super().step(recording_closure)
        after = [p.detach().clone() for p in parameters if p.grad is not None]
        self.steps.append([(b, a, g) for (b, g), a in zip(taken, after, strict=True)])
        return result


class Net(pl.LightningModule):
    def __init__(self, depth: int = 2, optimizer: type[torch.optim.AdamW] = torch.optim.AdamW):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(depth)), nn.LayerNorm(8))
        self.optimizer_class = optimizer

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        loss = self.layers(batch[0]).square().mean() + self.layers(batch[0]).sum()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = self.optimizer_class(self.parameters(), lr=1e-3)
        optimizer.steps = []
        return optimizer


def batches(count: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(4 * count, 8, generator=generator)), batch_size=4)


def trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    defaults = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "default_root_dir": folder,
        "logger": TensorBoardLogger(folder),
        "log_every_n_steps": 2,
        "callbacks": list(callbacks),
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**(defaults | options))


class _Around(pl.Callback):
    """A callback that opens something at the start of each batch; its `end` closes it."""

    def __init__(self, start: Callable[[contextlib.ExitStack], None]) -> None:
        self.end = _End()
        self._start = start

    def on_train_batch_start(self, *_: object) -> None:
        self._start(self.end.batch)


class _End(pl.Callback):
    def __init__(self) -> None:
        self.batch = contextlib.ExitStack()

    def on_train_batch_end(self, *_: object) -> None:
        self.batch.close()


def around(
    callbacks: Sequence[pl.Callback], start: Callable[[contextlib.ExitStack], None]
) -> list[pl.Callback]:
    """Return the callbacks between two that hold a stack of contexts during each batch."""
    first = _Around(start)
    return [first, *callbacks, first.end]


def logged(folder: str) -> dict[str, list[tuple[int, float]]]:
    """Return the scalars of a TensorBoard run by tag, those of AltGrad as ``altgrad/{key}``."""
    found = {}
    for run in ("", *(each.name for each in Path(folder).glob("altgrad/*"))):
        events = EventAccumulator(f"{folder}/altgrad/{run}" if run else folder).Reload()
        for tag in events.Tags()["scalars"]:
            steps = [(each.step, each.value) for each in events.Scalars(tag)]
            found[restore_key(tag, run)] = steps
    return found


def restore_key(tag: str, run: str) -> str:
    """Return the key of a tag of TensorBoard, given the name of the run of a format or recipe."""
    group, _, key = tag.partition("/")
    if "-AltGrad" not in group:
        return tag
    metric, slash, layer = key.partition("/")
    if metric == "monitor":
        return f"altgrad/{key}"
    if not run and metric in {*TWIN_METRICS, "frozen_layers"}:
        run = NOW
    return f"altgrad/{metric}{f'/{run}' if run else ''}{slash}{layer}"


def count_scalars(folder: str) -> int:
    """Return the number of scalars of AltGrad in all event files below a folder."""
    runs = {file.parent for file in Path(folder).rglob("events.*")}
    tags = [tag for run in runs for tag in EventAccumulator(str(run)).Reload().Tags()["scalars"]]
    return sum("-AltGrad" in tag for tag in tags)


def fit(folder: Path, monitor: PrecisionMonitor, steps: int = 6, **options: Any) -> pl.Trainer:
    torch.manual_seed(0)
    run = trainer(folder, monitor, **options)
    run.fit(Net(), batches(steps))
    return run


def count_hooks(run: pl.Trainer) -> int:
    # Private, as torch.optim.Optimizer has no public name for its hooks (torch/optim/optimizer.py).
    optimizer = run.optimizers[0]
    # torch has no public name for them
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def step_once(monitor: PrecisionMonitor, run: pl.Trainer, module: Net) -> None:
    """Step the first optimizer once, and end the batch as the Trainer does."""
    module.zero_grad()
    module.layers(torch.randn(4, 8)).square().sum().backward()
    run.optimizers[0].step()
    monitor.on_train_batch_end(run, module)


def are_gone(references: Iterable[weakref.ref[Any]]) -> bool:
    """Return True if there is at least one reference, and no referenced object is alive."""
    gc.collect()
    alive = [reference() is not None for reference in references]
    return bool(alive) and not any(alive)


# The true figures of a run's last step


def assert_last_step(figures: Figures, steps: Sequence[tuple[Tensor, ...]]) -> None:
    """Compare the figures of one layer with all its steps, each of which was observed.

    If the scale follows from the last weights alone, the figures equal those of `measure`.
    """
    measurer = Measurer(FormatSet(DEFAULT_FORMATS))
    amax = replay_amax(steps)
    row = measurer.measure_tensor(*steps[-1], Amaxes.from_groups(amax[-1]))
    assert_same(figures, tensor_figures(measurer.formats.names, row))
    if torch.equal(amax[-1], replay_amax(steps[-1:])[0]):
        assert_same(figures, measure(*steps[-1]))
    for format in measurer.formats:
        scales = [compute_scale(each, format) for each in amax]
        expected = share_never_moved(format.name, scales, steps)
        if not format.is_coarser_than(steps[0][0].dtype):
            expected = torch.nan
        assert figures[f"never_moved_frac/{format}"] == pytest.approx(
            expected, rel=0, abs=0, nan_ok=True
        )


def replay_amax(steps: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """Return the amax of each step.

    It is taken at the first step, and again after a step in which a weight exceeded it. If all
    weights before the step are 0, the weights after the step count.
    """
    amax: list[Tensor] = []
    outgrown = True
    for before, after, _ in steps:
        largest = (before if before.any() else after).float().abs().max().view(1)
        amax.append(largest if outgrown else amax[-1])
        tops = [
            format.max * compute_scale(amax[-1], format)
            for format in get_formats(DEFAULT_FORMATS)
            if format.bits < 16
        ]
        outgrown = any((before.abs() > top).any() for top in tops)
    return amax


def assert_same(figures: Figures, expected: Any) -> None:
    """Compare counts, shares and extrema exactly, and sums up to rounding."""
    twins = getattr(figures, "twin_keys", ())  # a dict, if another process has sent it
    own = [key for key in figures if key not in twins]
    keys = [key for key in own if not key.startswith("never_moved_frac")]
    assert keys == [key for key in expected if not key.startswith("never_moved_frac")]
    for key in keys:
        name = key.split("/")[0]
        exact = isinstance(FORMULAS[name], Share) or name.endswith(("_min", "_max", "_median_log2"))
        tolerance = 0 if exact else 1e-12
        assert figures[key] == pytest.approx(expected[key], rel=tolerance, abs=0, nan_ok=True), key


def share_never_moved(
    format: str, scales: Sequence[Tensor], steps: Sequence[tuple[Tensor, ...]]
) -> float:
    """Return the share of elements that moved, but of which the format kept no update."""
    unscaled = get_format(format).bits >= 16
    moved = torch.zeros_like(steps[0][0], dtype=torch.bool)
    kept = moved.clone()
    for scale, (before, after, _) in zip(scales, steps, strict=True):
        update = after.double() - before.double()
        moved |= update != 0
        kept |= effective_update(before, update, format, 1.0 if unscaled else scale) != 0
    count = moved.sum().item()
    return (count - (kept & moved).sum().item()) / count if count else torch.nan
