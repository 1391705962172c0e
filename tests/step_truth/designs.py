"""What is put to the proof: AltGrad, and two plausible designs that are wrong."""

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import pytorch_lightning as pl
from torch import Tensor, nn
from torch.optim import Optimizer

from altgrad import OptimizerStep, StepObserver
from altgrad_lightning import PrecisionMonitor
from tests.step_truth.recording import Entry, Step


class Design:
    """Observes plain loops by `watch`, Lightning's by `callback`, and keeps what it saw."""

    def __init__(self) -> None:
        self.seen: list[Step] = []

    @property
    def skipped(self) -> Counter[str]:
        """The number of skipped steps of the last run, by reason."""
        return Counter()

    def watch(self, module: nn.Module, *optimizers: Any, **options: Any) -> Any:
        raise NotImplementedError

    def callback(self) -> pl.Callback:
        raise NotImplementedError


class AltGrad(Design):
    def __init__(self) -> None:
        super().__init__()
        self.observes: StepObserver | PrecisionMonitor | None = None

    @property
    def skipped(self) -> Counter[str]:
        return Counter() if self.observes is None else self.observes.skipped

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
        self.observes = observer = StepObserver(module, self.record, strict=True)
        with observer.attach(*optimizers, **options):
            yield

    def callback(self) -> pl.Callback:
        """The monitor itself; what it measures is recorded on the way."""
        design = self

        class Recording(PrecisionMonitor):
            """Its monitors get observers that record; both hooks make monitors."""

            def on_train_start(self, *arguments: Any) -> None:
                with design.recording():
                    super().on_train_start(*arguments)

            def on_train_batch_start(self, *arguments: Any) -> None:
                with design.recording():
                    super().on_train_batch_start(*arguments)

        self.observes = Recording("e4m3fn", every_n_steps=1, scaling=None, strict=True)
        return self.observes

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Let each `UpdateMonitor` that is made meanwhile have an observer that records."""
        design = self

        class RecordingObserver(StepObserver):
            def __init__(self, module: Any, on_step: Any, *others: Any, **options: Any) -> None:
                def measure_and_record(step: OptimizerStep) -> None:
                    inf = self.skipped["inf"]
                    on_step(step)
                    if self.skipped["inf"] == inf:
                        design.record(step)

                super().__init__(module, measure_and_record, *others, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("altgrad.monitor.monitor.StepObserver", RecordingObserver)
            yield


class GradientsAfterTheStep(Design):
    """Wrong: weights in the optimizer's pre-hook, gradients in its post-hook."""

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
    """Wrong: weights and gradients in on_before_optimizer_step, weights in on_train_batch_end."""

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
