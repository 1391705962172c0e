"""The state of twins on several ranks, resumed by as many, by more, and by one process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import distribute_tensor

from altgrad import Recipe, StepRecord, UpdateMonitor
from altgrad.twins.self_check import Check
from tests.distributed.sharded import Net, fsdp, whole
from tests.distributed.training import train
from tests.distributed.twinned import adamw

RECIPES = ["bf16", "bf16-true", Recipe("v", weights="bf16", states={"exp_avg_sq": "bf16"})]
SETTINGS: dict[str, Any] = {"recipes": RECIPES, "formats": ["bf16"], "every_n_steps": 2}
STEPS = 4


def load(net: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Set whole weights and optimizer states, of one process, in a net of any number of ranks."""
    names = {parameter: name for name, parameter in net.named_parameters()}
    for parameter, name in names.items():
        parameter.grad = torch.zeros_like(parameter) if name in saved["states"] else None
    optimizer.step()  # makes the states
    optimizer.zero_grad()
    with torch.no_grad():
        for parameter, name in names.items():
            put(parameter, saved["weights"][name])
            for key, value in saved["states"].get(name, {}).items():
                put(optimizer.state[parameter][key], value)


def put(tensor: Any, value: torch.Tensor) -> None:
    if hasattr(tensor, "device_mesh"):
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
    tensor.copy_(value)


def save(net: nn.Module, optimizer: torch.optim.Optimizer, monitor: UpdateMonitor) -> Any:
    state = optimizer.state
    return {
        "weights": {name: whole(parameter) for name, parameter in net.named_parameters()},
        "states": {
            name: {key: whole(value) for key, value in state[parameter].items()}
            for name, parameter in net.named_parameters()
            if parameter in state
        },
        "monitor": monitor.state_dict(),
    }


def train_and_save(rank: int, size: int, saved: Any = None) -> dict[str, Any]:
    """Train some steps, from the start or from what was saved; return state, figures, notices."""
    net = fsdp(size) if size > 1 else Net()
    optimizer = adamw(net.parameters())
    if saved is not None:
        load(net, optimizer, saved)
    records: list[Any] = []
    told: list[str] = []
    monitor = UpdateMonitor(net, records.append, warn=told.append, strict=True, **SETTINGS)
    if saved is not None:
        monitor.load_state_dict(copy.deepcopy(saved["monitor"]))
    monitor.attach(optimizer)
    train(net, optimizer, STEPS)
    return {
        "saved": save(net, optimizer, monitor),
        "figures": [list_figures(record) for record in records],
        "told": told,
        "checks": {*monitor.twins.checks.values()},
    }


def list_figures(record: StepRecord) -> dict[str, dict[str, float]]:
    return {name: dict(figures.twins) for name, figures in record.layers.items()}


@pytest.fixture(scope="module")
def uninterrupted() -> list[dict[str, dict[str, float]]]:
    """Return the figures of one process that trains twice as long."""
    net = Net()
    optimizer = adamw(net.parameters())
    records: list[StepRecord] = []
    with UpdateMonitor(net, records.append, strict=True, **SETTINGS).attach(optimizer):
        train(net, optimizer, STEPS)
        train(net, optimizer, STEPS)
    return [list_figures(record) for record in records]


def assert_goes_on(resumed: dict[str, Any], truth: list[dict[str, dict[str, float]]]) -> None:
    """Assert that a resumed run has the figures of the one that was never interrupted."""
    assert resumed["told"] == []
    assert resumed["checks"] == {Check.EQUAL}
    expected = truth[-len(resumed["figures"]) :]
    assert len(expected) == STEPS // 2
    for figures, others in zip(resumed["figures"], expected, strict=True):
        assert figures.keys() == others.keys()
        for layer, other in others.items():
            assert figures[layer].keys() == other.keys()
            for key, value in other.items():
                near = 0.04 if "_ratio/" in key else 1e-12
                found = figures[layer][key]
                assert found == pytest.approx(value, rel=near, abs=1e-15, nan_ok=True), (layer, key)


def resume(ranks: Any, size: int, saved: Any) -> list[dict[str, Any]]:
    return ranks(train_and_save, size, saved) if size > 1 else [train_and_save(0, 1, saved)]


@pytest.mark.parametrize(
    "sizes",
    [(2, 2), (2, 1), (1, 2), *(pytest.param(s, marks=pytest.mark.slow) for s in [(2, 4), (4, 2)])],
    ids=str,
)
def test_twins_go_on_with_any_number_of_ranks(sizes, request, uninterrupted) -> None:
    pools = {1: None, 2: "two", 4: "four"}
    before, after = (pools[s] and request.getfixturevalue(pools[s]) for s in sizes)
    first = resume(before, sizes[0], None)
    assert_goes_on(first[0], uninterrupted[: STEPS // 2])
    saved = first[0]["saved"]
    for each in first[1:]:
        assert repr(each["saved"]["monitor"]) == repr(saved["monitor"])
    for each in resume(after, sizes[1], saved):
        assert_goes_on(each, uninterrupted)
