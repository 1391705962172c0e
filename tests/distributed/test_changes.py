"""Models that do not stay as they were: whole for a while, with new layers, odd gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from altgrad import StepRecord, UpdateMonitor
from tests.distributed.comparing import differences
from tests.distributed.sharded import Net, WholeSteps, fsdp, hsdp, replayed
from tests.distributed.test_agreement import sgd, warned
from tests.distributed.test_collectives import Listening
from tests.distributed.test_exactness import train, without
from tests.processes import run

SIZE = 2


class Watched:
    """A monitor of a model that is shared, and what one process says of the same steps."""

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.records: list[StepRecord] = []
        self.told: list[str] = []
        self.truth = WholeSteps(net, optimizer)
        self.monitor = UpdateMonitor(net, self.records.append, tell=self.told.append, strict=True)
        self.monitor.attach(optimizer)

    def problems(self, left_out: set[str] = frozenset()) -> list[str]:
        parameters: dict[str, nn.Parameter] = {}
        for step in self.truth.steps:
            for name, (before, _, _) in step.items():
                parameters.setdefault(name, nn.Parameter(before.clone()))
        expected = replayed(self.truth.steps, parameters=parameters).records
        assert expected
        assert len(self.records) == len(expected)
        pairs = zip(self.records, expected, strict=True)
        pairs = [(own, without(other, left_out)) for own, other in pairs]
        return [found for own, other in pairs for found in differences(own, other)]


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


def after_evaluation(rank: int) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for wrapping, make in WRAPPINGS.items():
        net = make(SIZE)
        optimizer = sgd(net)
        evaluate(net)
        whole = [n for n, p in net.named_parameters() if not hasattr(p, "placements")]
        watched = Watched(net, optimizer)
        train(net, optimizer, 1)
        evaluate(net)
        train(net, optimizer, 1)
        seen[wrapping] = {"whole": whole, "problems": watched.problems(), "told": watched.told}
    return seen


@pytest.fixture(scope="module")
def evaluated() -> list[dict[str, Any]]:
    return run(after_evaluation, SIZE)


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_fully_shard_is_observed_after_an_evaluation(evaluated, wrapping: str) -> None:
    for each in evaluated:
        assert each[wrapping]["problems"] == []
        assert each[wrapping]["told"] == []


def test_torch_leaves_whole_parameters_after_an_evaluation(evaluated) -> None:
    """What all this is for: should it end, `register_shards` can go."""
    assert "norm.weight" in evaluated[0]["some"]["whole"]
    assert len(evaluated[0]["root"]["whole"]) == len([*Net().parameters()])
    assert evaluated[0]["children"]["whole"] == []


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


def test_a_monitor_may_be_made_before_the_model_is_sharded() -> None:
    for each in run(made_before_sharding, SIZE):
        assert each["problems"] == []


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


def test_layers_may_appear_and_be_replaced() -> None:
    for each in run(grow, SIZE):
        assert each["problems"] == []
        assert each["population"] == 7 * 64
        assert abs(each["rms"]) < 1e-12
        assert each["indices"] == [*range(6)]
        assert all("never_moved_frac" in told for told in each["told"])


def grow_alone(rank: int) -> dict[str, Any]:
    """An optimizer that is given one more layer in one process only."""
    net = fsdp(SIZE)
    parameters = dict(net.named_parameters())
    last = parameters.pop("head.bias")
    optimizer = torch.optim.SGD(parameters.values(), lr=1e-2)
    monitor = UpdateMonitor(net).attach(optimizer)
    told = warned(net, optimizer, 1)
    optimizer.add_param_group({"params": [last] if rank == 0 else [nn.Parameter(torch.ones(1))]})
    told += warned(net, optimizer, 2)
    return {"told": told, "observing": monitor.is_observing}


def test_a_layer_that_one_process_alone_steps_ends_the_observation_in_time() -> None:
    for each in run(grow_alone, SIZE, collective=6.0):
        assert not each["observing"]
        assert len(each["told"]) == 1
        assert "did not hear from every other one" in each["told"][0]


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, tokens):
        return self.head(self.norm(tokens)).square().mean()


def sequence_parallel(rank: int) -> dict[str, Any]:
    """Gradients of the norm are Partial: the optimizer sums them."""
    net = parallelize_module(
        Tokens(),
        init_device_mesh("cpu", (SIZE,)),
        {"norm": SequenceParallel(use_local_output=True)},
    )
    optimizer = sgd(net)
    told: list[str] = []
    monitor = UpdateMonitor(net, tell=told.append, strict=True).attach(optimizer)
    placements = []
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))).backward()
        placements.append(str(net.norm.weight.grad.placements))
        # As data parallelism would: every process has the same.
        for parameter in net.head.parameters():
            torch.distributed.all_reduce(parameter.grad)
        optimizer.step()
    return {"told": told, "layers": [*monitor.latest.layers], "placements": placements}


def test_gradients_that_the_optimizer_sums_are_left_out_by_name() -> None:
    first, second = run(sequence_parallel, SIZE)
    assert "Partial" in first["placements"][0]
    assert first["layers"] == second["layers"] == ["head.weight", "head.bias"]
    assert len(first["told"]) == 1
    assert first["told"][0].startswith("leaves out norm.weight, norm.bias: the gradient of norm.w")
    assert second["told"] == []


def row_wise(rank: int) -> dict[str, Any]:
    """The gradient of a table that is shared by rows is whole in every process."""
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


def test_of_gradients_that_are_whole_the_part_here_is_measured() -> None:
    for each in run(row_wise, SIZE):
        assert each["placements"] == ["(Shard(dim=0),)", "(Replicate(),)"]
        assert each["heard"] == {"allgather", "allreduce"}  # none in the groups that train
        assert each["problems"] == []
        assert each["told"] == []


class Nudging(torch.optim.SGD):
    """Moves one element of a weight whatever the learning rate."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        local = self.param_groups[0]["params"][0].to_local()
        if torch.distributed.get_rank() == 1:
            local[0, 0] += 1.0
        return result


def at_rate_0(rank: int) -> dict[str, Any]:
    """Weights move in one shard only, in spite of a learning rate of 0."""
    net = fsdp(SIZE)
    optimizer = Nudging(net.parameters(), lr=0.0)
    watched = Watched(net, optimizer)
    train(net, optimizer, 2)
    return {
        "problems": watched.problems({*dict(net.named_parameters())} - {"rows.weight"}),
        "layers": [[*record.layers] for record in watched.records],
    }


def test_weights_that_move_in_one_shard_at_rate_0_are_seen() -> None:
    for each in run(at_rate_0, SIZE):
        assert each["layers"] == [["rows.weight"]] * 2
        assert each["problems"] == []


def without_requires_grad(rank: int, make: Any) -> dict[str, Any]:
    """Gradients that are set by hand, as of methods without backward passes."""
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
def test_gradients_that_are_set_by_hand_are_observed(make: Any) -> None:
    for each in run(without_requires_grad, SIZE, make):
        assert each["problems"] == []
        assert each["told"] == []


class Empty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.odd_names = nn.ParameterDict({"\udc80": torch.ones(4)})
        self.nothing = nn.Parameter(torch.zeros(3, 0))
        self.weight = nn.Parameter(torch.randn(5, 4))

    def forward(self, rows):
        odd = self.odd_names["\udc80"]
        return (self.weight * odd).square().sum()  # FSDP2 cannot reduce what is empty


def empty(rank: int) -> dict[str, Any]:
    net = fully_shard(Empty(), mesh=init_device_mesh("cpu", (SIZE,)))
    optimizer = sgd(net)
    watched = Watched(net, optimizer)
    train(net, optimizer, 2)
    return {"problems": watched.problems(), "layers": [*watched.records[-1].layers]}


def test_parameters_without_elements_and_with_odd_names_are_observed() -> None:
    for each in run(empty, SIZE):
        assert each["problems"] == []
        assert set(each["layers"]) >= {"weight", "odd_names.\udc80"}


def states(rank: int) -> list[Any]:
    """What a monitor has seen, as it says when attached, detached, attached again, and loaded."""
    net = fsdp(SIZE)
    optimizer = sgd(net)
    monitor = UpdateMonitor(net, strict=True)
    seen = [monitor.state_dict()]
    monitor.attach(optimizer)
    train(net, optimizer, 2)
    seen.append(monitor.state_dict())
    monitor.detach()
    seen.append(monitor.state_dict())
    seen.append(monitor.attach(optimizer).state_dict())
    another = UpdateMonitor(net, strict=True)
    another.load_state_dict(seen[-1])
    seen.append(another.state_dict())
    seen.append(another.attach(optimizer).state_dict())
    return [
        {name: (shape, bits.tolist()) for name, (shape, bits) in state["ever_moved"].items()}
        for state in seen
    ]


def test_a_state_is_the_same_whenever_it_is_asked_for() -> None:
    first, second = run(states, SIZE)
    assert first == second
    nothing, *each = first
    assert nothing == {}
    assert len(each[0]) > 5
    assert all(state == each[0] for state in each)
