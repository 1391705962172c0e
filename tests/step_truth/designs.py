"""The designs under test: AltGrad, and two plausible designs that are wrong."""

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import pytorch_lightning as pl
from torch import Tensor, nn
from torch.optim import Optimizer

from altgrad import OptimizerStep, StepObserver
from altgrad.observation import StepOutcome
from altgrad_lightning import PrecisionMonitor
from tests.step_truth.recording import Entry, Step


class Design:
    """An observer that keeps each step: of plain loops by `watch`, of Lightning by `callback`."""

    def __init__(self) -> None:
        self.seen: list[Step] = []
        self.skipped: Counter[str] = Counter()

    def watch(self, module: nn.Module, *optimizers: Any, **options: Any) -> Any:
        raise NotImplementedError

    def callback(self) -> pl.Callback:
        raise NotImplementedError


class AltGrad(Design):
    def record(self, step: OptimizerStep) -> None:
        copies = zip(
            *(
                [each.clone() for each in part]
                for part in (step.before, step.gradients, step.after)
            ),
            strict=True,
        )
        entries = (Entry(*copy) for copy in copies)
        self.seen.append(dict(zip(step.names, entries, strict=True)))

    @contextmanager
    def watch(self, module: nn.Module, *optimizers: Any, **options: Any) -> Iterator[None]:
        observer = StepObserver(module, self.record, strict=True)
        self.skipped = observer.skipped
        with observer.attach(*optimizers, **options):
            yield

    def callback(self) -> pl.Callback:
        """Return a PrecisionMonitor whose measured steps are recorded."""
        design, observer = self, recording_observer(self)

        class Recording(PrecisionMonitor):
            def on_train_start(self, *arguments: Any) -> None:
                with patch("altgrad.monitor.monitor.StepObserver", observer):
                    super().on_train_start(*arguments)
                design.skipped = self.skipped

            def on_train_batch_start(self, *arguments: Any) -> None:
                with patch("altgrad.monitor.monitor.StepObserver", observer):
                    super().on_train_batch_start(*arguments)
                design.skipped = self.skipped

        monitor = Recording("e4m3fn", every_n_steps=1, scaling=None, strict=True)
        self.skipped = monitor.skipped
        return monitor


def recording_observer(design: AltGrad) -> type[StepObserver]:
    """Return an observer class that records each step once the monitor has measured it."""

    class Recording(StepObserver):
        def __init__(self, *arguments: Any, on_outcome: Any, **options: Any) -> None:
            def measure_and_record(outcome: StepOutcome) -> None:
                inf = self.skipped["inf"]
                on_outcome(outcome)
                is_step = outcome.skipped is None and self.skipped["inf"] == inf
                if is_step and outcome.step is not None:
                    design.record(outcome.step.without_resting())

            super().__init__(*arguments, on_outcome=measure_and_record, **options)

    return Recording


class GradientsAfterTheStep(Design):
    """A wrong design: it reads weights in the pre-hook and gradients in the post-hook."""

    def attach(self, module: nn.Module, *optimizers: Any, **_: Any) -> list[Any]:
        before: dict[Tensor, Tensor] = {}

        def pre(optimizer: Optimizer, *_: Any) -> None:
            for group in optimizer.param_groups:
                before.update({p: p.detach().clone() for p in group["params"]})

        def post(optimizer: Optimizer, *_: Any) -> None:
            names = {parameter: name for name, parameter in module.named_parameters()}
            step = {
                names[p]: Entry(before[p], p.grad.detach().to_dense().clone(), p.detach().clone())
                for group in optimizer.param_groups
                for p in group["params"]
                if p.grad is not None
            }
            if step:
                self.seen.append(step)

        real = [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers]
        return [o.register_step_pre_hook(pre) for o in real] + [
            o.register_step_post_hook(post) for o in real
        ]

    @contextmanager
    def watch(self, module: nn.Module, *optimizers: Any, **options: Any) -> Iterator[None]:
        handles = self.attach(module, *optimizers)
        yield
        for handle in handles:
            handle.remove()

    def callback(self) -> pl.Callback:
        design = self

        class Hooks(pl.Callback):
            handles: tuple[Any, ...] | list[Any] = ()

            def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
                self.handles = design.attach(module, *trainer.optimizers)

            def teardown(self, *_: Any, **__: Any) -> None:
                for handle in self.handles:
                    handle.remove()

        return Hooks()


class LightningHooks(Design):
    """A wrong design: it reads in on_before_optimizer_step, and in on_train_batch_end."""

    def watch(self, *_: Any, **__: Any) -> AbstractContextManager[None]:
        raise NotImplementedError("only in Lightning")

    def callback(self) -> pl.Callback:
        design = self

        class Hooks(pl.Callback):
            def __init__(self) -> None:
                self.found: list[dict[Tensor, tuple[str, Tensor, Tensor]]] = []

            def on_before_optimizer_step(
                self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Optimizer
            ) -> None:
                names = {parameter: name for name, parameter in module.named_parameters()}
                self.found.append(
                    {
                        p: (names[p], p.detach().clone(), p.grad.detach().to_dense().clone())
                        for group in optimizer.param_groups
                        for p in group["params"]
                        if p.grad is not None
                    }
                )

            def on_train_batch_end(self, *_: Any) -> None:
                for found in self.found:
                    step = {n: Entry(b, g, p.detach().clone()) for p, (n, b, g) in found.items()}
                    if step:
                        design.seen.append(step)
                self.found.clear()

        return Hooks()
