"""`ShardedLayers` splits a model between ranks so that each element is measured once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from altgrad.distributed.layers import ShardedLayers
from altgrad.observation.dtensor import to_local_tensor
from tests.distributed.listening import Listening
from tests.distributed.sharded import (
    fsdp,
    fsdp_and_tensor_parallel,
    fsdp_by_columns,
    hsdp,
    tensor_parallel,
    whole,
)

SIZE = 2
STRATEGIES = (fsdp, fsdp_by_columns, hsdp, tensor_parallel, fsdp_and_tensor_parallel)


def every_third(name: str, shape: torch.Size) -> Tensor | None:
    """Return the indices of every third element of a weight, or None for a bias."""
    return None if name.endswith("bias") else torch.arange(1, shape.numel(), 3)


def read_layers(rank: int, parameters: dict[str, Any], find_indices: Any = every_third):
    layers = ShardedLayers(find_indices, rank)
    with Listening() as heard:
        layers.read(parameters)
    assert heard.said == []
    return layers


def measure(rank: int) -> dict[str, dict[str, Any]]:
    """Return positions and values of the elements that this rank measures."""
    found = {}
    for make in STRATEGIES:
        parameters = dict(make(4).named_parameters())
        layers = read_layers(rank, parameters)
        for name, parameter in parameters.items():
            part = layers.measured_part(name)
            here = to_local_tensor(parameter.detach()).flatten()
            found[f"{make.__name__} {name}"] = {
                "positions": part.positions,
                "values": here if part.local is None else here[part.local],
                "whole": whole(parameter).flatten(),
                "expected": tuple(layers.expected([name])[name]),
            }
    return found


def test_each_sampled_element_is_measured_on_one_rank(four) -> None:
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


def move(rank: int) -> dict[str, Any]:
    """Return the known layers before and after one layer moves and another is added."""
    mesh = init_device_mesh("cpu", (SIZE,))
    full = torch.arange(8.0).view(4, 2)
    rows, columns = (distribute_tensor(full, mesh, [Shard(dimension)]) for dimension in (0, 1))
    layers = read_layers(rank, {"stays": rows, "goes": rows}, lambda *_: None)
    moved = {"stays": rows, "goes": columns, "new": rows}
    found = {
        "at first": [*layers.known({"stays": rows, "goes": rows})],
        "moved": [*layers.known(moved)],
        "before": layers.measured_part("goes").indices.tolist(),
        "of the new one": [*map(len, layers.part("new", None))],
        "contained": [name in layers for name in moved],
    }
    layers.read(moved)
    return found | {
        "again": [*layers.known(moved)],
        "after": layers.measured_part("goes").indices.tolist(),
        "words": layers.describe("goes"),
    }


def test_a_layer_with_new_placements_is_unknown_until_it_is_read(two) -> None:
    for rank, each in enumerate(two(move)):
        assert each["at first"] == ["stays", "goes"]
        assert each["moved"] == ["stays"]
        assert each["again"] == ["stays", "goes", "new"]
        assert each["before"] == ([0, 1, 2, 3], [4, 5, 6, 7])[rank]
        assert each["after"] == ([0, 2, 4, 6], [1, 3, 5, 7])[rank]
        assert each["words"] == "(Shard(dim=1),)"


def test_a_layer_that_was_not_read_has_no_local_elements(two) -> None:
    for each in two(move):
        assert each["contained"] == [True, True, False]
        assert each["of the new one"] == [0, 0, 0]


def replace(rank: int) -> list[tuple[int, int]]:
    """Count the expected elements before and after a layer changes its shape."""
    mesh = init_device_mesh("cpu", (SIZE,))
    layers, expected = ShardedLayers(every_third, rank), []
    for rows in (4, 6):
        layers.read({"it": distribute_tensor(torch.zeros(rows, 3), mesh, [Shard(0)])})
        expected.append(tuple(layers.expected(["it"])["it"]))
    return expected


def test_expected_elements_follow_a_layer_that_changes_shape(two) -> None:
    assert two(replace) == [[(12, 4), (18, 6)]] * 2


def channels(rank: int) -> dict[str, list[int]]:
    """Return the local channels of shards, nested shards and unsharded layers."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    layers = read_layers(rank, dict(fsdp_and_tensor_parallel(4).named_parameters()))
    five, six = torch.zeros(5, 2), torch.zeros(6, 2)
    layers.read(
        {
            "five": distribute_tensor(five, mesh, [Shard(0), Shard(1)]),
            "six": distribute_tensor(six, mesh["tensor"], [Shard(0)]),
            "whole": five,
            "number": torch.zeros(()),
        }
    )
    rows = {"five": 5, "six": 6, "whole": 5, "number": 1, "up.weight": 48}
    return {name: torch.arange(n)[layers.channels_here(name)].tolist() for name, n in rows.items()}


def test_each_rank_finds_its_local_channels(four) -> None:
    ranks = four(channels)
    assert [each["five"] for each in ranks] == [[0, 1, 2]] * 2 + [[3, 4]] * 2
    assert [each["six"] for each in ranks] == [[0, 1, 2], [3, 4, 5]] * 2
    assert all(each["whole"] == [*range(5)] and each["number"] == [0] for each in ranks)
    assert sorted(row for each in ranks for row in each["up.weight"]) == [*range(48)]


def tear(rank: int) -> dict[str, list[str]]:
    """Return the torn layers for several block sizes; shards have 12 or 16 columns or elements."""
    names = ["up.weight", "down.weight", "up.bias", "down.bias", "norm.weight", "rows.weight"]
    layers = read_layers(rank, dict(fsdp_by_columns(4).named_parameters()))
    return {str(sizes): layers.torn(names, sizes) for sizes in ([4], [8], [16], [32], [4, 16], [])}


def test_every_rank_names_the_same_layers_with_torn_blocks(four) -> None:
    for each in four(tear):
        assert each["[4]"] == each["[]"] == []
        assert each["[8]"] == each["[16]"] == each["[4, 16]"] == ["down.weight", "up.bias"]
        assert each["[32]"] == ["up.weight", "down.weight", "up.bias", "down.bias", "norm.weight"]
