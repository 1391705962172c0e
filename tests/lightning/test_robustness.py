"""Full disks, failing loggers and odd layers: training goes on, with one warning."""

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
from tests.lightning.runs import Net, batches, count_scalars, fit, logged, trainer


class Silent(Logger):
    """A logger that keeps its rows in memory and has no directory."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    name = version = None

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, metrics))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


class WithFolder(Silent):
    """A logger with a directory, to which only the run file is written."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    @property
    def save_dir(self) -> str:
        return str(self.folder)


def collect_notices(folder: Path, monitor: PrecisionMonitor, **options: Any) -> list[str]:
    """Return the notices of a whole run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = fit(folder, monitor, **options)
    assert run.global_step == 6
    messages = [str(each.message) for each in caught]
    return [message for message in messages if message.startswith("PrecisionMonitor")]


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """Return the folder of a file system of 1 MiB, with 8 KiB free."""
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


def test_the_loggers_go_on_when_the_disk_is_full(tmp_path: Path, full_disk: Path) -> None:
    logger = WithFolder(full_disk)
    monitor = PrecisionMonitor(every_n_steps=1, charts="all")
    (message,) = collect_notices(tmp_path, monitor, logger=logger)
    assert "goes on without the run file" in message
    assert "No space left on device" in message
    assert len([row for _, row in logger.rows if "altgrad/stall_frac/bf16" in row]) == 6
    assert read(full_disk).notes == []  # every line is complete
    with pytest.raises(OSError, match="No space left"):
        fit(tmp_path, PrecisionMonitor(every_n_steps=1, strict=True), logger=WithFolder(full_disk))


def test_the_loggers_go_on_without_a_writable_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    logger = WithFolder(tmp_path / "file" / "folder")
    monitor = PrecisionMonitor(every_n_steps=1)
    (message,) = collect_notices(tmp_path, monitor, logger=logger)
    assert "goes on without a run file in" in message
    assert monitor.path is None
    assert len(logger.rows) >= 6
    with pytest.raises(OSError, match="file"):
        fit(
            tmp_path, PrecisionMonitor(strict=True), logger=WithFolder(tmp_path / "file" / "folder")
        )


def test_the_run_file_goes_to_the_root_if_the_logger_has_no_directory(tmp_path: Path) -> None:
    logger = Silent()
    monitor = PrecisionMonitor(charts="all")
    assert collect_notices(tmp_path, monitor, logger=logger) == []
    assert monitor.path == tmp_path / "altgrad.jsonl"
    steps = [step for step, row in logger.rows if "altgrad/stall_frac/bf16" in row]
    assert steps == [1, 3, 5]


@pytest.mark.pictures
@pytest.mark.parametrize("strict", [False, True])
def test_the_run_file_goes_on_if_pictures_cannot_be_drawn(
    tmp_path: Path, monkeypatch: Any, strict: bool
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no font")

    monkeypatch.setattr("altgrad.output.output.ranges", broken)
    monitor = PrecisionMonitor(every_n_steps=1, strict=strict)
    if strict:
        with pytest.raises(RuntimeError, match="no font"):
            fit(tmp_path, monitor)
        return
    (message,) = collect_notices(tmp_path, monitor)
    assert "goes on without pictures, which failed: RuntimeError('no font')" in message
    assert read(monitor.path).steps == (*range(6),)


class Named(pl.LightningModule):
    """A module with layers of given names."""

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


def test_layers_may_have_any_name(tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>", "a/b", "ü [red]", "line\nbreak", "%s {x} |"]
    monitor = PrecisionMonitor(every_n_steps=1, charts="all")
    run = trainer(tmp_path, monitor)
    run.fit(Named(names), batches(3))
    assert [*monitor.latest] == names
    assert [*read(monitor.path).layers] == names
    html = page(RunReport.from_run(read(monitor.path)))
    assert "<script>alert(1)" not in html
    tags = logged(run.logger.log_dir)
    assert all(f"altgrad/stall_frac/bf16/{name}" in tags for name in names)


@pytest.mark.slow
@pytest.mark.pictures
@pytest.mark.default_twins
def test_two_thousand_layers_make_at_most_80_scalars(tmp_path: Path) -> None:
    names = [f"blocks_{k}_attention_query_key_value_weight" for k in range(2000)]
    monitor = PrecisionMonitor(every_n_steps=1)
    run = trainer(tmp_path, monitor)
    run.fit(Named(names), batches(2))
    assert len(monitor.latest) == 2000
    assert len({row.layer for row in read(monitor.path).rows}) == 2001
    events = EventAccumulator(run.logger.log_dir).Reload()
    assert 60 < count_scalars(run.logger.log_dir) <= 80
    assert (
        len(events.Images("4-AltGrad-maps/stall_frac_map/bf16")[0].encoded_image_string) < 1_000_000
    )
    assert len(page(RunReport.from_run(read(monitor.path)))) < 5_000_000


def test_nan_in_all_weights_is_logged_without_a_warning(tmp_path: Path) -> None:
    class Broken(Net):
        def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
            return super().training_step(batch, batch_index) * torch.nan

    monitor = PrecisionMonitor(every_n_steps=1, charts="all")
    run = trainer(tmp_path, monitor)
    run.fit(Broken(), batches(3))  # a warning is an error here
    stalls = logged(run.logger.log_dir)["altgrad/stall_frac/bf16"]
    assert [step for step, _ in stalls] == [0, 1, 2]
    assert all(math.isnan(value) for _, value in stalls[1:])
    assert monitor.latest_model["nonfinite_frac"] == 1
    assert page(RunReport.from_run(read(monitor.path)))


@pytest.mark.pictures
def test_a_logger_is_dropped_after_an_error_in_its_pictures(
    tmp_path: Path, monkeypatch: Any
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError("no pictures here")

    board, other = TensorBoardLogger(tmp_path), Silent()
    monkeypatch.setattr(type(board.experiment), "add_image", broken)
    monitor = PrecisionMonitor(every_n_steps=1, charts="all")
    messages = collect_notices(tmp_path, monitor, logger=[board, other])
    assert len(messages) == 1
    assert "goes on without TensorBoardLogger, which failed: OSError" in messages[0]
    assert len([row for _, row in other.rows if "altgrad/stall_frac/bf16" in row]) == 6


def test_waiting_rows_are_logged_when_the_training_raises(tmp_path: Path) -> None:
    """No weight moves, so that the charted layers are not chosen before the error."""

    class Still(Net):
        def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
            if batch_index == 3:
                raise KeyError("the user's own error")
            return 0 * super().training_step(batch, batch_index)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    logger = Silent()
    run = trainer(tmp_path, PrecisionMonitor(every_n_steps=1, charts="all"), logger=logger)
    with pytest.raises(KeyError, match="the user's own error"):
        run.fit(Still(), batches(6))
    steps = [step for step, row in logger.rows if "altgrad/stall_frac/bf16" in row]
    assert steps == [0, 1, 2]


@pytest.mark.parametrize("strict", [False, True])
def test_the_run_file_is_closed_after_an_error_at_the_end(
    tmp_path: Path, monkeypatch: Any, strict: bool
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("device lost")

    closed: list[RunFile] = []
    close = RunFile.close
    monkeypatch.setattr(RunFile, "close", lambda file: (closed.append(file), close(file)))
    monkeypatch.setattr("altgrad.output.output.Output.finish", broken)
    monitor = PrecisionMonitor(strict=strict)
    if strict:
        with pytest.raises(RuntimeError, match="device lost"):
            fit(tmp_path, monitor)
    else:
        (message,) = collect_notices(tmp_path, monitor)
        assert "device lost" in message
    (file,) = closed
    assert file.path == monitor.path
