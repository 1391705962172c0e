"""A run whose file is being written, or replaced, by others goes on in a file of its own."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger

from altgrad.report import RunFile, read
from altgrad.report.records.reading import read_header
from altgrad_lightning import PrecisionMonitor
from tests.lightning.runs import Net, batches, trainer


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_two_runs_that_resume_one_checkpoint_have_a_file_each(tmp_path: Path) -> None:
    def fit(epochs: int, **options: Any) -> PrecisionMonitor:
        monitor = PrecisionMonitor(every_n_steps=1)
        kept = ModelCheckpoint(tmp_path / "kept", filename=f"{epochs}", save_top_k=-1)
        logger = TensorBoardLogger(tmp_path, "", version="")
        made = {"max_epochs": epochs, "logger": logger, "enable_checkpointing": True}
        trainer(tmp_path, monitor, kept, **made).fit(Net(), batches(2), **options)
        return monitor

    first = fit(1).path
    with RunFile.resume(first, 1, read_header(first)):  # as another process would
        with pytest.warns(UserWarning, match=r"RunFile: .*altgrad.jsonl is being written"):
            resumed = fit(2, ckpt_path=tmp_path / "kept" / "1.ckpt")
        assert resumed.path == tmp_path / "altgrad-2.jsonl"
    run = read(resumed.path)
    assert run.predecessors == [first]
    assert {2, 3} <= {*run.steps}


def test_a_run_file_that_another_file_replaces_has_a_new_path(tmp_path: Path) -> None:
    class Replacing(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            if (path := monitor.path).name == "altgrad.jsonl":
                path.with_suffix(".draft").write_text("other\n")
                path.with_suffix(".draft").replace(path)

    monitor = PrecisionMonitor(every_n_steps=1)
    with pytest.warns(UserWarning, match=r"altgrad.jsonl was deleted or replaced"):
        trainer(tmp_path, monitor, Replacing(), logger=False).fit(Net(), batches(3))
    assert monitor.path == tmp_path / "altgrad-2.jsonl"
    assert read(monitor.path).steps == (0, 1, 2)
