"""`PrecisionMonitor` where each process has all of the parameters: the first one observes."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from altgrad.report import read
from altgrad_lightning import PrecisionMonitor
from tests.lightning.runs import (
    Net,
    RecordingAdamW,
    assert_are_of_last_step,
    batches,
    hooks_of,
    trainer,
)
from tests.processes import run

ACCUMULATED, CLIPPED = 2, 0.1


def fit_ddp(rank: int, folder: Path) -> dict[str, Any]:
    """Two epochs with accumulation and clipping, the second one from the checkpoint of the first;
    and what each rank knows then."""
    warnings.filterwarnings("error", message=".*(PrecisionMonitor|UpdateMonitor|StepObserver)")
    torch.manual_seed(0)
    monitor = PrecisionMonitor(every_n_steps=1, overhead_budget=0.9)
    options = {
        "strategy": "ddp",
        "devices": 2,
        "accumulate_grad_batches": ACCUMULATED,
        "gradient_clip_val": CLIPPED,
        "enable_checkpointing": True,
    }
    saving = ModelCheckpoint(folder / "saved", filename="first")
    first = trainer(folder, monitor, saving, **options)
    first.fit(Net(optimizer=RecordingAdamW), loader())
    seen = {
        "hooks": hooks_of(first),
        "latest_step": monitor.latest_step,
        "steps": first.optimizers[0].steps,
        "latest": dict(monitor.latest.get("layers.0.weight", {})),
        "path": str(monitor.path),
    }
    resumed = PrecisionMonitor(every_n_steps=1, overhead_budget=0.9)
    second = trainer(
        folder, resumed, **(options | {"max_epochs": 2, "enable_checkpointing": False})
    )
    checkpoint = str(folder / "saved" / "first.ckpt")
    second.fit(Net(optimizer=RecordingAdamW), loader(), ckpt_path=checkpoint)
    return seen | {"resumed_step": resumed.latest_step, "resumed_path": str(resumed.path)}


def loader() -> DataLoader[Any]:
    return DataLoader(batches(8).dataset, batch_size=4, shuffle=False)


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(fit_ddp, 2, tmp_path_factory.mktemp("ddp"))


def test_the_first_process_sees_the_step_as_it_was(ddp) -> None:
    first = ddp[0]
    assert len(first["steps"]) == 2
    assert first["latest_step"] == 1
    steps = [step[0] for step in first["steps"]]
    norm = math.sqrt(sum(g.square().sum().item() for _, _, g in first["steps"][-1]))
    assert norm == pytest.approx(CLIPPED, rel=1e-4)
    assert_are_of_last_step(first["latest"], steps)


def test_the_others_do_nothing_at_all(ddp) -> None:
    assert ddp[1]["latest_step"] is None
    assert ddp[1]["latest"] == {}
    assert ddp[1]["path"] == ddp[1]["resumed_path"] == "None"
    # and what the first one sees is what they have
    for mine, other in zip(ddp[0]["steps"], ddp[1]["steps"], strict=True):
        for one, two in zip(mine, other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_it_goes_on_from_a_checkpoint(ddp) -> None:
    assert ddp[0]["resumed_step"] == 3
    assert [*read(ddp[0]["path"]).steps] == [0, 1]
    assert [*read(ddp[0]["resumed_path"]).steps] == [0, 1, 2, 3]


def test_processes_that_are_spawned_get_a_copy(tmp_path: Path) -> None:
    monitor = PrecisionMonitor(every_n_steps=1)
    run = trainer(tmp_path, monitor, strategy="ddp_spawn", devices=2)
    run.fit(Net(), batches(4))
    (file,) = tmp_path.rglob("altgrad.jsonl")
    assert [*read(file).steps] == [0, 1]
