"""Weights, optimizer state and random numbers end the same with and without the monitor."""

import random
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from altgrad import Figures
from altgrad_lightning import PrecisionMonitor
from tests.step_truth.lightning_modes import Compiled, InfAt2, Manual, Net, scaler, trainer


def with_dropout(make: Callable[[], Net]) -> Net:
    """Return a module with dropout, so that a random number drawn by the monitor would show."""
    module = make()
    module.dropout = nn.Dropout(0.5)
    loss = module.loss
    module.loss = lambda batch: loss(module.dropout(batch))
    return module


def train_to_the_end(
    make: Callable[[], Net], folder: Path, callbacks: list[pl.Callback], options: dict[str, Any]
) -> Any:
    pl.seed_everything(7, verbose=False)
    module = with_dropout(make)
    plugins = [plugin() for plugin in options.get("plugins", ())]
    run = trainer(folder, *callbacks, **(options | {"plugins": plugins}))
    run.fit(module)
    return {
        "weights": [p.detach() for p in module.parameters()],
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "precision": run.precision_plugin.state_dict(),
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 - the global one is the point
    }


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for key in value for leaf in leaves(value[key])]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


@pytest.mark.parametrize(
    ("make", "options"),
    [
        pytest.param(Net, {}, id="automatic"),
        pytest.param(Manual, {}, id="manual"),
        pytest.param(Net, {"accumulate_grad_batches": 4}, id="accumulation"),
        pytest.param(Net, {"precision": "bf16-mixed"}, id="bf16-mixed"),
        pytest.param(InfAt2, {"plugins": [scaler]}, id="16-mixed, inf"),
        pytest.param(partial(InfAt2, fused=True), {"plugins": [scaler]}, id="16-mixed, fused inf"),
        pytest.param(Compiled, {"gradient_clip_val": 0.1}, id="compiled, clipped"),
    ],
)
def test_a_monitored_run_ends_bit_for_bit_like_one_without_a_monitor(
    make: Callable[[], Net], options: dict[str, Any], tmp_path: Path
) -> None:
    monitor = PrecisionMonitor(every_n_steps=1)
    without = train_to_the_end(make, tmp_path, [], options)
    watched = train_to_the_end(make, tmp_path, [monitor], options)
    assert monitor.latest  # at least one step was observed
    pairs = list(zip(leaves(without), leaves(watched), strict=True))
    assert len(pairs) > 20
    assert all(same(a, b) for a, b in pairs)


def test_a_callback_that_draws_a_random_number_makes_two_runs_differ(tmp_path: Path) -> None:
    class Draws(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            torch.rand(1)

    without = train_to_the_end(Net, tmp_path, [], {})
    drawn = train_to_the_end(Net, tmp_path, [Draws()], {})
    assert not same(without["torch"], drawn["torch"])
    pairs = zip(without["weights"], drawn["weights"], strict=True)
    assert not all(same(a, b) for a, b in pairs)


class Watching(PrecisionMonitor):
    """A monitor that keeps its figures by the step at which they are logged."""

    def __init__(self) -> None:
        super().__init__("e4m3fn", every_n_steps=4)
        self.kept: dict[int, Mapping[str, Figures]] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        super().on_train_batch_end(trainer)
        if self.latest_step is not None:
            self.kept[self.latest_step] = self.latest


def test_a_resumed_run_observes_the_steps_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, first, second = Watching(), Watching(), Watching()
    trainer(tmp_path, whole, max_epochs=2).fit(Net())
    run = trainer(tmp_path, first, max_epochs=1)
    run.fit(Net())
    run.save_checkpoint(tmp_path / "last.ckpt")
    trainer(tmp_path, second, max_epochs=2).fit(Net(), ckpt_path=tmp_path / "last.ckpt")
    assert list(first.kept) + list(second.kept) == list(whole.kept) == [3, 7, 11]
    for step, figures in (first.kept | second.kept).items():
        for layer, values in whole.kept[step].items():
            assert figures[layer] == pytest.approx(values, nan_ok=True, rel=0, abs=0)


def test_a_recording_optimizer_trains_like_its_base_class(tmp_path: Path) -> None:
    modules = [Net(), Net()]
    modules[1].make = partial(torch.optim.AdamW, lr=0.01)
    for module in modules:
        trainer(tmp_path).fit(module)
    pairs = zip(*(module.parameters() for module in modules), strict=True)
    assert len(modules[0].journal.steps) == 6
    assert not modules[1].journal.steps
    assert all(torch.equal(recorded, plain) for recorded, plain in pairs)
