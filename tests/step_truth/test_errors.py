"""An error in mid-training leaves no hooks and no copies, and the next run is right."""

import gc
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from altgrad import OptimizerStep, StepObserver
from altgrad.observation.snapshots import SMALL, Snapshots
from altgrad_lightning import PrecisionMonitor
from tests.step_truth.designs import AltGrad
from tests.step_truth.lightning_modes import Net, RaisesAt, trainer
from tests.step_truth.plain_modes import batches, compute_loss, network
from tests.step_truth.recording import difference


class OwnInterrupt(BaseException):
    """An error that is no Exception, like KeyboardInterrupt, but raised only by these tests."""


class FailsInStep(SGD):
    """An SGD that fails in its third step, between two of its parameters."""

    error: type[BaseException] = MemoryError
    calls = 0

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = closure() if closure else None
        self.calls += 1
        with torch.no_grad():
            for number, parameter in enumerate(self.param_groups[0]["params"]):
                if number == 1 and self.calls == 3:
                    raise self.error
                parameter.sub_(parameter.grad, alpha=0.01)
        return loss


class Interrupted(FailsInStep):
    error = KeyboardInterrupt


@pytest.fixture
def snapshots(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Tensor]]:
    """Return references to all copies that are taken; all must be dead in the end."""
    references: list[weakref.ref[Tensor]] = []
    take = Snapshots.take

    def spying(*arguments: Any) -> Any:
        taken = take(*arguments)
        for each in taken:
            references.extend([weakref.ref(each.before), weakref.ref(each.gradient)])
        return taken

    monkeypatch.setattr(Snapshots, "take", spying)
    return references


def nothing_is_left(optimizer: Optimizer, snapshots: list[weakref.ref[Tensor]]) -> bool:
    gc.collect()
    # torch has no public name for the registered hooks.
    hooks = [*optimizer._optimizer_step_pre_hooks, *optimizer._optimizer_step_post_hooks]
    return bool(snapshots) and not hooks and not alive(snapshots)


def alive(references: list[weakref.ref[Tensor]]) -> list[Tensor]:
    return [tensor for reference in references if (tensor := reference()) is not None]


def plain(kind: type[Optimizer]) -> Net:
    """Return a module whose optimizer does not record, so that its step can fail anywhere."""
    module = Net()
    module.make = partial(kind, lr=0.01)
    return module


@pytest.mark.parametrize(
    ("make", "error"),
    [
        pytest.param(lambda: RaisesAt("training_step"), KeyError, id="in training_step"),
        pytest.param(lambda: RaisesAt("backward"), KeyError, id="in backward"),
        pytest.param(partial(plain, FailsInStep), MemoryError, id="in the optimizer"),
        pytest.param(partial(plain, Interrupted), SystemExit, id="interrupted in the optimizer"),
    ],
)
def test_an_error_in_a_fit_leaves_nothing_behind(
    make: Callable[[], Net], error: type[BaseException], tmp_path: Path, snapshots: Any
) -> None:
    design = AltGrad()
    callback = design.callback()
    run = trainer(tmp_path, callback)
    with pytest.raises(error):
        run.fit(make())
    assert len(design.seen) in (2, 3)
    assert nothing_is_left(run.optimizers[0], snapshots)

    design.seen.clear()
    module = Net()
    trainer(tmp_path, callback).fit(module)
    assert difference(design.seen, module.journal.steps) is None
    assert len(design.seen) == 6


def test_training_goes_on_after_an_error_in_the_monitor(
    tmp_path: Path, snapshots: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = PrecisionMonitor("bf16", every_n_steps=1)
    run = trainer(tmp_path, monitor)
    with monkeypatch.context() as broken:
        broken.setattr("altgrad.measurement.measurer.row_sums", lambda *_: 1 / 0)
        with pytest.warns(UserWarning, match="ZeroDivisionError.* Training goes on") as told:
            run.fit(Net())
    assert len([each for each in told if "Training goes on" in str(each.message)]) == 1
    assert run.global_step == 6
    assert nothing_is_left(run.optimizers[0], snapshots)
    trainer(tmp_path, monitor).fit(Net())
    assert monitor.latest_step == 5


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OwnInterrupt])
def test_an_error_in_on_step_leaves_nothing_behind(
    error: type[BaseException], snapshots: Any
) -> None:
    module = network()
    optimizer = SGD(module.parameters(), lr=0.01)

    def on_step(step: OptimizerStep) -> None:
        if step.index == 2:
            raise error

    def train() -> None:
        with StepObserver(module, on_step, strict=True).attach(optimizer):
            for batch in batches():
                compute_loss(module, batch).backward()
                optimizer.step()

    with pytest.raises(error):
        train()
    assert nothing_is_left(optimizer, snapshots)


def test_the_check_finds_an_attached_observer_and_a_kept_step(snapshots: Any) -> None:
    module = network()
    optimizer = SGD(module.parameters(), lr=0.01)
    kept: list[Any] = []
    observer = StepObserver(module, kept.append).attach(optimizer)
    compute_loss(module, batches()[0]).backward()
    optimizer.step()
    assert not nothing_is_left(optimizer, snapshots)  # attached
    observer.detach()
    assert not nothing_is_left(optimizer, snapshots)  # the callback kept a step
    kept.clear()
    assert nothing_is_left(optimizer, snapshots)


def test_copies_from_a_failed_step_are_dropped_before_the_next_step(snapshots: Any) -> None:
    """Check that copies are dropped although the observer stays attached and the step is not due.

    The meta device stands for an accelerator, where copies of large parameters live for one step.
    """
    parameters = [nn.Parameter(torch.empty(SMALL + 1, device="meta")) for _ in range(2)]
    for each in parameters:
        each.grad = torch.empty_like(each)
    optimizer = FailsInStep(parameters, lr=0.01)
    named = zip("ab", parameters, strict=True)
    with StepObserver(named, lambda _: None, lambda index: due.pop(0)).attach(optimizer):
        due = [True] * 3
        optimizer.step()
        optimizer.step()
        assert not alive(snapshots)
        with pytest.raises(MemoryError):
            optimizer.step()
        assert len(alive(snapshots)) == 4
        due = [False]
        optimizer.step()
        assert not alive(snapshots)
