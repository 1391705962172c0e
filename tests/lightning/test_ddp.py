"""`PrecisionMonitor` under DDP: the first rank observes, and the other ranks are idle."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from altgrad.report import judge_run, read
from altgrad_lightning import PrecisionMonitor
from tests.lightning.runs import (
    Net,
    RecordingAdamW,
    assert_last_step,
    batches,
    count_hooks,
    trainer,
)
from tests.processes import run

ACCUMULATED, CLIPPED = 2, 0.1


def fit_ddp(rank: int, folder: Path) -> dict[str, Any]:
    """Train an epoch, resume for a second one, and return the findings of this rank."""
    warnings.filterwarnings("error", message=".*(PrecisionMonitor|UpdateMonitor|StepObserver)")
    torch.manual_seed(0)
    monitor = PrecisionMonitor(every_n_steps=1, overhead_budget=0.9, recipes=())
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
        "hooks": count_hooks(first),
        "latest_step": monitor.latest_step,
        "steps": first.optimizers[0].steps,
        "latest": dict(monitor.latest.get("layers.0.weight", {})),
        "path": str(monitor.path),
    }
    resumed = PrecisionMonitor(every_n_steps=1, overhead_budget=0.9, recipes=())
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


def test_the_first_rank_has_the_figures_of_the_recorded_step(ddp) -> None:
    first = ddp[0]
    assert len(first["steps"]) == 2
    assert first["latest_step"] == 1
    steps = [step[0] for step in first["steps"]]
    norm = math.sqrt(sum(g.square().sum().item() for _, _, g in first["steps"][-1]))
    assert norm == pytest.approx(CLIPPED, rel=1e-4)
    assert_last_step(first["latest"], steps)


def test_the_other_ranks_observe_and_write_nothing(ddp) -> None:
    assert ddp[1]["latest_step"] is None
    assert ddp[1]["latest"] == {}
    assert ddp[1]["path"] == ddp[1]["resumed_path"] == "None"
    # All ranks made the same steps.
    for mine, other in zip(ddp[0]["steps"], ddp[1]["steps"], strict=True):
        for one, two in zip(mine, other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_resumed_run_goes_on_from_the_checkpoint(ddp) -> None:
    assert ddp[0]["resumed_step"] == 3
    assert [*read(ddp[0]["path"]).steps] == [0, 1]
    assert [*read(ddp[0]["resumed_path"]).steps] == [0, 1, 2, 3]


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_findings_of_spawned_ranks_are_in_the_process_that_called_fit(
    tmp_path: Path, strategy: str
) -> None:
    monitor = PrecisionMonitor(every_n_steps=1, recipes=())
    run = trainer(tmp_path, monitor, strategy=strategy, devices=2)
    run.fit(Net(), batches(4))
    (file,) = tmp_path.rglob("altgrad.jsonl")
    found = read(file)
    assert [*found.steps] == [0, 1]
    assert monitor.path == file
    assert monitor.latest_step == 1
    last = {row.layer: row.figures for row in found.rows if row.step == 1}
    assert {*monitor.latest} == {*last} - {None}
    for name, figures in monitor.latest.items():
        assert figures["update_rms"] == pytest.approx(last[name]["update_rms"], rel=1e-7)
    assert monitor.assessment.summary == judge_run(found).summary
    assert monitor.state_dict()["output"]["run_file"] == str(file)
