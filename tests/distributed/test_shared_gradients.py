"""Gradients whose placements differ from those of their parameters, or that are set by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from altgrad import UpdateMonitor
from tests.distributed.listening import Listening
from tests.distributed.sharded import Net, fsdp, hsdp
from tests.distributed.training import sgd, train
from tests.distributed.watched import Watched

SIZE = 2

# Different placements


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, tokens):
        return self.head(self.norm(tokens)).square().mean()


def sequence_parallel(rank: int) -> dict[str, Any]:
    """Train with sequence parallelism; the gradients of the norm are Partial until the step."""
    net = parallelize_module(
        Tokens(),
        init_device_mesh("cpu", (SIZE,)),
        {"norm": SequenceParallel(use_local_output=True)},
    )
    optimizer = sgd(net)
    told: list[str] = []
    monitor = UpdateMonitor(net, warn=told.append, strict=True).attach(optimizer)
    placements = []
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))).backward()
        placements.append(str(net.norm.weight.grad.placements))
        # Data parallelism would give every rank the same gradients.
        for parameter in net.head.parameters():
            torch.distributed.all_reduce(parameter.grad)
        optimizer.step()
    return {"told": told, "layers": [*monitor.latest.layers], "placements": placements}


def test_gradients_that_the_optimizer_sums_are_left_out_by_name(two) -> None:
    first, second = two(sequence_parallel)
    assert "Partial" in first["placements"][0]
    assert first["layers"] == second["layers"] == ["head.weight", "head.bias"]
    assert len(first["told"]) == 1
    assert first["told"][0].startswith("leaves out norm.weight, norm.bias: the gradient of norm.w")
    assert second["told"] == []


def row_wise(rank: int) -> dict[str, Any]:
    """Train an embedding that is sharded by rows; its gradient is whole on every rank."""
    plan = {"rows": RowwiseParallel(input_layouts=Replicate())}
    net = parallelize_module(Net(), init_device_mesh("cpu", (SIZE,)), plan)
    with UpdateMonitor(net, strict=True).attach(optimizer := sgd(net)):
        net(torch.arange(6)).backward()
        with Listening() as heard:
            optimizer.step()
    optimizer = sgd(net)
    watched = Watched(net, optimizer)
    train(net, optimizer, 2)
    placements = [str(each.placements) for each in (net.rows.weight, net.rows.weight.grad)]
    return {
        "problems": watched.problems(),
        "told": watched.told,
        "placements": placements,
        "heard": {name for name, _ in heard.said},
    }


def test_each_rank_measures_its_local_shard_if_gradients_are_whole(two) -> None:
    for each in two(row_wise):
        assert each["placements"] == ["(Shard(dim=0),)", "(Replicate(),)"]
        assert each["heard"] == {"allreduce"}  # none in the process groups of the training
        assert each["problems"] == []
        assert each["told"] == []


# Unneeded gradients, and gradients set by hand


class Nudging(torch.optim.SGD):
    """An SGD that moves one element of a weight at any learning rate."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        local = self.param_groups[0]["params"][0].to_local()
        if torch.distributed.get_rank() == 1:
            local[0, 0] += 1.0
        return result


def at_rate_0(rank: int) -> dict[str, Any]:
    """Observe weights that move in one shard only, at a learning rate of 0."""
    net = fsdp(SIZE)
    optimizer = Nudging(net.parameters(), lr=0.0)
    watched = Watched(net, optimizer)
    train(net, optimizer, 2)
    return {
        "problems": watched.problems({*dict(net.named_parameters())} - {"rows.weight"}),
        "layers": [[*record.layers] for record in watched.records],
    }


def test_weights_that_move_in_one_shard_at_learning_rate_0_are_observed(two) -> None:
    for each in two(at_rate_0):
        assert each["layers"] == [["rows.weight"]] * 2
        assert each["problems"] == []


def without_requires_grad(rank: int, make: Any) -> dict[str, Any]:
    """Observe gradients that are set by hand, as by methods without a backward pass."""
    net = make(SIZE)
    optimizer = sgd(net)
    net.requires_grad_(False)
    watched = Watched(net, optimizer)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for parameter in net.parameters():
            full = torch.randn(parameter.shape, generator=generator)
            mesh, placements = parameter.device_mesh, parameter.placements
            parameter.grad = torch.distributed.tensor.distribute_tensor(full, mesh, placements)
        optimizer.step()
    return {"problems": watched.problems(), "told": watched.told}


@pytest.mark.parametrize("make", [fsdp, hsdp])
def test_gradients_that_are_set_by_hand_are_observed(two, make: Any) -> None:
    for each in two(without_requires_grad, make):
        assert each["problems"] == []
        assert each["told"] == []
