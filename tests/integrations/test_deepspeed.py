"""DeepSpeed: ZeRO steps copies of the parameters, and is refused or told of; stage 0 is seen."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed")

# DeepSpeed changes its process for good, so that each training has one of its own.
TRAINING = """
import json, sys, deepspeed, torch
from altgrad import UpdateMonitor

stage, is_first, store = json.loads(sys.argv[1])
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # which would compile C++
deepspeed.init_distributed("gloo", False, init_method=f"file://{store}", rank=0, world_size=1)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
optimizer = torch.optim.AdamW(model.parameters())
records, told, moves = [], [], []
options = {"formats": "e4m3fn", "recipes": (), "max_elements": None, "warn": told.append}
monitor = UpdateMonitor(model, records.append, **options)

def attach():
    try:
        monitor.attach(optimizer)
    except ValueError as error:
        told.append(str(error))

def read_weights():
    if stage:  # stage 3 frees and gathers parameters, whose sizes change by that
        return torch.zeros(1)
    return torch.cat([each.detach().flatten() for each in model.parameters()])

if is_first:
    attach()
config = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": stage},
    "zero_allow_untested_optimizer": True,
}
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
if not is_first:
    attach()
for _ in range(3):
    engine.backward(engine(torch.randn(4, 8)).square().mean())
    before = read_weights()
    engine.step()
    moves.append((read_weights() - before).double().square().mean().sqrt().item())
monitor.detach()
sizes = [each.model["update_rms"] for each in records]
print("FOUND " + json.dumps([told, sizes, moves]))
"""


def train(folder: Path, stage: int, *, is_first: bool) -> Any:
    """Return the notices, the sizes of the observed updates and the true ones of a training."""
    environment = {"DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    run = subprocess.run(
        [sys.executable, "-c", TRAINING, json.dumps([stage, is_first, str(folder / "store")])],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [each for each in run.stdout.splitlines() if each.startswith("FOUND ")]
    assert lines, run.stderr
    return json.loads(lines[0].removeprefix("FOUND "))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_is_refused_after_initialize(tmp_path: Path, stage: int) -> None:
    told, sizes, _ = train(tmp_path, stage, is_first=False)
    (notice,) = told
    assert "as those of DeepSpeed ZeRO" in notice
    assert "train with fully_shard or DDP" in notice
    assert sizes == []


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_is_told_of_if_it_comes_after_attach(tmp_path: Path, stage: int) -> None:
    told, sizes, _ = train(tmp_path, stage, is_first=True)
    (notice,) = told
    assert "and steps copies of them, as in DeepSpeed ZeRO" in notice
    assert "train with fully_shard or DDP" in notice
    assert sizes == []


@pytest.mark.parametrize("is_first", [True, False])
def test_stage_0_in_float32_is_observed(tmp_path: Path, is_first: bool) -> None:
    told, sizes, moves = train(tmp_path, 0, is_first=is_first)
    assert told == []
    assert sizes == pytest.approx(moves, rel=1e-6)
