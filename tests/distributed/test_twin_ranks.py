"""Twins of layers that several ranks share give the figures of one process."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from altgrad import Recipe, UpdateMonitor
from altgrad.twins.lane import Lane
from altgrad.twins.self_check import Check
from tests.distributed.listening import Listening
from tests.distributed.sharded import fsdp, strategies, whole
from tests.distributed.training import train
from tests.distributed.twinned import Twinned, adamw, compare_twins

RECIPES = ["bf16", "bf16-true", Recipe("e5m2-v", weights="e4m3fn")]


def compare(rank: int, size: int, makes: list[Any]) -> dict[str, Any]:
    """Return for each strategy the differences from one process, and the checks and notices."""
    seen = {}
    for make in makes:
        twinned = Twinned(make(size), recipes=RECIPES, formats=["bf16"], every_n_steps=2)
        twinned.train(6)
        alone, records = twinned.run_alone()
        checks = {*twinned.monitor.twins.checks.values()}
        seen[make.__name__] = {
            "problems": [*compare_twins(twinned.records, records)],
            "names": twinned.monitor.twins.checks.keys() ^ alone.twins.checks.keys(),
            "checks": checks,
            "told": twinned.told,
        }
    return seen


def test_two_ranks_give_the_figures_of_one_process(two) -> None:
    for seen in two(compare, 2, [fsdp]):
        assert seen["fsdp"] == {
            "problems": [],
            "names": set(),
            "checks": {Check.EQUAL},
            "told": [],
        }


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_strategy_gives_the_figures_of_one_process(size: int, request) -> None:
    ranks = request.getfixturevalue({2: "two", 3: "three", 4: "four"}[size])
    for seen in ranks(compare, size, strategies(size), limit=200.0):
        for strategy, found in seen.items():
            assert found["problems"] == [], strategy
            assert found["checks"] == {Check.EQUAL}, strategy
            assert found["names"] == set(), strategy


# What the run notices


def train_with(rank: int, recipes: Any) -> dict[str, Any]:
    """Return the weights after some steps, and the collectives of an observed and another one."""
    net = fsdp(2)
    optimizer = adamw(net.parameters())
    monitor = UpdateMonitor(net, recipes=recipes, formats=["bf16"], every_n_steps=2, strict=True)
    monitor.attach(optimizer)
    train(net, optimizer, 3)
    said = []
    for _ in range(2):
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        state = torch.get_rng_state()
        with Listening() as each:
            optimizer.step()
        said.append([name for name, _ in each.said])
        assert torch.equal(torch.get_rng_state(), state)
    weights = [whole(parameter) for parameter in net.parameters()]
    return {"said": said, "weights": weights, "keys": [*monitor.latest.model.twins]}


def test_twins_change_neither_the_training_nor_the_number_of_collectives(two) -> None:
    with_twins, without = two(train_with, ["bf16", "bf16-sr"])[1], two(train_with, ())[1]
    assert with_twins["said"] == without["said"] == [["allreduce"] * 2, []]
    assert with_twins["keys"]
    assert without["keys"] == []
    for one, other in zip(with_twins["weights"], without["weights"], strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


# Roundings that depend on the place of an element


def check_places(rank: int, dtype: torch.dtype, flags: dict[str, Any]) -> dict[str, Any]:
    """Return checks, notices and sizes of layers whose shards have tails, or are small."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(65, 130), nn.ReLU(), nn.LayerNorm(130), nn.Linear(130, 10))
    fully_shard(net.to(dtype), mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, **flags)
    told: list[str] = []
    records: list[Any] = []
    monitor = UpdateMonitor(
        net, records.append, recipes=["bf16-true"], warn=told.append, strict=True
    ).attach(optimizer)
    for index in range(8):
        inputs = torch.randn(32, 65, generator=torch.Generator().manual_seed(index))
        optimizer.zero_grad()
        net(inputs.to(dtype)).float().square().mean().backward()
        optimizer.step()
    model = records[-1].model.twins
    return {"checks": monitor.twins.checks, "told": told, "model": dict(model)}


@pytest.mark.parametrize(
    ("dtype", "flags"), [(torch.bfloat16, {}), (torch.float32, {"fused": True})]
)
def test_each_rank_steps_its_shards_as_the_run_does(two, dtype, flags) -> None:
    first, second = two(check_places, dtype, flags)
    assert {*first["checks"].values()} == {Check.EQUAL}
    assert [each for each in first["told"] if "twin" in each] == []
    assert second["told"] == []
    assert len(first["checks"]) == 6
    assert repr(first["model"]) == repr(second["model"])


def fine_tune_low(rank: int, size: int) -> list[dict[str, dict[str, float]]]:
    """Train a net in bf16, whose shards have no tails, and return the figures of its layers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.Linear(128, 64)).bfloat16()
    if size > 1:
        fully_shard(net, mesh=init_device_mesh("cpu", (size,)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    records: list[Any] = []
    monitor = UpdateMonitor(
        net, records.append, recipes=["bf16-kahan"], formats=[], warn=lambda _: None, strict=True
    ).attach(optimizer)
    for index in range(6):
        inputs = torch.randn(32, 64, generator=torch.Generator().manual_seed(index))
        optimizer.zero_grad()
        net(inputs.bfloat16()).float().square().mean().backward()
        optimizer.step()
    monitor.detach()
    return [{n: dict(f.twins) for n, f in record.layers.items()} for record in records]


def test_a_run_that_is_low_itself_has_the_figures_of_one_process(two) -> None:
    alone, (first, second) = fine_tune_low(0, 1), two(fine_tune_low, 2)
    assert repr(first) == repr(second)
    for found, truth in zip(first, alone, strict=True):
        assert found.keys() == truth.keys()
        for name, figures in truth.items():
            assert "frozen_frac/now" in figures
            near = {key: 0.04 if "_ratio/" in key else 1e-12 for key in figures}
            for key, value in figures.items():
                assert found[name][key] == pytest.approx(value, rel=near[key], nan_ok=True), key


# Errors


def fail_on_one(rank: int) -> dict[str, Any]:
    """End the twins of rank 1 at the third step."""
    net = fsdp(2)
    optimizer = adamw(net.parameters())
    told: list[str] = []
    records: list[Any] = []
    monitor = UpdateMonitor(net, records.append, recipes=["bf16"], formats=[], warn=told.append)
    monitor.attach(optimizer)
    train(net, optimizer, 2)
    if rank == 1:
        with mock.patch.object(Lane, "step", side_effect=ArithmeticError("no more")):
            train(net, optimizer, 1)
    else:
        train(net, optimizer, 1)
    train(net, optimizer, 2)
    figures = [dict(record.layers["up.weight"].twins) for record in records]
    return {"told": told, "figures": figures, "observing": monitor.is_observing}


def test_twins_that_end_on_one_rank_end_the_figures_of_their_layers_everywhere(two) -> None:
    first, second = two(fail_on_one)
    for each in (first, second):
        assert each["observing"]
        assert [bool(figures) for figures in each["figures"]] == [True, True, False, False, False]
    (notice,) = first["told"]
    assert "has no figures of the twins of bf16 in" in notice
    (notice,) = second["told"]
    assert "ends all twins after an error: ArithmeticError('no more')" in notice
