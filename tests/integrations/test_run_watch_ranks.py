"""`altgrad.watch` on two ranks: the first one writes, whether parameters are copied or sharded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import altgrad
from altgrad.report import read
from tests.integrations.trainings import (
    FORMAT,
    RecordingAdamW,
    assert_equal,
    assert_true,
    make_model,
    train,
)
from tests.processes import run

NAMES = [name for name, _ in make_model().named_parameters()]


def describe(watched: altgrad.RunWatch, folder: str) -> dict[str, Any]:
    summary = watched.close()
    state = watched.state_dict()
    latest = watched.latest
    return {
        "layers": None if latest is None else {n: dict(f) for n, f in latest.layers.items()},
        "path": watched.path,
        "has_summary": bool(summary),
        "has_file": state["output"] is not None,
        "files": sorted(path.name for path in Path(folder).glob("*.jsonl")),
    }


def train_copies(rank: int, folder: str, is_wrapped: bool) -> dict[str, Any]:
    """Train under DDP, which is given to `watch`, or else the module inside."""
    inner = make_model()
    model = DistributedDataParallel(inner)
    optimizer = RecordingAdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(rank)
    watched = altgrad.watch(
        model if is_wrapped else inner, optimizer, folder, formats=FORMAT, recipes=()
    )
    train(model, optimizer, 10)
    return describe(watched, folder) | {"step": optimizer.steps[9]}


@pytest.mark.slow
@pytest.mark.parametrize("is_wrapped", [True, False])
def test_the_first_rank_of_ddp_observes(tmp_path: Path, is_wrapped: bool) -> None:
    first, second = run(train_copies, 2, str(tmp_path), is_wrapped)
    layers = {name.removeprefix("module."): each for name, each in first["layers"].items()}
    assert_true(layers, NAMES, first["step"])
    assert_equal([after for _, after in first["step"]], [after for _, after in second["step"]])
    assert (first["path"], second["path"]) == (tmp_path / "altgrad.jsonl", None)
    assert (first["has_summary"], second["has_summary"]) == (True, False)
    assert (second["layers"], second["has_file"]) == (None, False)
    assert first["files"] == ["altgrad.jsonl"]


def train_with(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    model.eval()  # dropout would differ from rank to rank
    torch.manual_seed(3)
    train(model, optimizer, steps)


def train_shards(_: int, folder: str) -> dict[str, Any]:
    model = fully_shard(make_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options: dict[str, Any] = {"formats": FORMAT, "recipes": (), "every_n_steps": 2}
    watched = altgrad.watch(model, optimizer, folder, **options)
    train_with(model, optimizer, 4)
    return describe(watched, folder)


@pytest.mark.slow
def test_ranks_observe_shards_together_and_the_first_one_writes(tmp_path: Path) -> None:
    first, second = run(train_shards, 2, str(tmp_path / "shards"))
    assert repr(first["layers"]) == repr(second["layers"])
    assert (first["path"], second["path"]) == (tmp_path / "shards" / "altgrad.jsonl", None)
    assert first["files"] == ["altgrad.jsonl"]
    whole = make_model()
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-3)
    watched = altgrad.watch(
        whole, optimizer, tmp_path / "whole", formats=FORMAT, recipes=(), every_n_steps=2
    )
    train_with(whole, optimizer, 4)
    watched.close()
    assert read(first["path"]).steps == read(watched.path).steps == (1, 3)
    for name, figures in watched.latest.layers.items():
        for key, value in figures.items():
            found = first["layers"][name][key]
            assert found == pytest.approx(value, rel=1e-4, nan_ok=True), (name, key)
