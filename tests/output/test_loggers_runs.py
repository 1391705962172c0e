"""`describe_runs` and names for MLflow: what tells one run, or one metric, from another."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.loggers import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from torch import Tensor, nn

from altgrad.output.charts import Row
from altgrad.output.loggers import describe_runs, log_row
from altgrad.report import read
from altgrad_lightning import PrecisionMonitor
from tests.lightning.runs import Net, batches, trainer


def test_the_run_of_a_folder_is_its_name_and_version(tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path, "board", version=3), CSVLogger(tmp_path, "table", "b")]
    assert describe_runs(loggers) == [
        {"logger": "TensorBoardLogger", "name": "board", "id": None, "version": "3"},
        {"logger": "CSVLogger", "name": "table", "id": None, "version": "b"},
    ]


def test_a_logger_that_raises_has_no_name() -> None:
    class Offline:
        version = 7

        @property
        def name(self) -> str:
            raise OSError("no network")

    described = {"logger": "Offline", "name": None, "id": None, "version": "7"}
    assert describe_runs([Offline()]) == [described]


def test_a_run_with_a_name_that_no_header_can_hold_is_trained_and_observed(tmp_path: Path) -> None:
    class Unwritable:
        """A version that cannot be written as a text."""

        def __str__(self) -> str:
            raise RuntimeError("no text")

    class Odd(Logger):
        """A logger whose name has all hyperparameters, and whose version has no text."""

        name = "width=8," * 5000
        version = Unwritable()

        def log_metrics(self, *_: Any, **__: Any) -> None:
            """Log nothing."""

        def log_hyperparams(self, *_: Any, **__: Any) -> None:
            """Log nothing."""

    monitor = PrecisionMonitor("bf16", every_n_steps=1, strict=True)
    run = trainer(tmp_path, monitor, logger=Odd())
    run.fit(Net(), batches(2))
    assert run.global_step == 2
    (described,) = read(monitor.path).loggers
    assert (described["logger"], described["version"]) == ("Odd", None)
    assert described["name"] == ("width=8," * 5000)[:1000]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # wandb leaves files open
def test_the_run_of_wandb_is_not_named_like_its_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger("wise-sun-3", tmp_path, project="nets", id="a1b2", offline=True)
    described = {"logger": "WandbLogger", "name": "wise-sun-3", "id": "a1b2", "version": "a1b2"}
    assert describe_runs([logger]) == [described]
    wandb.finish()


def test_the_run_of_mlflow_has_its_own_name(tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("nets", run_name="wise-sun-3", tracking_uri=f"file:{tmp_path / 'store'}")
    (described,) = describe_runs([logger])
    assert described["name"] == "wise-sun-3"
    assert described["id"] == described["version"] == logger.run_id


def test_the_files_of_a_sweep_in_one_folder_name_their_runs(tmp_path: Path) -> None:
    for version in ("first", "second"):
        monitor = PrecisionMonitor("bf16")
        logger = CSVLogger(tmp_path / "logs", "nets", version)
        run = trainer(tmp_path, monitor, logger=logger)
        # Such as WandbLogger, whose folder is the same for each run.
        monkey = pytest.MonkeyPatch()
        monkey.setattr(type(run), "log_dir", property(lambda _: str(tmp_path)))
        run.fit(Net(), batches(2))
        monkey.undo()
    found = [read(tmp_path / name).loggers[0] for name in ("altgrad.jsonl", "altgrad-2.jsonl")]
    assert [(each["name"], each["version"]) for each in found] == [
        ("nets", "first"),
        ("nets", "second"),
    ]


# --- names for MLflow


class Odd(Net):
    """A net with names of layers that MLflow does not allow."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("gain[0]", "gain(0)", "größe"):
            self.register_parameter(name, nn.Parameter(torch.ones(3)))

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        loss: Tensor = super().training_step(batch, batch_index)
        return loss + sum(each.sum() for name, each in self.named_parameters() if "." not in name)


def test_mlflow_gets_names_that_it_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("test", tracking_uri=f"file:{tmp_path / 'store'}")
    run = trainer(
        tmp_path, PrecisionMonitor("bf16", layer_charts=["g*"], charts="all"), logger=logger
    )
    run.fit(Odd(), batches(2))  # a warning is an error here
    (folder,) = (tmp_path / "store").glob("*/*/metrics/altgrad/stall_frac/bf16")
    assert {path.name for path in folder.iterdir()} == {"gain_0_", "gain_0__2", "gr__e", "model"}


def test_names_for_mlflow_are_as_many_as_before() -> None:
    class MLFlowLogger:
        def log_metrics(self, metrics: dict[str, float], step: int) -> None:
            self.metrics = metrics

    layers = {f"w{c}{d}": {"a": float(k)} for k, c in enumerate("_[(ü/.") for d in "_]) "}
    logger = MLFlowLogger()
    log_row(logger, Row(3, {"a": 1.0}, {}, layers))
    assert len(logger.metrics) == len(layers) + 1
    assert all(re.fullmatch("[a-zA-Z0-9_/. -]+", key) for key in logger.metrics)
    assert [*logger.metrics.values()] == [1.0, *(each["a"] for each in layers.values())]
