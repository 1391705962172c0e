"""Models that change: unsharded for a while, sharded later, or with new layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from altgrad import StepRecord, UpdateMonitor
from tests.distributed.comparing import differences
from tests.distributed.sharded import Net, WholeSteps, fsdp, hsdp, replayed, whole
from tests.distributed.training import LIMIT, sgd, train, warned
from tests.distributed.watched import Watched
from tests.processes import run

SIZE = 2

# Unsharded for a while


def evaluate(net: nn.Module) -> None:
    """Run an evaluation, after which fully_shard leaves the outermost parameters unsharded."""
    with torch.no_grad():
        net(torch.arange(6))


def root_alone(size: int) -> nn.Module:
    return fully_shard(Net(), mesh=init_device_mesh("cpu", (size,)))


def root_without_parameters(size: int) -> nn.Module:
    net, mesh = Net(), init_device_mesh("cpu", (size,))
    for child in net.children():
        fully_shard(child, mesh=mesh)
    return fully_shard(net, mesh=mesh)


WRAPPINGS = {"some": fsdp, "root": root_alone, "children": root_without_parameters, "hsdp": hsdp}


def after_evaluation(rank: int, wrapping: str) -> dict[str, Any]:
    net = WRAPPINGS[wrapping](SIZE)
    optimizer = sgd(net)
    evaluate(net)
    whole = [n for n, p in net.named_parameters() if not hasattr(p, "placements")]
    watched = Watched(net, optimizer)
    train(net, optimizer, 1)
    evaluate(net)
    train(net, optimizer, 1)
    return {"whole": whole, "problems": watched.problems(), "told": watched.told}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_fully_shard_is_observed_after_an_evaluation(two, wrapping: str) -> None:
    for each in two(after_evaluation, wrapping):
        assert each["problems"] == []
        assert each["told"] == []


def test_torch_leaves_unsharded_parameters_after_an_evaluation(two) -> None:
    """Check the behaviour of torch that makes `register_shards` necessary."""
    some, root, children = (
        two(after_evaluation, wrapping)[0]["whole"] for wrapping in ("some", "root", "children")
    )
    assert "norm.weight" in some
    assert len(root) == len([*Net().parameters()])
    assert children == []


def made_before_sharding(rank: int) -> dict[str, Any]:
    net = Net()
    records: list[StepRecord] = []
    monitor = UpdateMonitor(net, records.append, strict=True)
    fully_shard(net, mesh=init_device_mesh("cpu", (SIZE,)))
    optimizer = sgd(net)
    truth = WholeSteps(net, optimizer)
    monitor.attach(optimizer)
    train(net, optimizer, 2)
    pairs = zip(records, replayed(truth.steps).records, strict=True)
    return {"problems": [found for own, other in pairs for found in differences(own, other)]}


def test_a_monitor_may_be_made_before_the_model_is_sharded(two) -> None:
    for each in two(made_before_sharding):
        assert each["problems"] == []


# New layers


class Grown(Net):
    def forward(self, rows):
        loss = super().forward(rows)
        return (
            loss + self.extra(self.rows(rows)).square().mean() if hasattr(self, "extra") else loss
        )


def grow(rank: int) -> dict[str, Any]:
    """Add a layer after some steps, and replace a layer by one with another size."""
    mesh = init_device_mesh("cpu", (SIZE,))
    net = fully_shard(Grown(), mesh=mesh)
    optimizer = sgd(net)
    watched = Watched(net, optimizer)
    train(net, optimizer, 2)
    torch.manual_seed(5)
    net.extra = fully_shard(nn.Linear(64, 3), mesh=mesh)
    optimizer.add_param_group({"params": [*net.extra.parameters()]})
    watched.monitor.state_dict()
    train(net, optimizer, 2)
    problems = watched.problems()

    net.extra = fully_shard(nn.Linear(64, 7), mesh=mesh)
    optimizer.param_groups[1]["params"] = [*net.extra.parameters()]
    train(net, optimizer, 2)
    record = watched.records[-1]
    whole = {n: (b, a) for n, (b, a, _) in watched.truth.steps[-1].items()}
    update = (whole["extra.weight"][1] - whole["extra.weight"][0]).double()
    return {
        "problems": problems,
        "told": watched.told,
        "population": record.layers["extra.weight"].population,
        "rms": record.layers["extra.weight"]["update_rms"] - float(update.square().mean().sqrt()),
        "indices": [each.index for each in watched.records],
    }


def test_layers_can_be_added_and_replaced(two) -> None:
    for each in two(grow):
        assert each["problems"] == []
        assert each["population"] == 7 * 64
        assert abs(each["rms"]) < 1e-12
        assert each["indices"] == [*range(6)]
        assert all("never_moved_frac" in told for told in each["told"])


def grow_another(rank: int) -> dict[str, Any]:
    """Add a layer to one of two optimizers, before the other one steps with all scales due.

    The gradient of the layer is set by hand at its first step.
    """
    mesh = init_device_mesh("cpu", (SIZE,))
    net = fully_shard(Net(), mesh=mesh)
    small = {*net.five.parameters()}
    first = sgd(net.five)
    second = torch.optim.SGD([p for p in net.parameters() if p not in small], lr=1e-2)
    records: list[StepRecord] = []
    monitor = UpdateMonitor(net, records.append, strict=True).attach(first, second)
    net.extra = fully_shard(nn.Linear(64, 3), mesh=mesh)
    second.add_param_group({"params": [*net.extra.parameters()]})
    net(torch.arange(6)).backward()
    for parameter in net.extra.parameters():
        parameter.grad = torch.ones_like(parameter)
    first.step()
    second.step()
    scales = monitor.state_dict()["scales"]["amax"]
    return {
        "layers": [[*record.layers] for record in records],
        "amax": float(scales["extra.weight"][1]) - float(whole(net.extra.weight).abs().max()),
    }


def test_a_new_layer_is_unknown_until_its_optimizer_steps(two) -> None:
    for each in two(grow_another):
        first, second = each["layers"]
        assert first == ["five.weight", "five.bias"]
        assert {"extra.weight", "extra.bias", "up.weight"} <= {*second}
        assert abs(each["amax"]) < 0.02  # the amax before the step


def grow_alone(rank: int) -> dict[str, Any]:
    """Add a layer to the optimizer on one rank only."""
    net = fsdp(SIZE)
    parameters = dict(net.named_parameters())
    last = parameters.pop("head.bias")
    optimizer = torch.optim.SGD(parameters.values(), lr=1e-2)
    monitor = UpdateMonitor(net).attach(optimizer)
    told = warned(net, optimizer, 1)
    optimizer.add_param_group({"params": [last] if rank == 0 else [nn.Parameter(torch.ones(1))]})
    told += warned(net, optimizer, 2)
    return {"told": told, "observing": monitor.is_observing}


def test_a_layer_that_only_one_rank_steps_ends_the_observation_in_time() -> None:
    for each in run(grow_alone, SIZE, collective=LIMIT):
        assert not each["observing"]
        assert len(each["told"]) == 1
        assert each["told"][0].startswith("UpdateMonitor stops observing after an error: rank ")
        assert "had no answer from at least one other rank" in each["told"][0]


# After a checkpoint, or without an agreement


def freeze_after_checkpoint(rank: int) -> dict[str, Any]:
    """Resume with a frozen layer, take a checkpoint, and train the layer again."""
    net = fsdp(SIZE)
    optimizer = sgd(net)
    with UpdateMonitor(net, strict=True).attach(optimizer) as monitor:
        train(net, optimizer, 2)
        state = monitor.state_dict()
    net.up.weight.requires_grad_(False)
    told: list[str] = []
    again = UpdateMonitor(net, warn=told.append, strict=True)
    again.load_state_dict(state)
    with again.attach(optimizer):
        kept = again.state_dict()["ever_moved"]
        net.up.weight.requires_grad_(True)
        train(net, optimizer, 1)
    names = [name for name in state["ever_moved"] if name not in kept]
    equal = all(torch.equal(kept[name][1], bits) for name, (_, bits) in state["ever_moved"].items())
    return {"missing": names, "equal": equal, "told": told, "layers": len(state["ever_moved"])}


def test_a_layer_frozen_at_a_resume_keeps_which_elements_have_moved(two) -> None:
    for each in two(freeze_after_checkpoint):
        assert each["layers"] > 5
        assert each == {"missing": [], "equal": True, "told": [], "layers": each["layers"]}


def shard_after_attach(rank: int) -> dict[str, Any]:
    """Shard a model in place between two steps, without a new attach."""
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    records: list[StepRecord] = []
    told: list[str] = []
    monitor = UpdateMonitor(net, records.append, warn=told.append).attach(optimizer)
    for sharded in (False, True):
        if sharded:
            fully_shard(net, mesh=init_device_mesh("cpu", (SIZE,)))
            optimizer.param_groups[0]["params"] = [*net.parameters()]
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return {"records": len(records), "told": told, "observing": monitor.is_observing}


def test_sharding_after_attach_ends_the_observation_and_names_the_layer(two) -> None:
    for each in two(shard_after_attach):
        assert each["records"] == 1
        assert not each["observing"]
        assert "0.weight, 0.bias, 1.weight and 1 more: sharded after" in each["told"][-1]
