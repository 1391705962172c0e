"""What goes wrong beside the training: it goes on, and the user is told once."""

import math
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from altgrad.report import RunFile, RunReport, page, read
from altgrad_lightning import PrecisionMonitor
from tests.lightning.runs import Net, batches, fit, logged, trainer


class Silent(Logger):
    """As many home-made ones: it keeps what it gets, and has no directory."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    name = version = None

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, metrics))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


class In(Silent):
    """With a directory that it does not write to."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    @property
    def save_dir(self) -> str:
        return str(self.folder)


def told(folder: Path, monitor: PrecisionMonitor, **options: Any) -> list[str]:
    """What a whole run was told."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = fit(folder, monitor, **options)
    assert run.global_step == 6
    messages = [str(each.message) for each in caught]
    return [message for message in messages if message.startswith("PrecisionMonitor")]


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, of which 8 kB are free."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no right to mount a file system of 1 MiB")
    try:
        (folder / "other").write_bytes(bytes(2**20 - 2**13))
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(tmp_path: Path, full_disk: Path) -> None:
    logger = In(full_disk)
    monitor = PrecisionMonitor(every_n_steps=1)
    (message,) = told(tmp_path, monitor, logger=logger)
    assert "goes on without the run file" in message
    assert "No space left on device" in message
    assert len([row for _, row in logger.rows if "altgrad/stall_frac/bf16" in row]) == 6
    assert read(full_disk).notes == []  # what is there is whole
    with pytest.raises(OSError, match="No space left"):
        fit(tmp_path, PrecisionMonitor(every_n_steps=1, strict=True), logger=In(full_disk))


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    logger = In(tmp_path / "file" / "folder")
    monitor = PrecisionMonitor(every_n_steps=1)
    (message,) = told(tmp_path, monitor, logger=logger)
    assert "goes on without a run file in" in message
    assert monitor.path is None
    assert len(logger.rows) >= 6
    with pytest.raises(OSError, match="file"):
        fit(tmp_path, PrecisionMonitor(strict=True), logger=In(tmp_path / "file" / "folder"))


def test_a_logger_without_a_directory(tmp_path: Path) -> None:
    logger = Silent()
    monitor = PrecisionMonitor()
    assert told(tmp_path, monitor, logger=logger) == []
    assert monitor.path == tmp_path / "altgrad.jsonl"
    steps = [step for step, row in logger.rows if "altgrad/stall_frac/bf16" in row]
    assert steps == [1, 3, 5]


@pytest.mark.parametrize("strict", [False, True])
def test_pictures_that_cannot_be_drawn(tmp_path: Path, monkeypatch: Any, strict: bool) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no font")

    monkeypatch.setattr("altgrad_lightning.output.ranges", broken)
    monitor = PrecisionMonitor(every_n_steps=1, strict=strict)
    if strict:
        with pytest.raises(RuntimeError, match="no font"):
            fit(tmp_path, monitor)
        return
    (message,) = told(tmp_path, monitor)
    assert "goes on without pictures, which failed: RuntimeError('no font')" in message
    assert read(monitor.path).steps == (*range(6),)


class Named(pl.LightningModule):
    """Layers of any name."""

    def __init__(self, names: list[str], size: int = 4) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.ones(size)))

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        loss = torch.stack([p.sum() for p in self.parameters()]).sum()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def test_a_layer_of_any_name(tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>", "a/b", "ü [red]", "line\nbreak", "%s {x} |"]
    monitor = PrecisionMonitor(every_n_steps=1)
    run = trainer(tmp_path, monitor)
    run.fit(Named(names), batches(3))
    assert [*monitor.latest] == names
    assert [*read(monitor.path).layers] == names
    html = page(RunReport.of(read(monitor.path)))
    assert "<script>alert(1)" not in html
    tags = logged(run.logger.log_dir)
    assert all(f"altgrad/stall_frac/bf16/{name}" in tags for name in names)


@pytest.mark.slow
def test_two_thousand_layers(tmp_path: Path) -> None:
    names = [f"blocks_{k}_attention_query_key_value_weight" for k in range(2000)]
    monitor = PrecisionMonitor(every_n_steps=1)
    run = trainer(tmp_path, monitor)
    run.fit(Named(names), batches(2))
    assert len(monitor.latest) == 2000
    assert len({row.layer for row in read(monitor.path).rows}) == 2001
    events = EventAccumulator(run.logger.log_dir).Reload()
    own = [tag for tag in events.Tags()["scalars"] if tag.startswith("altgrad/")]
    assert len(own) <= 300
    assert len(events.Images("altgrad/stall_frac_map/bf16")[0].encoded_image_string) < 1_000_000
    assert len(page(RunReport.of(read(monitor.path)))) < 5_000_000


def test_nan_everywhere(tmp_path: Path) -> None:
    class Broken(Net):
        def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
            return super().training_step(batch, batch_index) * torch.nan

    monitor = PrecisionMonitor(every_n_steps=1)
    run = trainer(tmp_path, monitor)
    run.fit(Broken(), batches(3))  # a warning is an error here
    stalls = logged(run.logger.log_dir)["altgrad/stall_frac/bf16"]
    assert [step for step, _ in stalls] == [0, 1, 2]
    assert all(math.isnan(value) for _, value in stalls[1:])
    assert monitor.latest_model["nonfinite_frac"] == 1
    assert page(RunReport.of(read(monitor.path)))


def test_a_logger_that_fails_at_its_pictures_only(tmp_path: Path, monkeypatch: Any) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError("no pictures here")

    board, other = TensorBoardLogger(tmp_path), Silent()
    monkeypatch.setattr(type(board.experiment), "add_image", broken)
    messages = told(tmp_path, PrecisionMonitor(every_n_steps=1), logger=[board, other])
    assert len(messages) == 1
    assert "goes on without TensorBoardLogger, which failed: OSError" in messages[0]
    assert len([row for _, row in other.rows if "altgrad/stall_frac/bf16" in row]) == 6


def test_rows_that_wait_are_logged_where_the_training_raises(tmp_path: Path) -> None:
    """Nothing moves, so that it is not known which layers to chart."""

    class Still(Net):
        def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
            if batch_index == 3:
                raise KeyError("the user's own error")
            return 0 * super().training_step(batch, batch_index)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    logger = Silent()
    run = trainer(tmp_path, PrecisionMonitor(every_n_steps=1), logger=logger)
    with pytest.raises(KeyError, match="the user's own error"):
        run.fit(Still(), batches(6))
    steps = [step for step, row in logger.rows if "altgrad/stall_frac/bf16" in row]
    assert steps == [0, 1, 2]


@pytest.mark.parametrize("strict", [False, True])
def test_an_error_at_the_end(tmp_path: Path, monkeypatch: Any, strict: bool) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("device lost")

    closed: list[RunFile] = []
    close = RunFile.close
    monkeypatch.setattr(RunFile, "close", lambda file: (closed.append(file), close(file)))
    monkeypatch.setattr("altgrad_lightning.output.Output.finish", broken)
    monitor = PrecisionMonitor(strict=strict)
    if strict:
        with pytest.raises(RuntimeError, match="device lost"):
            fit(tmp_path, monitor)
    else:
        (message,) = told(tmp_path, monitor)
        assert "device lost" in message
    (file,) = closed
    assert file.path == monitor.path
