"""Models that do not stay as they were: whole for a while, sharded later, with new layers."""

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

# Whole for a while


def evaluate(net: nn.Module) -> None:
    """After which fully_shard leaves the outermost parameters whole."""
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


def test_torch_leaves_whole_parameters_after_an_evaluation(two) -> None:
    """What all this is for: should it end, `register_shards` can go."""
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


# With other layers


class Grown(Net):
    def forward(self, rows):
        loss = super().forward(rows)
        return (
            loss + self.extra(self.rows(rows)).square().mean() if hasattr(self, "extra") else loss
        )


def grow(rank: int) -> dict[str, Any]:
    """A layer that comes after some steps; one that another takes the place of, of another size."""
    mesh = init_device_mesh("cpu", (SIZE,))
    net = fully_shard(Grown(), mesh=mesh)
    optimizer = sgd(net)
    watched = Watched(net, optimizer)
    train(net, optimizer, 2)
    torch.manual_seed(5)
    net.extra = fully_shard(nn.Linear(64, 3), mesh=mesh)
    optimizer.add_param_group({"params": [*net.extra.parameters()]})
    watched.monitor.weight_octaves()
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


def test_layers_may_appear_and_be_replaced(two) -> None:
    for each in two(grow):
        assert each["problems"] == []
        assert each["population"] == 7 * 64
        assert abs(each["rms"]) < 1e-12
        assert each["indices"] == [*range(6)]
        assert all("never_moved_frac" in told for told in each["told"])


def grow_another(rank: int) -> dict[str, Any]:
    """A layer that one of two optimizers is given, before the other one steps with all scales due.

    Its gradient is set by hand at the step that has it.
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


def test_a_layer_of_another_optimizer_is_unknown_until_that_one_steps(two) -> None:
    for each in two(grow_another):
        first, second = each["layers"]
        assert first == ["five.weight", "five.bias"]
        assert {"extra.weight", "extra.bias", "up.weight"} <= {*second}
        assert abs(each["amax"]) < 0.02  # as it was before the step


def grow_alone(rank: int) -> dict[str, Any]:
    """An optimizer that is given one more layer on one rank only."""
    net = fsdp(SIZE)
    parameters = dict(net.named_parameters())
    last = parameters.pop("head.bias")
    optimizer = torch.optim.SGD(parameters.values(), lr=1e-2)
    monitor = UpdateMonitor(net).attach(optimizer)
    told = warned(net, optimizer, 1)
    optimizer.add_param_group({"params": [last] if rank == 0 else [nn.Parameter(torch.ones(1))]})
    told += warned(net, optimizer, 2)
    return {"told": told, "observing": monitor.is_observing}


def test_a_layer_that_one_rank_alone_steps_ends_the_observation_in_time() -> None:
    for each in run(grow_alone, SIZE, collective=LIMIT):
        assert not each["observing"]
        assert len(each["told"]) == 1
        assert each["told"][0].startswith("UpdateMonitor stops observing after an error: rank ")
        assert "did not hear from every other one" in each["told"][0]
