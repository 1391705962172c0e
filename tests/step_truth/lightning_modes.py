"""Ways to train with Lightning's Trainer, observed by PrecisionMonitor."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.tuner import Tuner
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader

from tests.step_truth.designs import Design
from tests.step_truth.modes import HOOKS, POST, Mode, Run
from tests.step_truth.plain_modes import ClosureToTheBase, batches, network
from tests.step_truth.recording import Journal


class Net(pl.LightningModule):
    """A module with automatic optimization and one recording optimizer."""

    def __init__(self, kind: type[Optimizer] = AdamW, **options: Any) -> None:
        super().__init__()
        self.net = network()
        self.journal = Journal(self)
        self.make = partial(self.journal.optimizer, kind, **({"lr": 0.01} | options))
        self.lr = 0.01  # the tuners set this attribute
        self.batch_size = 1

    def loss(self, batch: Tensor) -> Tensor:
        return self.net(batch).square().mean() + self.net(batch).sum()

    def training_step(self, batch: Tensor, index: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.loss(batch)

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())

    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader(2)


def loader(count: int = 6) -> Any:
    return DataLoader(batches(count), batch_size=None)


def trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "limit_val_batches": 0,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "callbacks": list(callbacks),
    }
    return pl.Trainer(**(defaults | options))


def fit(make: Callable[[], Net] = Net, *others: Callable[[], pl.Callback], **options: Any) -> Run:
    """Return a run of one `fit`; `others` are callbacks before the one that observes."""

    def run(design: Design, folder: Path) -> Journal:
        module = make()
        plugins = [plugin() for plugin in options.get("plugins", ())]
        callbacks = [*(other() for other in others), design.callback()]
        trainer(folder, *callbacks, **(options | {"plugins": plugins})).fit(module)
        return module.journal

    return run


def scaler() -> MixedPrecision:
    # "16-mixed" on a CPU is silently bf16 unless the scaler is given.
    scaler = torch.amp.GradScaler("cpu", init_scale=1000.0)
    return MixedPrecision("16-mixed", "cpu", scaler=scaler)


class InfAt2(Net):
    def on_after_backward(self) -> None:
        if self.trainer.fit_loop.batch_idx == 2:
            self.net[0].weight.grad[0, 0] = torch.inf


class NoneAt2(Net):
    def training_step(self, batch: Tensor, index: int) -> Any:
        return None if index == 2 else self.loss(batch)


class Manual(Net):
    """A module that steps two optimizers in turn, one of them twice in a batch."""

    def __init__(self, *, raw: bool = False) -> None:
        super().__init__(SGD, momentum=0.9)
        self.automatic_optimization = False
        self.raw = raw

    def configure_optimizers(self) -> Any:
        return self.make(self.net[0].parameters()), self.make(self.net[3].parameters())

    def training_step(self, batch: Tensor, index: int) -> None:
        first, second = self.optimizers(use_pl_optimizer=not self.raw)
        for optimizer in (first, second, first):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            nn.utils.clip_grad_norm_(self.parameters(), 0.1)
            optimizer.step()


class ManualClosures(Manual):
    def training_step(self, batch: Tensor, index: int) -> None:
        for optimizer in self.optimizers():

            def closure(optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = self.loss(batch)
                self.manual_backward(loss)
                nn.utils.clip_grad_norm_(self.parameters(), 0.1)
                return loss

            optimizer.step(closure=closure)


class ManualEdits(Net):
    """A module with manual optimization that clips in the last hook of Lightning."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, index: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 0.1)


class ManualScaler(Net):
    """A module with a GradScaler that the Trainer does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1000.0)

    def training_step(self, batch: Tensor, index: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.scaler.scale(self.loss(batch)).backward()
        if index == 2:
            self.net[0].weight.grad[0, 0] = torch.inf
        self.scaler.step(optimizer)
        self.scaler.update()


class Compiled(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend="eager")


class WarmUp(Net):
    """A module whose scheduler begins with a learning rate of 0."""

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 3))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class ClampsWeights(pl.Callback):
    """A callback that changes weights after the step, before on_train_batch_end of others."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.clamp_(-0.3, 0.3)


class ReplacesOptimizer(pl.Callback):
    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:
            trainer.strategy.optimizers = [module.configure_optimizers()]


class RaisesAt(Net):
    """A module that fails in the fourth batch."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def training_step(self, batch: Tensor, index: int) -> Any:
        if index == 3 and self.where == "training_step":
            self.fail()
        loss = self.loss(batch)
        if index == 3 and self.where == "backward":
            self.net[0].weight.register_hook(self.fail)  # the gradient that is computed last
        return loss

    def on_after_backward(self) -> None:
        if self.trainer.fit_loop.batch_idx == 3 and self.where == "after backward":
            self.fail()

    def fail(self, *_: Any) -> None:
        raise KeyError(self.where)


def nested(design: Design, folder: Path) -> Journal:
    AdamW([torch.ones(1)])  # from now on torch calls hooks around AdamW's own step
    return fit(partial(Net, ClosureToTheBase))(design, folder)


def raising(where: str) -> Run:
    def run(design: Design, folder: Path) -> Journal:
        module = RaisesAt(where)
        try:
            trainer(folder, design.callback()).fit(module)
        except KeyError:
            return module.journal
        raise AssertionError("it did not raise")

    return run


def fit_twice(design: Design, folder: Path) -> Journal:
    module, callback = Net(), design.callback()
    trainer(folder, callback).fit(module)
    trainer(folder, callback).fit(module)
    return module.journal


def resumed(design: Design, folder: Path) -> Journal:
    module = Net()
    first = trainer(folder, design.callback(), max_epochs=1)
    first.fit(module)
    first.save_checkpoint(folder / "last.ckpt")
    trainer(folder, design.callback(), max_epochs=2).fit(module, ckpt_path=folder / "last.ckpt")
    return module.journal


def tuned_before(tune: Callable[[Tuner, Net], object]) -> Run:
    """Return a run after a tuner, whose own steps do not belong to the training."""

    def run(design: Design, folder: Path) -> Journal:
        module = Net()
        runner = trainer(folder, design.callback())
        tune(Tuner(runner), module)
        module.journal.steps.clear()
        runner.fit(module)
        return module.journal

    return run


def tuned_inside(tuner: Callable[[], pl.Callback], *trained: slice) -> Run:
    """Return a run with a tuner inside `fit`; the slices select the steps of the training."""

    def run(design: Design, folder: Path) -> Journal:
        module = Net()
        trainer(folder, tuner(), design.callback(), max_epochs=len(trained)).fit(module)
        steps = module.journal.steps
        module.journal.steps = [step for part in trained for step in steps[part]]
        return module.journal

    return run


class LearningRateFinderAtEpoch1(pl.callbacks.LearningRateFinder):
    """A finder that looks for the rate again in mid-training, as in Lightning's documentation."""

    def on_fit_start(self, *_: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:
            self.lr_find(trainer, module)


def find_rate(tuner: Tuner, module: Net) -> object:
    return tuner.lr_find(module, num_training=5, min_lr=1e-3)


def scale_batch(tuner: Tuner, module: Net) -> object:
    return tuner.scale_batch_size(module, max_trials=2, steps_per_trial=2)


def compiled_net() -> Net:
    return torch.compile(Net(), backend="eager")


CLIP = {"gradient_clip_val": 0.05}
BY_VALUE = {"gradient_clip_algorithm": "value"}
VALIDATED = {"val_check_interval": 2, "limit_val_batches": 2}
INF = {"inf": 1}

fused = partial(Net, fused=True)
nesterov = partial(Net, SGD, momentum=0.9, nesterov=True, foreach=True)
adafactor = partial(Net, torch.optim.Adafactor)
lbfgs = partial(Net, torch.optim.LBFGS)
fused_inf = partial(InfAt2, fused=True)
inf_in_window = fit(InfAt2, plugins=[scaler], accumulate_grad_batches=3)
swa = partial(pl.callbacks.StochasticWeightAveraging, swa_lrs=0.01, swa_epoch_start=1)
ema = getattr(pl.callbacks, "EMAWeightAveraging", None)
find_rate_first = partial(pl.callbacks.LearningRateFinder, num_training_steps=5)
find_rate_later = partial(LearningRateFinderAtEpoch1, num_training_steps=5)
find_batch_size = partial(pl.callbacks.BatchSizeFinder, max_trials=2, steps_per_trial=2)
FIRST_6, LAST_6 = slice(6), slice(-6, None)

LIGHTNING_MODES = (
    Mode("automatic", fit(), steps=6),
    Mode("clip by norm", fit(**CLIP), steps=6, wrong=(HOOKS,)),
    Mode("clip by value", fit(**CLIP, **BY_VALUE), steps=6, wrong=(HOOKS,)),
    Mode("accumulation, partial last window", fit(accumulate_grad_batches=4), steps=2),
    Mode("bf16-mixed", fit(precision="bf16-mixed"), steps=6),
    Mode("bf16-true", fit(precision="bf16-true"), steps=6),
    Mode("64-true", fit(precision="64-true"), steps=6),
    Mode("16-mixed", fit(plugins=[scaler]), steps=6),
    Mode("16-mixed, clipped", fit(plugins=[scaler], **CLIP), steps=6, wrong=(HOOKS,)),
    Mode("16-mixed, inf", fit(InfAt2, plugins=[scaler]), 5, INF, wrong=(HOOKS,)),
    Mode("16-mixed, fused", fit(fused, plugins=[scaler]), steps=6, wrong=(HOOKS,)),
    Mode("16-mixed, fused inf", fit(fused_inf, plugins=[scaler]), 5, INF, wrong=(POST, HOOKS)),
    Mode("16-mixed, accumulated, inf", inf_in_window, 1, INF, wrong=(HOOKS,)),
    Mode("16-mixed, None loss", fit(NoneAt2, plugins=[scaler]), steps=5),
    Mode("AdamW foreach", fit(partial(Net, foreach=True)), steps=6),
    Mode("AdamW fused", fit(fused), steps=6),
    Mode("SGD nesterov foreach", fit(nesterov), steps=6, wrong=(POST,)),
    Mode("Adafactor", fit(adafactor), steps=6),
    Mode("LBFGS", fit(lbfgs), steps=6, wrong=(POST, HOOKS)),
    Mode("manual, two optimizers", fit(Manual), steps=18, wrong=(HOOKS,)),
    Mode("manual, raw optimizers", fit(partial(Manual, raw=True)), steps=18, wrong=(HOOKS,)),
    Mode("manual, closures", fit(ManualClosures), steps=12),
    Mode("manual, edited by the module's hook", fit(ManualEdits), steps=6, wrong=(HOOKS,)),
    Mode("manual, GradScaler by hand", fit(ManualScaler), steps=5, wrong=(HOOKS,)),
    Mode("None loss", fit(NoneAt2), steps=5, skipped={"no gradients": 1}),
    Mode("learning rate 0", fit(WarmUp), 5, {"learning rate 0": 1}, wrong=(POST, HOOKS)),
    Mode("compiled module", fit(Compiled), steps=6, wrong=(POST, HOOKS)),
    Mode("compiled LightningModule", fit(compiled_net), steps=6),
    Mode("a callback changes weights", fit(Net, ClampsWeights), steps=6, wrong=(HOOKS,)),
    Mode("nested super().step(closure)", nested, steps=6, wrong=(POST,)),
    Mode("optimizer replaced", fit(Net, ReplacesOptimizer, max_epochs=2), 12, wrong=(POST,)),
    Mode("exception in training_step", raising("training_step"), steps=3),
    Mode("exception in backward", raising("backward"), steps=3),
    Mode("exception after backward", raising("after backward"), steps=3),
    Mode("fast_dev_run", fit(fast_dev_run=2), steps=2),
    Mode("max_steps", fit(max_steps=4, max_epochs=-1), steps=4),
    Mode("validation in mid-epoch", fit(**VALIDATED), steps=6),
    Mode("stochastic weight averaging", fit(Net, swa, max_epochs=3), steps=18),
    Mode("moving average at validation", fit(Net, ema, **VALIDATED), steps=6),
    Mode("resumed", resumed, steps=12),
    Mode("fit twice", fit_twice, steps=12),
    Mode("rate finder before fit", tuned_before(find_rate), steps=6),
    Mode("rate finder inside fit", tuned_inside(find_rate_first, LAST_6), steps=6),
    Mode("rate finder at epoch 1", tuned_inside(find_rate_later, FIRST_6, LAST_6), steps=12),
    Mode("batch size scaler before fit", tuned_before(scale_batch), steps=6),
    Mode("batch size scaler inside fit", tuned_inside(find_batch_size, LAST_6), steps=6),
)

NOT_IN_2_4 = {
    "moving average at validation": "Lightning 2.4 has no EMAWeightAveraging",
    "rate finder inside fit": "the finder of Lightning 2.4 does not go on with the first batch",
}
"""Rows that the oldest supported Lightning cannot train, and why."""
