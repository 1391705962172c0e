"""`find_averages`: averages that a Trainer's callbacks keep have figures by themselves."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning import callbacks
from torch import Tensor
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from altgrad_lightning import PrecisionMonitor
from altgrad_lightning.averages import find_averages
from tests.lightning.runs import Net, batches, trainer
from tests.twins.averaging import warm_up

KINDS = ["EMAWeightAveraging", "WeightAveraging", "a callback", "a module"]


class Keeper(pl.Callback):
    """A callback of a user that keeps an average."""

    def on_fit_start(self, _: pl.Trainer, module: pl.LightningModule) -> None:
        self.model = AveragedModel(module, avg_fn=warm_up)

    def on_train_batch_end(self, _: pl.Trainer, module: pl.LightningModule, *__: Any) -> None:
        self.model.update_parameters(module)


class Validated(Net):
    """A module that is validated, for which callbacks swap their averages in."""

    def __init__(self) -> None:
        super().__init__(optimizer=AdamW)

    def validation_step(self, batch: list[Tensor], _: int) -> Tensor:
        loss: Tensor = self.layers(batch[0]).square().mean()
        return loss


class WithAverage(Net):
    """A module that has an average of a part of itself."""

    def __init__(self) -> None:
        super().__init__(optimizer=AdamW)
        self.ema = AveragedModel(self.layers, multi_avg_fn=get_ema_multi_avg_fn(0.9))

    def on_train_batch_end(self, *_: Any) -> None:
        self.ema.update_parameters(self.layers)

    def configure_optimizers(self) -> AdamW:
        return AdamW(self.layers.parameters(), lr=1e-3)


def make_run(kind: str) -> tuple[pl.LightningModule, list[pl.Callback]]:
    torch.manual_seed(0)
    if kind == "a module":
        return WithAverage(), []
    if kind == "a callback":
        return Validated(), [Keeper()]
    make = getattr(callbacks, kind, None)
    if make is None:
        pytest.skip(f"this version of Lightning has no {kind}")
    return Validated(), [make(decay=0.9) if kind.startswith("EMA") else make()]


@pytest.mark.parametrize("first", [True, False], ids=["before the average", "after it"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_average_that_a_trainer_keeps_has_figures_by_itself(
    tmp_path: Path, kind: str, first: bool, recwarn: pytest.WarningsRecorder
) -> None:
    ends = []
    for watches in (False, True):
        module, others = make_run(kind)
        monitor = PrecisionMonitor(recipes=["bf16-true"], formats=["e4m3fn"], every_n_steps=4)
        own = [monitor] if watches else []
        run = trainer(tmp_path, *(own + others if first else others + own), max_epochs=2)
        loader = batches(6)
        run.fit(module, loader, loader if kind != "a module" else None)
        ends.append([each.detach().clone() for each in module.parameters()])
    assert all(map(torch.equal, *ends))
    figures = monitor.latest["layers.0.weight"]
    assert 0 < figures["average_error/bf16-true"] < 0.1
    assert not [str(each.message) for each in recwarn if "average" in str(each.message)]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_training_has_the_figures_of_one_that_was_not_interrupted(
    tmp_path: Path,
) -> None:
    ends, path = [], None
    for number in range(2):
        folder = tmp_path / f"checkpoints {number}"
        module, others = make_run("EMAWeightAveraging")
        monitor = PrecisionMonitor(recipes=["bf16-true"], formats=["e4m3fn"], every_n_steps=3)
        keeper = callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
        settings = {"max_epochs": 2, "enable_checkpointing": True}
        run = trainer(tmp_path, monitor, *others, keeper, **settings)
        run.fit(module, batches(6), batches(6), ckpt_path=path)
        figures = monitor.latest["layers.0.weight"]
        ends.append({key: figures[key] for key in figures.twin_keys})
        path = folder / "epoch=0.ckpt"
    assert ends[0] == pytest.approx(ends[1], rel=0, abs=0, nan_ok=True)
    assert ends[0]["average_error/bf16-true"] > 0


def test_several_averages_have_numbers() -> None:
    torch.manual_seed(0)
    module, keeper = WithAverage(), Keeper()
    keeper.model = AveragedModel(module.layers)
    run = pl.Trainer(callbacks=[keeper], logger=False, enable_checkpointing=False)
    found = find_averages(run, module)
    assert found == {"average": keeper.model, "average_2": module.ema}


def test_an_average_of_something_else_is_left_out_with_a_notice(tmp_path: Path) -> None:
    module, keeper = Net(optimizer=AdamW), Keeper()
    monitor = PrecisionMonitor(recipes=["bf16-true"], formats=["e4m3fn"])

    class Other(pl.Callback):
        model = None

        def on_fit_start(self, *_: Any) -> None:
            self.model = AveragedModel(torch.nn.Linear(3, 4))

    run = trainer(tmp_path, monitor, keeper, Other())
    with pytest.warns(UserWarning, match="has no figures of the average 'average_2': averaged:"):
        run.fit(module, batches(6))
    assert "average_error/bf16-true" in monitor.latest["layers.0.weight"]
