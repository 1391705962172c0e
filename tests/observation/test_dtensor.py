"""Which part of a DTensor lies here: told of one rank of four, of which the others are made up."""

import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from altgrad.observation.dtensor import (
    fully_sharded,
    is_sharded,
    is_sharded_module,
    is_unreduced,
    local_gradient_of,
    local_of,
    register_shards,
    unreduced_message,
)

RANK, SIZE = 1, 4


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    distributed.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=SIZE)
    yield init_device_mesh("cpu", (SIZE,))
    distributed.destroy_process_group()


def numbers(*shape: int) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


def own_part(tensor: Tensor, dimension: int, size: int = SIZE, place: int = RANK) -> Tensor:
    """As torch cuts a tensor: chunks of one size, of which the last may be shorter or missing."""
    parts = tensor.chunk(size, dimension)
    return parts[place] if place < len(parts) else tensor.narrow(dimension, 0, 0)


def placed(mesh: DeviceMesh, whole: Tensor, *placements) -> DTensor:
    """The one of which this is the whole; of a sum, what this rank adds."""
    local = whole
    for size, place, placement in zip(mesh.shape, mesh.get_coordinate(), placements, strict=True):
        if isinstance(placement, Shard):
            local = own_part(local, placement.dim, size, place)
    shape = {"shape": whole.shape, "stride": whole.stride()}
    return DTensor.from_local(local, mesh, placements, run_check=False, **shape)


def parameter(mesh: DeviceMesh, shape: tuple[int, ...], *placements) -> nn.Parameter:
    return nn.Parameter(placed(mesh, numbers(*shape), *placements))


# What lies here


def test_a_dtensor_is_told_from_a_tensor(mesh: DeviceMesh) -> None:
    assert is_sharded(placed(mesh, numbers(4), Shard(0)))
    assert is_sharded(parameter(mesh, (4,), Shard(0)))
    assert is_sharded(placed(mesh, numbers(4), Replicate()))
    for other in (numbers(4), nn.Parameter(numbers(4)), None):
        assert not is_sharded(other)


def test_a_plain_tensor_lies_here_itself() -> None:
    for tensor in (numbers(3), nn.Parameter(numbers(3))):
        assert local_of(tensor) is tensor


@pytest.mark.parametrize(
    ("shape", "dimension"),
    [((8, 3), 0), ((10, 3), 0), ((3, 8), 1), ((1, 3), 0)],
    ids=["even", "uneven", "columns", "nothing here"],
)
def test_of_a_shard_its_part_lies_here_in_its_own_memory(
    mesh: DeviceMesh, shape: tuple[int, int], dimension: int
) -> None:
    shard = placed(mesh, numbers(*shape), Shard(dimension))
    with torch.no_grad():
        local = local_of(shard)
        assert torch.equal(local, own_part(numbers(*shape), dimension))
        local.fill_(-1.0)
        assert (shard.to_local() == -1).all()


def test_a_part_that_is_still_on_its_way_is_waited_for() -> None:
    arrived = numbers(2)
    on_its_way = SimpleNamespace(wait=lambda: arrived)
    assert local_of(SimpleNamespace(to_local=lambda: on_its_way, placements=())) is arrived


# Gradients


@pytest.mark.parametrize("shape", [(8, 4), (10, 5)], ids=["even", "uneven"])
@pytest.mark.parametrize("dimension", [0, 1])
def test_of_a_whole_gradient_the_part_of_the_shard_is_cut_out(
    mesh: DeviceMesh, shape: tuple[int, int], dimension: int
) -> None:
    shard = parameter(mesh, shape, Shard(dimension))
    for gradient in (Replicate(), Shard(dimension)):
        local = local_gradient_of(shard, placed(mesh, numbers(*shape) + 7, gradient))
        assert torch.equal(local, own_part(numbers(*shape) + 7, dimension))


def test_the_gradient_of_a_whole_parameter_is_whole(mesh: DeviceMesh) -> None:
    gradient = numbers(2, 3)
    assert local_gradient_of(nn.Parameter(numbers(2, 3)), gradient) is gradient
    everywhere = parameter(mesh, (2, 3), Replicate())
    local = local_gradient_of(everywhere, placed(mesh, numbers(2, 3) + 7, Replicate()))
    assert torch.equal(local, numbers(2, 3) + 7)


@pytest.mark.parametrize(
    ("of_parameter", "of_gradient", "unreduced"),
    [
        (Shard(0), Shard(0), False),
        (Shard(0), Replicate(), False),
        (Replicate(), Replicate(), False),
        (Shard(0), Partial(), True),
        (Replicate(), Partial(), True),
        (Shard(0), Shard(1), True),
        (Replicate(), Shard(0), True),
    ],
    ids=str,
)
def test_a_gradient_is_unreduced_unless_it_is_whole_or_placed_as_the_parameter(
    mesh: DeviceMesh, of_parameter, of_gradient, unreduced: bool
) -> None:
    shard = parameter(mesh, (8, 8), of_parameter)
    assert not is_unreduced(shard)  # it has none
    shard.grad = placed(mesh, numbers(8, 8), of_gradient)
    assert is_unreduced(shard) is unreduced


def test_one_dimension_of_the_mesh_that_is_not_reduced_is_enough(mesh: DeviceMesh) -> None:
    square = init_device_mesh("cpu", (2, 2))
    shard = parameter(square, (8, 8), Shard(0), Shard(1))
    for last, unreduced in ((Shard(1), False), (Replicate(), False), (Partial(), True)):
        shard.grad = placed(square, numbers(8, 8), Shard(0), last)
        assert is_unreduced(shard) is unreduced, last


def test_a_gradient_that_is_none_of_the_same_processes_is_unreduced(mesh: DeviceMesh) -> None:
    shard = parameter(mesh, (8, 8), Shard(0))
    shard.grad = numbers(8, 8)
    assert is_unreduced(shard)
    other = init_device_mesh("cpu", (2, 2))
    shard.grad = None
    shard.grad = placed(other, numbers(8, 8), Replicate(), Replicate())
    assert is_unreduced(shard)


def test_a_parameter_that_is_whole_has_no_unreduced_gradient() -> None:
    whole = nn.Parameter(numbers(2))
    whole.grad = numbers(2)
    assert not is_unreduced(whole)


def test_what_is_said_of_an_unreduced_gradient_names_it_and_both_placements(
    mesh: DeviceMesh,
) -> None:
    shard = parameter(mesh, (8, 8), Shard(0))
    shard.grad = placed(mesh, numbers(8, 8), Partial())
    said = unreduced_message("layer.weight", shard)
    assert said.startswith(f"the gradient of layer.weight is placed as {shard.grad.placements} ")
    assert f"the parameter as {shard.placements}: " in said
    shard.grad = None
    shard.grad = numbers(8, 8)
    assert "placed as None and" in unreduced_message("w", shard)


# Modules


def evaluated(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        module(torch.ones(1, 4))
    return module


def test_modules_of_fully_shard_are_found_inside_of_others(mesh: DeviceMesh) -> None:
    inner = fully_shard(nn.Linear(4, 4), mesh=mesh)
    module = nn.Sequential(nn.Linear(4, 4), nn.Sequential(inner))
    assert fully_sharded(module) == [inner]
    assert fully_sharded(fully_shard(module, mesh=mesh)) == [module, inner]
    assert fully_sharded(module[0]) == []


def test_after_an_evaluation_the_shards_are_registered_again(mesh: DeviceMesh) -> None:
    module = fully_shard(nn.Sequential(nn.Linear(4, 4)), mesh=mesh)
    shards = [*module.parameters()]
    assert all(map(is_sharded, shards))
    assert not any(map(is_sharded, evaluated(module).parameters()))
    register_shards(module)
    assert [*map(id, module.parameters())] == [*map(id, shards)]
    assert module[0].weight.to_local().shape == (1, 4)


def test_a_sharded_module_is_one_also_while_its_parameters_are_whole(mesh: DeviceMesh) -> None:
    module = nn.Sequential(nn.Linear(4, 4))
    register_shards(module)  # nothing to do
    assert not is_sharded_module(module)
    fully_shard(module, mesh=mesh)
    assert is_sharded_module(module)
    assert is_sharded_module(evaluated(module))


def test_a_module_with_a_dtensor_for_a_parameter_is_sharded(mesh: DeviceMesh) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = parameter(mesh, (4, 4), Shard(0))
    assert is_sharded_module(module)
    assert fully_sharded(module) == []


def test_asking_a_plain_model_imports_none_of_it() -> None:
    script = """
import sys
import torch
from altgrad.observation.dtensor import is_sharded_module, local_of, register_shards
model = torch.nn.Linear(1, 1)
register_shards(model)
assert not is_sharded_module(model)
assert local_of(model.weight) is model.weight
print([name for name in ("torch.distributed.tensor", "torch.distributed.fsdp")
       if name in sys.modules])
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert ended.stdout.strip() == "[]"
