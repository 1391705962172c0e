"""`ShardedLayers`: what one process says of layers, put together, is what is true of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from altgrad import UpdateMonitor
from altgrad.distributed.layers import ShardedLayers
from altgrad.quantization.formats import Scaling
from tests.distributed.sharded import (
    Net,
    fsdp,
    fsdp_and_tensor_parallel,
    fsdp_by_columns,
    hsdp,
    tensor_parallel,
    whole,
)
from tests.distributed.training import refused, sgd, train

SIZE = 2
STRATEGIES = (fsdp, fsdp_by_columns, hsdp, tensor_parallel, fsdp_and_tensor_parallel)


def every_third(name: str, shape: torch.Size) -> Tensor | None:
    """Of weights; all of biases."""
    return None if name.endswith("bias") else torch.arange(1, shape.numel(), 3)


def looked_at(
    parameters: dict[str, Any], indices_of: Any = every_third, scaling: Scaling | None = "tensor"
) -> ShardedLayers:
    layers = ShardedLayers(indices_of, scaling)
    layers.look_at(parameters)
    layers.ranks.meet()
    return layers


# What lies here


def measure(rank: int) -> dict[str, dict[str, Any]]:
    """Which elements are measured here, and what they are."""
    found = {}
    for make in STRATEGIES:
        parameters = dict(make(4).named_parameters())
        layers = looked_at(parameters)
        for name, parameter in parameters.items():
            part = layers.measured_part_of(name)
            here = layers.here(parameter).flatten()
            found[f"{make.__name__} {name}"] = {
                "positions": part.positions,
                "values": here if part.local is None else here[part.local],
                "whole": whole(parameter).flatten(),
                "expected": tuple(layers.expected([name])[name]),
                "parts": layers.measured_parts_of([name])[name],
            }
    return found


def test_each_measured_element_is_measured_in_one_process(four) -> None:
    ranks = four(measure)
    for layer in ranks[0]:
        each = [seen[layer] for seen in ranks]
        full = each[0]["whole"]
        indices = every_third(layer, full.shape)
        true = full if indices is None else full[indices]
        positions = torch.cat([one["positions"] for one in each])
        values = torch.cat([one["values"][: len(one["positions"])] for one in each])
        assert torch.equal(positions.sort().values, torch.arange(len(true))), layer
        assert torch.equal(values.nan_to_num(), true[positions].nan_to_num()), layer
        for one in each:
            assert one["expected"] == (len(full), len(true)), layer
            assert one["parts"][0] == len(true)
            assert torch.equal(one["parts"][1], one["positions"])


def move(rank: int) -> dict[str, Any]:
    """One of two layers is placed otherwise than it was."""
    mesh = init_device_mesh("cpu", (SIZE,))
    full = torch.arange(8.0).view(4, 2)
    rows, columns = (distribute_tensor(full, mesh, [Shard(dimension)]) for dimension in (0, 1))
    layers = looked_at({"stays": rows, "goes": rows}, lambda *_: None)
    moved = {"stays": rows, "goes": columns}
    found = {
        "at first": layers.are_placed_as_before({"stays": rows, "goes": rows}),
        "moved": layers.are_placed_as_before(moved),
        "known": [*layers.known(moved)],
        "before": layers.measured_part_of("goes").indices.tolist(),
    }
    layers.look_at(moved)
    return found | {
        "again": layers.are_placed_as_before(moved),
        "after": layers.measured_part_of("goes").indices.tolist(),
        "placements": layers.placements("goes"),
    }


def test_a_layer_that_is_placed_otherwise_is_not_known_until_it_is_looked_at(two) -> None:
    for rank, each in enumerate(two(move)):
        assert (each["at first"], each["moved"], each["again"]) == (True, False, True)
        assert each["known"] == ["stays"]
        assert each["before"] == ([0, 1, 2, 3], [4, 5, 6, 7])[rank]
        assert each["after"] == ([0, 2, 4, 6], [1, 3, 5, 7])[rank]
        assert each["placements"] == "(Shard(dim=1),)"


def tear(rank: int) -> dict[str, list[str]]:
    """Of 48 and 64 columns each process has 12 and 16; of 48 and 64 elements too."""
    by_columns = dict(fsdp_by_columns(4).named_parameters())
    names = ["up.weight", "down.weight", "up.bias", "down.bias", "norm.weight", "rows.weight"]
    layers = looked_at(by_columns)
    return {str(sizes): layers.torn(names, sizes) for sizes in ([4], [8], [16], [32], [4, 16], [])}


def test_layers_of_which_processes_share_a_block_are_named_alike_in_all(four) -> None:
    for each in four(tear):
        assert each["[4]"] == each["[]"] == []
        assert each["[8]"] == each["[16]"] == each["[4, 16]"] == ["down.weight", "up.bias"]
        assert each["[32]"] == ["up.weight", "down.weight", "up.bias", "down.bias", "norm.weight"]


# What all know together


def largest(rank: int, scaling: Scaling) -> list[tuple[str, bool]]:
    """Whether what each comes to is the truth, in whichever strategy."""
    found = []
    for make in STRATEGIES:
        parameters = dict(make(4).named_parameters())
        with torch.no_grad():
            parameters["norm.bias"].zero_()
        amax, has_zero = looked_at(parameters, scaling=scaling).amax_of(parameters)
        for (name, parameter), own, is_zero in zip(parameters.items(), amax, has_zero, strict=True):
            finite = whole(parameter).nan_to_num(0, 0, 0).abs()
            rows = finite.view(len(finite), -1) if scaling == "channel" else finite.view(1, -1)
            true = rows.amax(1)
            is_right = torch.equal(own, true) and is_zero == bool((true == 0).any())
            found.append((f"{make.__name__} {name}", is_right))
    return found


@pytest.mark.parametrize("scaling", ["tensor", "channel"])
def test_the_amax_of_shards_is_that_of_the_whole(four, scaling: Scaling) -> None:
    ranks = four(largest, scaling)
    assert len(ranks[0]) > 60
    for each in ranks:
        assert [layer for layer, is_right in each if not is_right] == []


def remember(rank: int) -> dict[str, tuple[tuple[int, int], list[int]]]:
    """Of 19 elements in two kinds of bits; a layer of which nothing is known, and one that is not
    there."""
    mesh = init_device_mesh("cpu", (SIZE,))
    parameters = {n: distribute_tensor(torch.zeros(19), mesh, [Shard(0)]) for n in ("a", "quiet")}
    layers = looked_at(parameters, lambda *_: None)
    bits = torch.zeros(2, 10 - rank, dtype=torch.uint8)  # elements 0 to 9, 10 to 18
    bits[0, 3], bits[1, -1] = 1, rank
    flat = torch.cat((bits.flatten(), torch.zeros(-bits.numel() % 8, dtype=torch.uint8)))
    packed = (flat.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)
    state = layers.ever_moved_state({"a": ((2, 10 - rank), packed)}, ["a", "quiet", "none"], 2)
    return {name: (shape, each.tolist()) for name, (shape, each) in state.items()}


def test_what_elements_have_done_in_any_process_is_known_in_all(two) -> None:
    true = [0] * 40
    for element in (3, 13, 19 + 18):  # of the first kind in each, of the second in the second
        true[element] = 1
    packed = [
        sum(bit << k for k, bit in enumerate(true[first : first + 8])) for first in range(0, 40, 8)
    ]
    assert two(remember) == [{"a": ((2, 19), packed)}] * 2


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


def test_a_state_is_the_same_whenever_it_is_asked_for(two) -> None:
    first, second = two(states)
    assert first == second
    nothing, *each = first
    assert nothing == {}
    assert len(each[0]) > 5
    assert all(state == each[0] for state in each)


def scales_of_blocks(rank: int) -> str:
    net = fsdp(SIZE)
    return refused(lambda: UpdateMonitor(net, formats="nvfp4").attach(sgd(net)))


def test_scales_of_whole_tensors_are_refused(two) -> None:
    for each in two(scales_of_blocks):
        assert "leave out 'nvfp4'" in each


# Copies that are none


def compare(rank: int) -> list[str]:
    """Copies of all kinds: in no mesh, in half of the processes, whole in a mesh."""
    shards = init_device_mesh("cpu", (2, 2))
    odd = torch.tensor([torch.nan, torch.inf, 1.0])
    parameters: dict[str, Tensor] = {
        "alike": torch.ones(40),
        "odd and alike": odd,
        "drifted": torch.ones(40) * (1 + 1e-4 * rank),
        "other": torch.ones(40) * (1 + 1e-2 * rank),
        "other in one": torch.ones(40) * (1 + (rank == 2)),
        "minus": torch.ones(40) * (-1) ** rank,
        "sharded": DTensor.from_local(torch.full((3,), rank), shards, [Shard(0), Shard(0)]),
        "copied": DTensor.from_local(torch.full((3,), rank % 2), shards, [Replicate(), Shard(0)]),
        "other half": DTensor.from_local(torch.full((3,), rank), shards, [Replicate(), Shard(0)]),
        "none": torch.empty(0),
    }
    layers = looked_at(parameters, lambda *_: None)
    return layers.different_copies(parameters)


def test_copies_may_drift_and_not_differ(four) -> None:
    assert four(compare) == [["other", "other in one", "minus", "other half"]] * 4


class Expert(nn.Module):
    """A layer that is shared, and one of which each process has its own."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))  # a copy
        torch.manual_seed(seed)
        self.expert = nn.Linear(8, 8, bias=False)

    def forward(self, rows):
        return (self.expert(self.shared(rows)) * self.scale).square().mean()


def experts(rank: int) -> dict[str, Any]:
    net = Expert(rank)
    fully_shard(net.shared, mesh=init_device_mesh("cpu", (SIZE,)))
    optimizer = sgd(net)
    told: list[str] = []
    monitor = UpdateMonitor(net, tell=told.append, strict=True).attach(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.randn(4, 8, generator=torch.Generator().manual_seed(1))).backward()
        optimizer.step()
    return {"told": told, "layers": sorted(monitor.latest.layers)}


def test_layers_of_which_each_process_has_its_own_are_left_out_by_name(two) -> None:
    first, second = two(experts)
    assert first["layers"] == second["layers"] == ["scale", "shared.bias", "shared.weight"]
    assert first["told"] == [each for each in first["told"] if "leaves out expert.weight" in each]
    assert len(first["told"]) == 1
    assert second["told"] == []


def halves(rank: int, *, alike: bool) -> dict[str, Any]:
    """Four processes, of which each half shares a model by itself."""
    meshes = [DeviceMesh("cpu", [first, first + 1]) for first in (0, 2)]
    net = Net()
    with torch.no_grad():
        for parameter in net.parameters():
            if not alike and rank >= 2:
                parameter.mul_(0.5)
    net = fully_shard(net, mesh=meshes[rank // 2])
    optimizer = sgd(net)
    told: list[str] = []
    monitor = UpdateMonitor(net, tell=told.append, strict=True).attach(optimizer)
    train(net, optimizer, 1)
    layers = [] if monitor.latest is None else sorted(monitor.latest.layers)
    return {"told": told, "layers": layers}


def both_halves(rank: int) -> dict[str, Any]:
    return {"alike": halves(rank, alike=True), "different": halves(rank, alike=False)}


def test_another_model_on_the_other_half_is_not_taken_for_a_copy(four) -> None:
    seen = four(both_halves)
    for each in seen:
        assert "up.weight" in each["alike"]["layers"]
        assert "up.weight" not in each["different"]["layers"]
    assert seen[0]["alike"]["told"] == []
    assert "not all processes have the same values" in seen[0]["different"]["told"][0]
