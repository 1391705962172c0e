"""Replicas that differ, such as experts or separate models, are found, named and left out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard as Cut

from altgrad import UpdateMonitor
from altgrad.distributed.ranks import Ranks
from altgrad.distributed.replicas import find_different_replicas
from altgrad.distributed.shards import Shard
from tests.distributed.listening import Listening
from tests.distributed.sharded import Net
from tests.distributed.training import sgd, train

SIZE = 2


def found_different(rank: int, parameters: dict[str, Tensor]) -> list[str]:
    shards = {name: Shard.read(name, each, rank) for name, each in parameters.items()}
    ranks = Ranks()
    ranks.group.meet()
    return find_different_replicas(parameters, shards.__getitem__, ranks)


def compare(rank: int) -> list[str]:
    """Compare replicas outside a mesh, on half of the ranks, and whole in a mesh."""
    shards = init_device_mesh("cpu", (2, 2))
    odd = torch.tensor([torch.nan, torch.inf, 1.0])
    parameters: dict[str, Tensor] = {
        "alike": torch.ones(40),
        "odd and alike": odd,
        "drifted": torch.ones(40) * (1 + 1e-4 * rank),
        "other": torch.ones(40) * (1 + 1e-2 * rank),
        "other in one": torch.ones(40) * (1 + (rank == 2)),
        "minus": torch.ones(40) * (-1) ** rank,
        "sharded": DTensor.from_local(torch.full((3,), rank), shards, [Cut(0), Cut(0)]),
        "copied": DTensor.from_local(torch.full((3,), rank % 2), shards, [Replicate(), Cut(0)]),
        "other half": DTensor.from_local(torch.full((3,), rank), shards, [Replicate(), Cut(0)]),
        "none": torch.empty(0),
    }
    return found_different(rank, parameters)


def test_replicas_may_drift_but_not_differ(four) -> None:
    assert four(compare) == [["other", "other in one", "minus", "other half"]] * 4


def without_replicas(rank: int) -> tuple[list[str], list[Any]]:
    shards = init_device_mesh("cpu", (SIZE,))
    sharded = DTensor.from_local(torch.full((3,), rank), shards, [Cut(0)])
    with Listening() as heard:
        found = found_different(rank, {"sharded": sharded})
    return found, heard.said


def test_layers_without_replicas_need_no_collective(two) -> None:
    assert two(without_replicas) == [([], [])] * 2


class Expert(nn.Module):
    """A model with a sharded layer, and a layer with different weights on each rank."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))  # a replica
        torch.manual_seed(seed)
        self.expert = nn.Linear(8, 8, bias=False)

    def forward(self, rows):
        return (self.expert(self.shared(rows)) * self.scale).square().mean()


def experts(rank: int) -> dict[str, Any]:
    net = Expert(rank)
    fully_shard(net.shared, mesh=init_device_mesh("cpu", (SIZE,)))
    optimizer = sgd(net)
    told: list[str] = []
    monitor = UpdateMonitor(net, warn=told.append, strict=True).attach(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.randn(4, 8, generator=torch.Generator().manual_seed(1))).backward()
        optimizer.step()
    return {"told": told, "layers": sorted(monitor.latest.layers)}


def test_layers_with_different_weights_on_each_rank_are_left_out_by_name(two) -> None:
    first, second = two(experts)
    assert first["layers"] == second["layers"] == ["scale", "shared.bias", "shared.weight"]
    assert first["told"] == [each for each in first["told"] if "leaves out expert.weight" in each]
    assert len(first["told"]) == 1
    assert second["told"] == []


def late_experts(rank: int) -> dict[str, Any]:
    """Add layers after the first step: an expert, and a replica."""
    net = fully_shard(nn.Linear(8, 8), mesh=init_device_mesh("cpu", (SIZE,)))
    optimizer = sgd(net)
    told: list[str] = []
    monitor = UpdateMonitor(net, warn=told.append, strict=True).attach(optimizer)
    layers = []
    for step in range(3):
        if step == 1:
            net.expert = nn.Parameter(torch.full((8,), 1.0 + rank))
            net.scale = nn.Parameter(torch.ones(8))
            optimizer.add_param_group({"params": [net.expert, net.scale]})
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        layers.append(sorted(monitor.latest.layers))
    return {"told": told, "layers": layers}


def test_experts_that_appear_later_are_left_out_by_name(two) -> None:
    first, second = two(late_experts)
    before, after = ["bias", "weight"], ["bias", "scale", "weight"]
    assert first["layers"] == second["layers"] == [before, after, after]
    assert [each[:18] for each in first["told"]] == ["leaves out expert:"]
    assert second["told"] == []


def halves(rank: int, *, alike: bool) -> dict[str, Any]:
    """Observe four ranks, of which each half shards a separate model."""
    meshes = [DeviceMesh("cpu", [first, first + 1]) for first in (0, 2)]
    net = Net()
    with torch.no_grad():
        for parameter in net.parameters():
            if not alike and rank >= 2:
                parameter.mul_(0.5)
    net = fully_shard(net, mesh=meshes[rank // 2])
    optimizer = sgd(net)
    told: list[str] = []
    monitor = UpdateMonitor(net, warn=told.append, strict=True).attach(optimizer)
    train(net, optimizer, 1)
    layers = [] if monitor.latest is None else sorted(monitor.latest.layers)
    return {"told": told, "layers": layers}


def both_halves(rank: int) -> dict[str, Any]:
    return {"alike": halves(rank, alike=True), "different": halves(rank, alike=False)}


def test_a_different_model_on_the_other_half_is_not_taken_for_a_replica(four) -> None:
    seen = four(both_halves)
    for each in seen:
        assert "up.weight" in each["alike"]["layers"]
        assert "up.weight" not in each["different"]["layers"]
    assert seen[0]["alike"]["told"] == []
    assert "not all ranks have the same values" in seen[0]["different"]["told"][0]
