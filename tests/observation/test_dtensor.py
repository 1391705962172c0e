"""Local shards of DTensors, on one rank of a fake process group with four ranks."""

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
    describe_unreduced,
    find_fully_sharded,
    find_unreduced,
    get_local_gradients,
    is_sharded,
    is_sharded_module,
    register_shards,
    to_local_tensor,
    to_local_tensors,
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
    """Cut a tensor as `Shard` does: into equal chunks; the last may be shorter or missing."""
    parts = tensor.chunk(size, dimension)
    return parts[place] if place < len(parts) else tensor.narrow(dimension, 0, 0)


def placed(mesh: DeviceMesh, whole: Tensor, *placements) -> DTensor:
    """Return a DTensor made from its whole tensor, or from this rank's summand for `Partial`."""
    local = whole
    for size, place, placement in zip(mesh.shape, mesh.get_coordinate(), placements, strict=True):
        if isinstance(placement, Shard):
            local = own_part(local, placement.dim, size, place)
    shape = {"shape": whole.shape, "stride": whole.stride()}
    return DTensor.from_local(local, mesh, placements, run_check=False, **shape)


def is_unreduced(parameter: nn.Parameter) -> bool:
    return bool(find_unreduced({"w": parameter}))


def parameter(mesh: DeviceMesh, shape: tuple[int, ...], *placements) -> nn.Parameter:
    return nn.Parameter(placed(mesh, numbers(*shape), *placements))


# Local shards


def test_is_sharded_is_true_for_dtensors_only(mesh: DeviceMesh) -> None:
    assert is_sharded(placed(mesh, numbers(4), Shard(0)))
    assert is_sharded(parameter(mesh, (4,), Shard(0)))
    assert is_sharded(placed(mesh, numbers(4), Replicate()))
    for other in (numbers(4), nn.Parameter(numbers(4)), None):
        assert not is_sharded(other)


def test_the_local_shard_of_a_plain_tensor_is_itself() -> None:
    for tensor in (numbers(3), nn.Parameter(numbers(3))):
        assert to_local_tensor(tensor) is tensor


@pytest.mark.parametrize(
    ("shape", "dimension"),
    [((8, 3), 0), ((10, 3), 0), ((3, 8), 1), ((1, 3), 0)],
    ids=["even", "uneven", "columns", "nothing here"],
)
def test_the_local_shard_of_a_dtensor_shares_its_memory(
    mesh: DeviceMesh, shape: tuple[int, int], dimension: int
) -> None:
    shard = placed(mesh, numbers(*shape), Shard(dimension))
    with torch.no_grad():
        local = to_local_tensor(shard)
        assert torch.equal(local, own_part(numbers(*shape), dimension))
        local.fill_(-1.0)
        assert (shard.to_local() == -1).all()


def test_a_local_shard_that_is_still_in_flight_is_waited_for() -> None:
    arrived = numbers(2)
    on_its_way = SimpleNamespace(wait=lambda: arrived)
    assert to_local_tensor(SimpleNamespace(to_local=lambda: on_its_way, placements=())) is arrived


def test_the_local_shards_of_many_tensors_keep_their_order(mesh: DeviceMesh) -> None:
    plain, weights = numbers(3), nn.Parameter(numbers(4))
    shard = placed(mesh, numbers(8, 2), Shard(0))
    with torch.no_grad():
        local = to_local_tensors(iter([shard, weights, plain]))
    assert torch.equal(local[0], own_part(numbers(8, 2), 0))
    assert [each is whole for each, whole in zip(local[1:], (weights, plain), strict=True)] == [
        True,
        True,
    ]


# Gradients


@pytest.mark.parametrize("shape", [(8, 4), (10, 5)], ids=["even", "uneven"])
@pytest.mark.parametrize("dimension", [0, 1])
def test_a_whole_gradient_is_cut_to_the_local_shard(
    mesh: DeviceMesh, shape: tuple[int, int], dimension: int
) -> None:
    shard = parameter(mesh, shape, Shard(dimension))
    for gradient in (Replicate(), Shard(dimension)):
        shard.grad = placed(mesh, numbers(*shape) + 7, gradient)
        (local,) = get_local_gradients([shard])
        assert torch.equal(local, own_part(numbers(*shape) + 7, dimension))


def test_the_gradient_of_a_whole_parameter_is_whole(mesh: DeviceMesh) -> None:
    whole = nn.Parameter(numbers(2, 3))
    whole.grad = numbers(2, 3)
    everywhere = parameter(mesh, (2, 3), Replicate())
    everywhere.grad = placed(mesh, numbers(2, 3) + 7, Replicate())
    here, local = get_local_gradients([whole, everywhere])
    assert here is whole.grad
    assert torch.equal(local, numbers(2, 3) + 7)


def test_a_sparse_gradient_becomes_dense_with_repeated_entries_summed() -> None:
    parameter = nn.Parameter(numbers(3))
    parameter.grad = torch.sparse_coo_tensor(
        [[2, 0, 2]], [1.0, 2.0, 4.0], (3,), check_invariants=True
    )
    (dense,) = get_local_gradients([parameter])
    assert dense.layout == torch.strided
    assert dense.tolist() == [2, 0, 5]


@pytest.mark.parametrize(
    ("parameter_placement", "gradient_placement", "expected"),
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
def test_a_gradient_is_unreduced_unless_it_is_whole_or_placed_like_the_parameter(
    mesh: DeviceMesh, parameter_placement, gradient_placement, expected: bool
) -> None:
    shard = parameter(mesh, (8, 8), parameter_placement)
    assert not is_unreduced(shard)  # its gradient is missing
    shard.grad = placed(mesh, numbers(8, 8), gradient_placement)
    assert is_unreduced(shard) is expected


def test_a_gradient_is_unreduced_if_one_dimension_of_the_mesh_is(mesh: DeviceMesh) -> None:
    square = init_device_mesh("cpu", (2, 2))
    shard = parameter(square, (8, 8), Shard(0), Shard(1))
    for last, expected in ((Shard(1), False), (Replicate(), False), (Partial(), True)):
        shard.grad = placed(square, numbers(8, 8), Shard(0), last)
        assert is_unreduced(shard) is expected, last


def test_a_gradient_on_another_mesh_or_on_no_mesh_is_unreduced(mesh: DeviceMesh) -> None:
    shard = parameter(mesh, (8, 8), Shard(0))
    shard.grad = numbers(8, 8)
    assert is_unreduced(shard)
    other = init_device_mesh("cpu", (2, 2))
    shard.grad = None
    shard.grad = placed(other, numbers(8, 8), Replicate(), Replicate())
    assert is_unreduced(shard)


def test_a_whole_parameter_has_no_unreduced_gradient() -> None:
    whole = nn.Parameter(numbers(2))
    whole.grad = numbers(2)
    assert not is_unreduced(whole)


def test_parameters_with_unreduced_gradients_are_returned_by_name(mesh: DeviceMesh) -> None:
    named = {name: parameter(mesh, (8, 8), Shard(0)) for name in "abc"}
    named["d"] = nn.Parameter(numbers(2))
    for name in "ac":
        named[name].grad = placed(mesh, numbers(8, 8), Partial())
    named["b"].grad = placed(mesh, numbers(8, 8), Shard(0))
    named["d"].grad = numbers(2)
    assert find_unreduced(named).keys() == {"a", "c"}
    assert find_unreduced(named)["c"] is named["c"]
    assert find_unreduced({}) == {}


def test_the_description_of_an_unreduced_gradient_names_it_and_both_placements(
    mesh: DeviceMesh,
) -> None:
    shard = parameter(mesh, (8, 8), Shard(0))
    shard.grad = placed(mesh, numbers(8, 8), Partial())
    said = describe_unreduced("layer.weight", shard)
    assert said.startswith(f"the gradient of layer.weight is placed as {shard.grad.placements} ")
    assert f"the parameter as {shard.placements}: " in said
    shard.grad = None
    shard.grad = numbers(8, 8)
    assert "placed as None and" in describe_unreduced("w", shard)


# Modules


def evaluated(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        module(torch.ones(1, 4))
    return module


def test_modules_of_fully_shard_are_found_inside_other_modules(mesh: DeviceMesh) -> None:
    inner = fully_shard(nn.Linear(4, 4), mesh=mesh)
    module = nn.Sequential(nn.Linear(4, 4), nn.Sequential(inner))
    assert find_fully_sharded(module) == [inner]
    assert find_fully_sharded(fully_shard(module, mesh=mesh)) == [module, inner]
    assert find_fully_sharded(module[0]) == []


def test_register_shards_brings_back_the_shards_after_an_evaluation(mesh: DeviceMesh) -> None:
    module = fully_shard(nn.Sequential(nn.Linear(4, 4)), mesh=mesh)
    shards = [*module.parameters()]
    assert all(map(is_sharded, shards))
    assert not any(map(is_sharded, evaluated(module).parameters()))
    register_shards(module)
    assert [*map(id, module.parameters())] == [*map(id, shards)]
    assert module[0].weight.to_local().shape == (1, 4)


def test_a_module_of_fully_shard_is_sharded_while_its_parameters_are_whole(
    mesh: DeviceMesh,
) -> None:
    module = nn.Sequential(nn.Linear(4, 4))
    register_shards(module)  # without effect on a plain module
    assert not is_sharded_module(module)
    fully_shard(module, mesh=mesh)
    assert is_sharded_module(module)
    assert is_sharded_module(evaluated(module))


def test_a_module_with_a_dtensor_as_a_parameter_is_sharded(mesh: DeviceMesh) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = parameter(mesh, (4, 4), Shard(0))
    assert is_sharded_module(module)
    assert find_fully_sharded(module) == []


def test_a_plain_model_causes_no_import_of_torch_distributed() -> None:
    script = """
import sys
import torch
from altgrad.observation.dtensor import is_sharded_module, to_local_tensor, register_shards
model = torch.nn.Linear(1, 1)
register_shards(model)
assert not is_sharded_module(model)
assert to_local_tensor(model.weight) is model.weight
print([name for name in ("torch.distributed.tensor", "torch.distributed.fsdp")
       if name in sys.modules])
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert ended.stdout.strip() == "[]"
