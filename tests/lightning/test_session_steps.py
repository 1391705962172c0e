"""`Session`: which steps of a Trainer are observed, and what is said of those that are not."""

import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from altgrad.monitor import bypass
from altgrad.observation.weight_sample import WeightSample
from altgrad.report import RunReport, read
from altgrad_lightning import PrecisionMonitor
from tests.lightning.runs import Net, batches, logged, trainer


class Manual(Net):
    """A net whose optimizers are stepped by hand."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.automatic_optimization = False

    def loss(self, batch: list[Tensor]) -> Tensor:
        return self.layers(batch[0]).square().mean() + self.layers(batch[0]).sum()

    def training_step(self, batch: list[Tensor], batch_index: int) -> None:
        self.update(batch, batch_index)

    def update(self, batch: list[Tensor], batch_index: int) -> None:
        raise NotImplementedError


class Rare(Manual):
    """Two networks: D is stepped in each batch, and G in every fifth."""

    every = 5

    def update(self, batch: list[Tensor], batch_index: int) -> None:
        for k, optimizer in enumerate(self.optimizers()):
            if k and batch_index % self.every:
                continue
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> list[Optimizer]:
        return [SGD(self.layers[k].parameters(), lr=1e-3) for k in (0, 1)]


D, G = [{f"layers.{k}.{name}" for name in ("weight", "bias")} for k in (0, 1)]


class Sam(Optimizer):
    """An optimizer of two steps with names of their own."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.base_optimizer = SGD(self.param_groups, lr=0.1)

    def first_step(self) -> None:
        """Go nowhere: the test is about names of methods."""

    def second_step(self) -> None:
        self.base_optimizer.step()


class TwoStep(Manual):
    def update(self, batch: list[Tensor], _: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch))
        optimizer.first_step()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.second_step()
        optimizer.zero_grad()

    def configure_optimizers(self) -> Optimizer:
        return Sam(self.parameters())


class InBackward(Net):
    """A net whose parameters are stepped by hooks on their gradients."""

    def configure_optimizers(self) -> Optimizer:
        self.steppers = {p: SGD([p], lr=0.1) for p in self.parameters()}

        def step(parameter: Tensor) -> None:
            self.steppers[parameter].step()
            parameter.grad = None

        for parameter in self.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        return SGD(self.parameters(), lr=0.1)


class Replaced(Net):
    def configure_optimizers(self) -> Optimizer:
        optimizer = SGD(self.parameters(), lr=0.1)

        def step(closure: Any) -> Any:
            loss = closure()
            with torch.no_grad():
                for p in self.parameters():
                    p.sub_(p.grad, alpha=0.1)
            return loss

        optimizer.step = step
        return optimizer


def train(folder: Path, monitor: pl.Callback, module: pl.LightningModule, steps: int) -> list[str]:
    """Train, and return the warnings; those of an interrupted training, too."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with suppress(SystemExit):
            trainer(folder, monitor).fit(module, batches(steps))
    return [text for each in caught if (text := str(each.message)).startswith("PrecisionMonitor")]


def find_steps(monitor: PrecisionMonitor, layer: str) -> list[int]:
    return [*read(monitor.path).series("update_rms", layer)]


def test_an_optimizer_that_misses_the_due_batches_is_observed_at_its_next_step(
    tmp_path: Path,
) -> None:
    monitor = PrecisionMonitor("bf16", every_n_steps=10)
    assert train(tmp_path, monitor, Rare(), 26) == []
    assert find_steps(monitor, "layers.0.weight") == [9, 19]
    assert find_steps(monitor, "layers.1.weight") == [10, 20]


def test_layers_without_an_observed_step_are_named_at_the_end(tmp_path: Path) -> None:
    monitor = PrecisionMonitor("bf16", every_n_steps=10)
    (notice,) = train(tmp_path, monitor, Rare(), 10)
    assert notice == (
        "PrecisionMonitor never observed layers.1.weight, layers.1.bias: no step of SGD was "
        "observed; observe more steps"
    )


def test_layers_without_an_observed_step_are_named_after_an_interrupt(tmp_path: Path) -> None:
    class Interrupted(Rare):
        def update(self, batch: list[Tensor], batch_index: int) -> None:
            super().update(batch, batch_index)
            if batch_index == 10:
                raise KeyboardInterrupt

        every = 8

    monitor = PrecisionMonitor("bf16", every_n_steps=10)
    (notice,) = train(tmp_path, monitor, Interrupted(), 20)
    assert notice.startswith("PrecisionMonitor never observed layers.1.weight, layers.1.bias: no")


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (TwoStep, r"Sam steps by first_step\(\) and second_step\(\), which call no hooks"),
        (InBackward, "hooks inside the backward pass"),
        (Replaced, r"the step\(\) of this SGD object was replaced"),
    ],
)
def test_steps_that_pass_no_hook_are_reported_with_the_reason(
    tmp_path: Path, module: type[Net], reason: str
) -> None:
    notices = train(tmp_path, PrecisionMonitor("bf16", every_n_steps=2), module(), 6)
    found = [each for each in notices if "layers.0.weight, layers.0.bias" in each]
    assert 1 <= len(found) <= 2, notices
    for each in found:
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(each)


class Forwarding(pl.Callback):
    """A callback that passes its hooks on to a monitor that the Trainer does not know."""

    def __init__(self, monitor: PrecisionMonitor) -> None:
        self.monitor = monitor

    def on_train_start(self, *arguments: Any) -> None:
        self.monitor.on_train_start(*arguments)

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.monitor.on_train_batch_end(*arguments)

    def on_train_end(self, *arguments: Any) -> None:
        self.monitor.on_train_end(*arguments)


def test_a_monitor_inside_another_callback_observes_the_same_steps(tmp_path: Path) -> None:
    monitor = PrecisionMonitor("bf16", every_n_steps=2)
    assert train(tmp_path, Forwarding(monitor), Net(), 6) == []
    assert find_steps(monitor, "layers.0.weight") == [1, 3, 5]


def test_a_monitor_inside_another_callback_ignores_the_steps_of_a_tuner(tmp_path: Path) -> None:
    monitor, module = PrecisionMonitor("bf16", every_n_steps=1), Net()
    run = trainer(tmp_path, Forwarding(monitor))
    run.fit(module, batches(1))
    monitor.on_train_start(run, module)
    for callbacks, is_due in ((run.callbacks, True), ([], False), (run.callbacks, True)):
        latest, run.callbacks = monitor.latest, callbacks
        module.layers(torch.randn(4, 8)).square().sum().backward()
        run.optimizers[0].step()
        monitor.on_train_batch_end(run, module)
        assert (monitor.latest is not latest) == is_due
    monitor.teardown(run)


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({"accumulate_grad_batches": 4}, {}),
        ({}, {"overhead_budget": 1e-9}),  # pays for the first step alone
        ({"gradient_clip_val": 1.0}, {"preset": "economy"}),
    ],
    ids=["accumulation", "budget", "economy"],
)
def test_weights_are_not_read_in_batches_that_are_not_observed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    arguments: dict[str, Any],
) -> None:
    batches_read: list[int] = []

    class Counting(WeightSample):
        def __init__(self, parameters: Mapping[str, Tensor]) -> None:
            batches_read.append(run.fit_loop.total_batch_idx)
            super().__init__(parameters)

        def find_changed(self, parameters: Mapping[str, Tensor]) -> list[str]:
            batches_read.extend([run.fit_loop.total_batch_idx] if parameters else [])
            return super().find_changed(parameters)

    monkeypatch.setattr(bypass, "WeightSample", Counting)
    monitor = PrecisionMonitor("bf16", every_n_steps=1, **arguments)
    run = trainer(tmp_path, monitor, logger=False, **options)
    run.fit(Net(), batches(12))
    assert {*batches_read} <= {-1, 11}  # as training begins and ends


@pytest.mark.parametrize("every", [1, 3])
def test_weights_that_a_callback_edits_or_swaps_give_no_warning(tmp_path: Path, every: int) -> None:
    class Editing(pl.Callback):
        @torch.no_grad()
        def on_train_batch_end(self, _: Any, module: Net, *__: Any) -> None:
            for p in module.parameters():
                p.clamp_(-0.2, 0.2)

        @torch.no_grad()
        def on_train_end(self, _: Any, module: Net) -> None:
            for p in module.parameters():
                p.mul_(0.99)  # as averaged weights that replace those of the training

    monitor = PrecisionMonitor("bf16", every_n_steps=every)
    run = trainer(tmp_path, Editing(), monitor)
    run.fit(Net(), batches(6))  # a warning would be an error
    assert monitor.latest_step == 5


def test_frozen_and_unused_layers_give_no_warning(tmp_path: Path) -> None:
    class Unused(Net):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(3, 3)
            self.layers[1].requires_grad_(False)

    monitor = PrecisionMonitor("bf16", every_n_steps=1)
    trainer(tmp_path, monitor).fit(Unused(), batches(3))
    assert monitor.latest_step == 2


# --- layers that appear later


class Unfreezing(Net):
    """A net whose first layer is frozen at first, and sampled once it is not."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.layers.insert(0, nn.Linear(8, 400))
        self.layers[1] = nn.Linear(400, 8)
        self.layers[0].requires_grad_(False)

    def configure_optimizers(self) -> Optimizer:
        return SGD([p for p in self.parameters() if p.requires_grad], lr=1e-3)

    def on_train_batch_start(self, _: Any, batch_index: int) -> None:
        if batch_index == 2:
            added = [*self.layers[0].requires_grad_(True).parameters()]
            self.trainer.optimizers[0].add_param_group({"params": added})


class Alternating(Rare):
    """A GAN whose networks are stepped in turn, and whose second one is frozen at first."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[1].requires_grad_(False)

    def update(self, batch: list[Tensor], batch_index: int) -> None:
        for k in (0, 1):
            self.layers[k].requires_grad_(batch_index % 2 == k)
        optimizer = self.optimizers()[batch_index % 2]
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


@pytest.mark.parametrize(
    ("module", "later"), [(Unfreezing, "layers.0.weight"), (Alternating, "layers.1.weight")]
)
def test_layers_that_appear_later_are_described_charted_and_judged_like_others(
    tmp_path: Path, module: type[Net], later: str
) -> None:
    monitor = PrecisionMonitor("bf16", every_n_steps=1, max_elements=300, charts="all")
    model = module()
    run = trainer(tmp_path, monitor)
    run.fit(model, batches(6))
    parameters = dict(model.named_parameters())
    found = read(monitor.path)
    assert found.layers[later].shape == parameters[later].shape
    assert found.layers[later].elements == (300 if parameters[later].numel() > 2048 else 64)
    report = RunReport.from_run(found)
    seen = {row.layer for row in found.rows} - {None}
    total = sum(parameters[name].numel() for name in seen)
    assert f" {total:,} elements in {len(seen):,} layers" in f" {report.measured}"
    assert any("sets of layers" in note for note in report.notes)
    assert f"altgrad/stall_frac/bf16/{later}" in logged(run.logger.log_dir)
    live, from_file = (
        {(a.layer, a.recipe): (a.verdict, a.reason) for a in each.advice}
        for each in (monitor.assessment, report.assessment)
    )
    assert live == from_file


# --- wrappers whose inner step is the whole step


class Noam(Optimizer):
    """A wrapper that sets the learning rate, and passes the step on."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner
        self.count = 0

    param_groups = property(lambda self: self.inner.param_groups)
    state = property(lambda self: self.inner.state)
    defaults = property(lambda self: self.inner.defaults)

    def step(self, closure: Any = None) -> Any:
        self.count += 1
        for group in self.param_groups:
            group["lr"] = 1e-3 / self.count
        return self.inner.step(closure)

    def zero_grad(self, *, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)


class Wrapped(Net):
    def configure_optimizers(self) -> Optimizer:
        return Noam(SGD(self.parameters(), lr=1e-3))


def test_a_wrapper_is_observed_by_the_optimizer_that_the_user_names(tmp_path: Path) -> None:
    monitor = PrecisionMonitor("bf16", every_n_steps=2, inner_optimizers={"Noam": "inner"})
    assert train(tmp_path, monitor, Wrapped(), 6) == []
    assert find_steps(monitor, "layers.0.weight") == [1, 3, 5]


def test_the_refusal_of_a_wrapper_says_how_a_callback_observes_it(tmp_path: Path) -> None:
    notices = train(tmp_path, PrecisionMonitor("bf16"), Wrapped(), 3)
    assert "if you pass inner_optimizers={'Noam': 'optimizer'}, with the name of its" in notices[0]
    notices = train(tmp_path, PrecisionMonitor(inner_optimizers={"Noam": "other"}), Wrapped(), 3)
    assert "inner_optimizers={'Noam': 'other'}: expected the name of the attribute" in notices[0]
