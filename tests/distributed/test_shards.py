"""`Shard` finds the elements that torch places on each rank, and counts each element once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard as Cut, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from altgrad import UpdateMonitor
from altgrad.distributed.shards import Shard, empty_part
from tests.distributed.sharded import fsdp_and_tensor_parallel
from tests.distributed.training import refused
from tests.strategies import thorough

# Layouts made by torch

SHAPES = [
    (),
    (1,),
    (5,),
    (8,),
    (7, 5),
    (2, 9),
    (8, 0),
    (3, 4, 5),
]  # some have fewer elements than ranks


def each_layout(shape: Sequence[int], dimensions: int) -> list[tuple[Placement, ...]]:
    placements = [Replicate(), *map(Cut, range(len(shape)))]
    return [*itertools.product(placements, repeat=dimensions)]


def laid_by_torch(rank: int) -> dict[str, tuple[Tensor, Shard]]:
    """Return local elements and shard for each layout; elements are their own flat indices."""
    found = {}
    for size in [(4,), (2, 2)]:
        mesh = init_device_mesh("cpu", size)
        for shape in SHAPES:
            whole = torch.arange(math.prod(shape)).view(shape)
            for placements in each_layout(shape, len(size)):
                laid = distribute_tensor(whole, mesh, placements)
                shard = Shard.read("it", laid, rank)
                found[f"{shape} {size} {placements}"] = laid.to_local().flatten(), shard
    return found


def assert_each_element_counts_once(ranks: list[dict[str, tuple[Tensor, Shard]]]) -> None:
    for layout in ranks[0]:
        held, shards = zip(*(each[layout] for each in ranks), strict=True)
        numel = math.prod(shards[0].shape)
        for elements in (None, torch.arange(0, numel, 2)):
            parts = [shard.find_part(elements) for shard in shards]
            for local, shard, part in zip(held, shards, parts, strict=True):
                own = local if shard.counts else local[:0]
                own = own if elements is None else own[own % 2 == 0]
                assert torch.equal(part.indices, own), layout
                if part.local is not None:
                    assert torch.equal(local[part.local], own), layout
            positions = torch.cat([part.positions for part in parts]).sort().values
            assert torch.equal(positions, torch.arange(len(positions))), layout
            assert len(positions) == (numel if elements is None else len(elements)), layout


def test_shards_match_torch_and_count_each_element_once(four) -> None:
    ranks = four(laid_by_torch)
    assert len(ranks[0]) == 76
    assert_each_element_counts_once(ranks)


def test_only_replicas_have_the_same_part(four) -> None:
    ranks = four(laid_by_torch)
    for layout in ranks[0]:
        pairs = itertools.combinations([each[layout] for each in ranks], 2)
        for (local, shard), (other_local, other) in pairs:
            assert shard.part[1] == other.part[1], layout
            if len(local) and len(other_local):
                is_same = torch.equal(local, other_local)
                assert (shard.part == other.part) == is_same, layout


def fully_shard_after_tensor_parallel(rank: int) -> dict[str, tuple[Tensor, Shard]]:
    """Return the local elements and the shard of each parameter that is sharded twice."""
    found = {}
    for name, parameter in fsdp_and_tensor_parallel(4).named_parameters():
        if parameter.device_mesh.ndim == 2:
            mesh, placements = parameter.device_mesh, parameter.placements
            whole = torch.arange(float(parameter.numel())).view(parameter.shape)
            copies = distribute_tensor(whole, mesh, [Replicate()] * 2)
            parameter.data.copy_(copies.redistribute(placements=placements))
            local = parameter.to_local().detach().flatten().long()
            found[f"{name} {placements}"] = local, Shard.read(name, parameter, rank)
    return found


def test_nested_shards_match_torch_and_count_each_element_once(four) -> None:
    ranks = four(fully_shard_after_tensor_parallel)
    assert any("_StridedShard" in layout for layout in ranks[0])
    assert_each_element_counts_once(ranks)


# On any mesh


class Laid:
    """A stand-in for a DTensor on one rank of a mesh; each element is its own flat index."""

    def __init__(
        self,
        shape: Sequence[int],
        mesh: Sequence[int],
        placements: Sequence[Placement],
        coordinate: Sequence[int],
    ) -> None:
        ranks = torch.arange(math.prod(mesh)).view(*mesh)
        self.shape, self.placements = torch.Size(shape), placements
        self.device_mesh = SimpleNamespace(
            mesh=ranks, shape=tuple(mesh), get_coordinate=lambda: coordinate
        )
        self.rank = int(ranks[tuple(coordinate)])
        self.local = torch.arange(math.prod(shape)).view(*shape)
        for placement, parts, own in zip(placements, mesh, coordinate, strict=True):
            if isinstance(placement, Cut):
                self.local = chunk(self.local, parts, own, placement.dim)

    def detach(self) -> Laid:
        return self

    def to_local(self) -> Tensor:
        return self.local


def chunk(tensor: Tensor, parts: int, own: int, dimension: int = 0) -> Tensor:
    """Return one chunk of `torch.chunk`; it is empty if torch returns fewer chunks than `parts`."""
    chunks = torch.chunk(tensor, parts, dimension)
    return chunks[own] if own < len(chunks) else tensor.narrow(dimension, 0, 0)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[int], list[int], list[Placement]]:
    """Draw shape, mesh and placements; some shards are uneven, some are empty."""
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    mesh = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    placement = st.just(Replicate()) | st.integers(0, len(shape) - 1).map(Cut)
    return shape, mesh, [draw(placement) for _ in mesh]


def everywhere(shape, mesh, placements) -> list[Laid]:
    coordinates = itertools.product(*map(range, mesh))
    return [Laid(shape, mesh, placements, coordinate) for coordinate in coordinates]


@thorough
@given(layouts(), st.data())
def test_each_element_in_a_sample_is_found_on_the_rank_that_holds_it(layout, data) -> None:
    numel = math.prod(layout[0])
    sample = torch.tensor(sorted(data.draw(st.sets(st.integers(0, numel - 1)))), dtype=torch.int64)
    found = []
    for laid in everywhere(*layout):
        shard = Shard.read("it", laid, laid.rank)
        part = shard.find_part(sample)
        assert torch.equal(part.indices, sample[part.positions])
        assert torch.equal(laid.local.flatten()[part.local], part.indices)
        found.append(part.positions)
    assert torch.equal(torch.cat(found).sort().values, torch.arange(len(sample)))


@thorough
@given(layouts(), st.integers(1, 10))
def test_a_block_is_torn_if_a_rank_holds_only_some_columns(layout, block: int) -> None:
    shape, mesh, placements = layout
    columns = torch.arange(shape[-1])
    along = [isinstance(p, Cut) and p.dim == len(shape) - 1 for p in placements]
    is_torn = False
    for coordinate in itertools.product(*map(range, mesh)):
        held = columns
        for is_cut, parts, own in zip(along, mesh, coordinate, strict=True):
            held = chunk(held, parts, own) if is_cut else held
        for whole in columns.split(block):
            here = int(torch.isin(whole, held).sum())
            is_torn |= 0 < here < len(whole)
    tears = {Shard.read("it", each, each.rank).tears(block) for each in everywhere(*layout)}
    assert tears == {is_torn}


def test_the_first_rank_counts_all_elements_if_a_tensor_is_not_a_dtensor() -> None:
    first, second = (Shard.read("it", torch.zeros(2, 3), rank) for rank in (0, 1))
    assert first.part == second.part == (0, 1)
    assert first.find_part(None).indices.tolist() == [*range(6)]
    assert first.find_part(None).local is None
    for part in (second.find_part(None), second.find_part(torch.tensor([1])), empty_part()):
        assert [*map(len, part)] == [0, 0, 0]


def test_a_mesh_without_the_first_rank_holds_replicas() -> None:
    laid = Laid([4], [2], [Cut(0)], [1])
    laid.device_mesh.mesh += 2
    shard = Shard.read("it", laid, 3)
    assert shard.part == (1, 2)
    assert [*map(len, shard.find_part(None))] == [0, 0, 0]


# Refused placements


class Ragged(Placement):
    """A placement that another library defines."""


@pytest.mark.parametrize("placement", [Partial(), Ragged()], ids=["partial", "unknown"])
def test_placements_other_than_shards_and_replicas_are_refused_by_name(placement) -> None:
    laid = Laid([4, 4], [2, 2], [Cut(0), placement], [0, 0])
    with pytest.raises(
        ValueError, match=r"^up.weight.placements=.*: expected shards .*; redistribute it"
    ):
        Shard.read("up.weight", laid, 0)


def test_a_rank_outside_the_mesh_refuses_the_tensor() -> None:
    laid = Laid([4], [2], [Cut(0)], [0])
    laid.device_mesh.get_coordinate = lambda: None
    with pytest.raises(
        ValueError, match=r"^up.weight: expected .* got ranks \[0, 1\] without rank 2; "
    ):
        Shard.read("up.weight", laid, 2)


def test_a_shard_whose_shape_contradicts_its_placements_is_refused() -> None:
    laid = Laid([6, 4], [3], [Cut(0)], [1])
    laid.local = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"shape \(2, 4\) from \(6, 4\) .* got \(3, 4\); "):
        Shard.read("up.weight", laid, 1)


def partial(rank: int) -> str:
    mesh = init_device_mesh("cpu", (2,))
    parameter: Any = DTensor.from_local(torch.ones(3), mesh, [Partial()]).requires_grad_()
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    return refused(lambda: UpdateMonitor([("bias", parameter)]).attach(optimizer))


def test_a_monitor_refuses_partial_tensors_on_every_rank(two) -> None:
    for each in two(partial):
        assert each.startswith("ValueError: bias.placements=(Partial(sum),): expected shards")
        assert "redistribute it" in each
