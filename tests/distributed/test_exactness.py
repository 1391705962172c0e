"""Processes that share a model come to the figures of one that has all of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from altgrad import SamplingRule, UpdateMonitor, model_figures
from tests.distributed.comparing import differences
from tests.distributed.sharded import Net, WholeSteps, replayed, strategies
from tests.processes import run

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


def observe(rank: int, size: int) -> dict[str, Any]:
    return {each.__name__: observe_one(each, size) for each in strategies(size)}


def observe_one(make: Any, size: int) -> dict[str, Any]:
    """Differences, by setting, from what one process says, and what this one says."""
    net = make(size)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    truth = WholeSteps(net, optimizer)
    records = {name: [] for name in SETTINGS}
    told: list[str] = []
    monitors = {
        name: UpdateMonitor(net, records[name].append, tell=told.append, strict=True, **settings)
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
        left_out = {layer for text in told for layer in Net().state_dict() if layer in text}
        for own, other in zip(records[name], reference.records, strict=False):
            layers = left_out if name == "blocks" else set()
            found = differences(own, without(other, layers))
            problems += [f"{name} {own.index}: {each}" for each in found]
        bits, true_bits = states[name]["ever_moved"], reference.final_state["ever_moved"]
        for layer in bits:
            same = bits[layer][0] == true_bits[layer][0]
            if not same or not torch.equal(bits[layer][1], true_bits[layer][1]):
                problems.append(f"{name}: ever_moved of {layer}")
    vectors = [record.model._table.vectors for name in SETTINGS for record in records[name]]
    return {"problems": problems, "vectors": vectors, "told": told}


def without(record, left_out):
    if not left_out:
        return record
    layers = {name: each for name, each in record.layers.items() if name not in left_out}
    return replace(record, layers=layers, model=model_figures([*layers.values()]))


def train(net: Any, optimizer: torch.optim.Optimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        rows = torch.randint(0, 7, (6,), generator=generator)
        optimizer.zero_grad()
        net(rows).backward()
        optimizer.step()


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def observed(request) -> tuple[int, list[dict[str, Any]]]:
    return request.param, run(observe, request.param, request.param)


def test_all_processes_come_to_the_figures_of_one(observed) -> None:
    size, ranks = observed
    assert ranks[0].keys() == {each.__name__ for each in strategies(size)}
    for strategy, seen in ranks[0].items():
        assert seen["problems"] == [], (strategy, seen["told"])


def test_all_processes_say_the_same(observed) -> None:
    _, ranks = observed
    for other in ranks[1:]:
        for strategy, seen in ranks[0].items():
            pairs = zip(seen["vectors"], other[strategy]["vectors"], strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
            assert other[strategy]["told"] == []
