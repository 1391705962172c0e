"""`ShardedLayers`: what lies on each rank, put together, is each element of the model once."""

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
    """Of weights; all of biases."""
    return None if name.endswith("bias") else torch.arange(1, shape.numel(), 3)


def layers_of(rank: int, parameters: dict[str, Any], indices_of: Any = every_third):
    layers = ShardedLayers(indices_of, rank)
    with Listening() as heard:
        layers.read(parameters)
    assert heard.said == []
    return layers


def measure(rank: int) -> dict[str, dict[str, Any]]:
    """Which elements are measured here, and what they are."""
    found = {}
    for make in STRATEGIES:
        parameters = dict(make(4).named_parameters())
        layers = layers_of(rank, parameters)
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


def test_each_measured_element_is_measured_on_one_rank(four) -> None:
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
    """One of two layers is placed otherwise than it was; a third one is new."""
    mesh = init_device_mesh("cpu", (SIZE,))
    full = torch.arange(8.0).view(4, 2)
    rows, columns = (distribute_tensor(full, mesh, [Shard(dimension)]) for dimension in (0, 1))
    layers = layers_of(rank, {"stays": rows, "goes": rows}, lambda *_: None)
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


def test_a_layer_that_is_placed_otherwise_is_not_known_until_it_is_read(two) -> None:
    for rank, each in enumerate(two(move)):
        assert each["at first"] == ["stays", "goes"]
        assert each["moved"] == ["stays"]
        assert each["again"] == ["stays", "goes", "new"]
        assert each["before"] == ([0, 1, 2, 3], [4, 5, 6, 7])[rank]
        assert each["after"] == ([0, 2, 4, 6], [1, 3, 5, 7])[rank]
        assert each["words"] == "(Shard(dim=1),)"


def test_of_a_layer_that_was_not_read_no_element_lies_here(two) -> None:
    for each in two(move):
        assert each["contained"] == [True, True, False]
        assert each["of the new one"] == [0, 0, 0]


def replace(rank: int) -> list[tuple[int, int]]:
    """How many elements are expected of a layer, and of one of its name and another shape."""
    mesh = init_device_mesh("cpu", (SIZE,))
    layers, expected = ShardedLayers(every_third, rank), []
    for rows in (4, 6):
        layers.read({"it": distribute_tensor(torch.zeros(rows, 3), mesh, [Shard(0)])})
        expected.append(tuple(layers.expected(["it"])["it"]))
    return expected


def test_a_layer_of_another_shape_is_expected_to_have_other_elements(two) -> None:
    assert two(replace) == [[(12, 4), (18, 6)]] * 2


def channels(rank: int) -> dict[str, list[int]]:
    """Rows of 5 and 6 that lie here: of shards, of shards of shards, of what is whole here."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    layers = layers_of(rank, dict(fsdp_and_tensor_parallel(4).named_parameters()))
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


def test_channels_are_found_where_they_lie(four) -> None:
    ranks = four(channels)
    assert [each["five"] for each in ranks] == [[0, 1, 2]] * 2 + [[3, 4]] * 2
    assert [each["six"] for each in ranks] == [[0, 1, 2], [3, 4, 5]] * 2
    assert all(each["whole"] == [*range(5)] and each["number"] == [0] for each in ranks)
    assert sorted(row for each in ranks for row in each["up.weight"]) == [*range(48)]


def tear(rank: int) -> dict[str, list[str]]:
    """Of 48 and 64 columns each rank has 12 and 16; of 48 and 64 elements too."""
    names = ["up.weight", "down.weight", "up.bias", "down.bias", "norm.weight", "rows.weight"]
    layers = layers_of(rank, dict(fsdp_by_columns(4).named_parameters()))
    return {str(sizes): layers.torn(names, sizes) for sizes in ([4], [8], [16], [32], [4, 16], [])}


def test_layers_of_which_ranks_share_a_block_are_named_alike_on_all(four) -> None:
    for each in four(tear):
        assert each["[4]"] == each["[]"] == []
        assert each["[8]"] == each["[16]"] == each["[4, 16]"] == ["down.weight", "up.bias"]
        assert each["[32]"] == ["up.weight", "down.weight", "up.bias", "down.bias", "norm.weight"]
