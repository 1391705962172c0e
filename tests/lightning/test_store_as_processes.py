"""`StoreAs` on several ranks: DDP stores alike, and sharded parameters are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from altgrad_lightning import StoreAs
from tests.lightning.runs import Net
from tests.lightning.storing import LOW, assert_equal, fit
from tests.processes import run


def fit_ddp(rank: int, folder: Path) -> dict[str, Any]:
    """Train two epochs, and again with a pause, and return the findings of this rank."""
    options = {"strategy": "ddp", "devices": 2, "module": Net}
    options |= {"steps": 8, "enable_checkpointing": False}
    net, _ = fit(folder, StoreAs(LOW), max_epochs=2, **options)
    _, first = fit(folder, StoreAs(LOW), **options)
    first.save_checkpoint(folder / "first.ckpt")
    callback = StoreAs(LOW)
    ckpt_path = folder / "first.ckpt"
    again, _ = fit(folder, callback, max_epochs=2, ckpt_path=ckpt_path, **options)
    return {
        "whole": net.state_dict(),
        "resumed": again.state_dict(),
        "state": callback.state_dict(),
    }


@pytest.mark.slow
def test_ranks_store_the_same_values_also_when_resumed(tmp_path: Path) -> None:
    first, second = run(fit_ddp, 2, tmp_path)
    assert_equal(second, first)
    assert_equal(first["resumed"], first["whole"])
    alone, _ = fit(tmp_path, StoreAs(LOW), steps=8, max_epochs=2)
    assert not torch.equal(alone.layers[0].weight, first["whole"]["layers.0.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_sharded_parameters_are_refused(tmp_path: Path, count: int) -> None:
    errors = run(fit_sharded, count, tmp_path, count)
    for error in errors:
        assert error.startswith("StoreAs cannot store weights under this strategy: ")
        assert error.endswith("; use DDP, or one device")


def fit_sharded(rank: int, folder: Path, count: int) -> str:
    class Sharding(Net):
        def configure_model(self) -> None:
            fully_shard(self.layers, mesh=self.device_mesh["data_parallel"])

    options = {"module": Sharding, "strategy": ModelParallelStrategy(count, 1), "devices": count}
    with pytest.raises(ValueError, match="StoreAs") as caught:
        fit(folder, StoreAs("bf16"), **options)
    return str(caught.value)
