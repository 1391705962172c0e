"""Ranks that shard a model give the figures of one process that holds the whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from altgrad import SamplingRule, UpdateMonitor
from tests.distributed.comparing import differences, plain, without
from tests.distributed.sharded import Net, WholeSteps, replayed, strategies
from tests.distributed.training import sgd, train
from tests.distributed.watched import Watched
from tests.processes import run

# Every strategy, on one to four ranks

STEPS = 4
SETTINGS: dict[str, dict[str, Any]] = {
    "sampled": {"max_elements": 300},
    "all": {"max_elements": None, "scaling": "channel", "every_n_steps": 2},
    "blocks": {
        "formats": ["mxfp8_e4m3", "e4m3fn"],
        "scaling": ("block", 16),
        "sampling": [SamplingRule("*.bias", enabled=False), SamplingRule("*norm*", enabled=False)],
    },
}


def observe_one(make: Any, size: int) -> dict[str, Any]:
    """Return the differences from one process, the figures, and the notices of this rank."""
    net = make(size)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    truth = WholeSteps(net, optimizer)
    records = {name: [] for name in SETTINGS}
    told: list[str] = []
    monitors = {
        name: UpdateMonitor(net, records[name].append, warn=told.append, strict=True, **settings)
        for name, settings in SETTINGS.items()
    }
    for each in monitors.values():
        each.attach(optimizer)
    train(net, optimizer, STEPS)
    states = {name: each.state_dict() for name, each in monitors.items()}
    expected = {name: replayed(truth.steps, **settings) for name, settings in SETTINGS.items()}
    problems = []
    for name, reference in expected.items():
        if len(records[name]) != len(reference.records) or not records[name]:
            problems.append(f"{name}: {len(records[name])} records")
        named = {layer for text in told for layer in Net().state_dict() if layer in text}
        left_out = named if name == "blocks" else set()
        for own, other in zip(records[name], reference.records, strict=False):
            found = differences(own, without(other, left_out))
            problems += [f"{name} {own.index}: {each}" for each in found]
        bits, true_bits = states[name]["ever_moved"], reference.final_state["ever_moved"]
        moved = {layer for layer, (_, each) in true_bits.items() if each.any()}
        if bits.keys() != moved - left_out:
            problems.append(f"{name}: ever_moved of {sorted(bits)} for {sorted(moved)}")
        for layer in bits:
            same = bits[layer][0] == true_bits[layer][0]
            if not same or not torch.equal(bits[layer][1], true_bits[layer][1]):
                problems.append(f"{name}: ever_moved of {layer}")
    figures = [plain(record) for name in SETTINGS for record in records[name]]
    return {"problems": problems, "figures": figures, "told": told}


def observe(rank: int, size: int) -> dict[str, Any]:
    return {each.__name__: observe_one(each, size) for each in strategies(size)}


@pytest.fixture(
    scope="module",
    params=[2, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 3, 4))],
)
def observed(request) -> tuple[int, list[dict[str, Any]]]:
    return request.param, run(observe, request.param, request.param)


def test_every_rank_gives_the_figures_of_one_process(observed) -> None:
    size, ranks = observed
    assert ranks[0].keys() == {each.__name__ for each in strategies(size)}
    for strategy, seen in ranks[0].items():
        assert seen["problems"] == [], (strategy, seen["told"])


def test_all_ranks_give_the_same_figures_bit_for_bit(observed) -> None:
    _, ranks = observed
    for other in ranks[1:]:
        for strategy, seen in ranks[0].items():
            assert seen["figures"] == other[strategy]["figures"]
            assert seen["figures"]
            assert other[strategy]["told"] == []


# Odd parameters


class Empty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.odd_names = nn.ParameterDict({"\udc80": torch.ones(4)})
        self.nothing = nn.Parameter(torch.zeros(3, 0))
        self.weight = nn.Parameter(torch.randn(5, 4))

    def forward(self, rows):
        odd = self.odd_names["\udc80"]
        return (self.weight * odd).square().sum()  # FSDP2 cannot reduce an empty tensor


def empty(rank: int) -> dict[str, Any]:
    net = fully_shard(Empty(), mesh=init_device_mesh("cpu", (2,)))
    optimizer = sgd(net)
    watched = Watched(net, optimizer)
    train(net, optimizer, 2)
    return {"problems": watched.problems(), "layers": [*watched.records[-1].layers]}


def test_parameters_without_elements_and_with_odd_names_are_observed(two) -> None:
    for each in two(empty):
        assert each["problems"] == []
        assert set(each["layers"]) >= {"weight", "odd_names.\udc80"}
