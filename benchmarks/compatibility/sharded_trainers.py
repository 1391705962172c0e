"""Rows of trainers that shard parameters: Lightning, Fabric, accelerate, Hugging Face."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW
from torch.utils.data import DataLoader

from altgrad import RunWatch, StepRecord
from altgrad.integrations import accelerate as with_accelerate, fabric as with_fabric
from altgrad_lightning import PrecisionMonitor
from benchmarks.compatibility import trainers
from benchmarks.compatibility.sharded_trial import SETTINGS, Sharded, try_sharded
from benchmarks.compatibility.trial import EXACT, Finding, RefusedError
from tests.distributed.sharded import WholeSteps
from tests.integrations.trainings import make_model, train
from tests.step_truth import lightning_modes

RANKS = 2
STEPS = 3
WATCH: dict[str, Any] = SETTINGS | {"every_n_steps": 1, "strict": True}
AS_ON_GPUS = "the code that accelerate has for GPUs, run on a CPU, where it takes DDP otherwise"

Train = Callable[[bool], Sharded]


class Recording(AdamW):
    """An AdamW that clones whole tensors around its step."""

    truth: WholeSteps

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        self.truth.before()
        super().step()
        self.truth.after()
        return loss


def make_optimizer(model: nn.Module) -> Recording:
    optimizer = Recording(model.parameters(), lr=1e-3)
    optimizer.truth = WholeSteps(model)
    return optimizer


# --- Lightning and Fabric


class Module(pl.LightningModule):
    """A module that is sharded in `configure_model`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_model()

    def configure_model(self) -> None:
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return (self.net(batch) - 1).square().mean()

    def configure_optimizers(self) -> Recording:
        self.made = make_optimizer(self)
        return self.made


class Keep(pl.Callback):
    """The records of a PrecisionMonitor, which comes before this callback."""

    def __init__(self, monitor: PrecisionMonitor) -> None:
        self.monitor = monitor
        self.records: list[StepRecord] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        layers, model = self.monitor.latest, self.monitor.latest_model
        self.records.append(StepRecord(trainer.global_step - 1, layers, model, 0.0, 0.0))


def train_lightning(is_watched: bool) -> Sharded:
    torch.manual_seed(0)
    monitor = PrecisionMonitor(run_file=False, **WATCH)
    keep = Keep(monitor)
    module = Module()
    with TemporaryDirectory() as folder:
        lightning_modes.trainer(
            Path(folder),
            *([monitor, keep] if is_watched else []),
            strategy=ModelParallelStrategy(RANKS, 1),
            devices=RANKS,
        ).fit(module, DataLoader([*torch.randn(STEPS, 4, 8)], batch_size=None))
    return Sharded(module.made.truth.steps, keep.records, [])


def train_fabric(is_watched: bool) -> Sharded:
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import ModelParallelStrategy as Strategy

    def shard(module: nn.Module, mesh: Any) -> nn.Module:
        return fully_shard(module, mesh=mesh["data_parallel"])

    strategy = Strategy(shard, data_parallel_size=RANKS, tensor_parallel_size=1)
    fabric = Fabric(accelerator="cpu", devices=RANKS, strategy=strategy)
    fabric.launch()
    model = fabric.setup_module(make_model())
    made = make_optimizer(model.module)
    optimizer = fabric.setup_optimizers(made)
    watch = partial(with_fabric.watch, fabric) if is_watched else None
    return train_loop(model, optimizer, made.truth, watch, fabric)


def train_loop(
    model: nn.Module,
    optimizer: Any,
    truth: WholeSteps,
    watch: Callable[..., RunWatch] | None,
    fabric: Any,
    prepare: Callable[..., Any] = lambda *given: given,
) -> Sharded:
    """Watch, prepare, train some steps, and keep the record of each."""
    records: list[StepRecord] = []
    with TemporaryDirectory() as folder, ExitStack() as stack:
        run = None
        if watch is not None:
            try:
                run = stack.enter_context(watch(model, optimizer, folder, **WATCH))
            except ValueError as error:
                raise RefusedError(str(error)) from error
        prepared = prepare(model, optimizer)
        for _ in range(STEPS):
            train(*prepared, 1, fabric.backward)
            records += [run.latest] if run is not None and run.latest is not None else []
    return Sharded(truth.steps, records, [])


# --- accelerate and the Trainer of Hugging Face


@contextmanager
def shard_on_cpus() -> Iterator[None]:
    """Let accelerate shard on a CPU, where it otherwise takes DDP in place of FSDP."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    begin = PartialState.__init__

    def begin_as_on_gpus(state: Any, *arguments: Any, **options: Any) -> None:
        begin(state, *arguments, **options)
        state.distributed_type = DistributedType.MULTI_GPU

    trainers.reset_accelerate()
    with patch.dict(os.environ), patch.object(PartialState, "__init__", begin_as_on_gpus):
        yield
    trainers.reset_accelerate()


def train_accelerate(is_watched: bool, *, is_first: bool) -> Sharded:
    """Train by accelerate with FSDP2; watch before `prepare` if `is_first`, and after otherwise."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    with shard_on_cpus():
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        model = make_model()
        made = make_optimizer(model)
        watch = partial(with_accelerate.watch, accelerator) if is_watched else None
        if is_first:
            return train_loop(model, made, made.truth, watch, accelerator, accelerator.prepare)
        return train_loop(*accelerator.prepare(model, made), made.truth, watch, accelerator)


def train_hugging_face(is_watched: bool) -> Sharded:
    """Train by the Trainer of Hugging Face with FSDP2."""
    from transformers import TrainerCallback

    from altgrad.integrations.transformers import PrecisionCallback
    from tests.integrations.hugging import make_trainer

    class Clones(TrainerCallback):
        """The truth, and the records: this callback comes after the one that observes."""

        def __init__(self) -> None:
            self.records: list[StepRecord] = []

        def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
            if not hasattr(self, "truth"):
                self.truth = WholeSteps(model)
            self.truth.before()

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            self.truth.after()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if observed.run is not None and observed.run.latest is not None:
                self.records.append(observed.run.latest)

    with TemporaryDirectory() as folder, shard_on_cpus():
        observed, clones = PrecisionCallback(folder, **WATCH), Clones()
        options = {"optim": "adamw_torch", "max_steps": STEPS}
        trainer = make_trainer(
            Path(folder), clones, fsdp=True, fsdp_config={"fsdp_version": 2}, **options
        )
        if is_watched:
            observed.add_to(trainer)
        trainer.train()
    return Sharded(clones.truth.steps, clones.records, [])


# --- the rows


def try_trainer(_: int, train: Train, note: str = "") -> Finding:
    """Train on a rank, and say what is special about the way if the figures are exact.

    Args:
        train: Function that trains; its argument is True if it is watched.
        note: What is special about it.

    Returns:
        What came out on this rank.
    """
    found = try_sharded(train)
    return Finding(EXACT, note) if found == Finding(EXACT) else found


WAYS: dict[str, Callable[[int], Finding]] = {
    "ModelParallelStrategy, Trainer of Lightning": partial(try_trainer, train=train_lightning),
    "ModelParallelStrategy, Fabric": partial(try_trainer, train=train_fabric),
    "FSDP2, accelerate, after `prepare`": partial(
        try_trainer, train=partial(train_accelerate, is_first=False), note=AS_ON_GPUS
    ),
    "FSDP2, accelerate, before `prepare`": partial(
        try_trainer, train=partial(train_accelerate, is_first=True), note=AS_ON_GPUS
    ),
    "FSDP2, Trainer of Hugging Face": partial(
        try_trainer, train=train_hugging_face, note=AS_ON_GPUS
    ),
}
"""A function of the rank for each way to train, by name."""
