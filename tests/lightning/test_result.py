"""`Result`: empty at first, and then with the figures of the last record."""

import pickle

import torch

from altgrad import StepRecord, UpdateMonitor
from altgrad_lightning.result import Result


def records(count: int) -> list[StepRecord]:
    found: list[StepRecord] = []
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with UpdateMonitor(layer, found.append, strict=True).attach(optimizer):
        for _ in range(count):
            layer(torch.ones(1, 2)).sum().backward()
            optimizer.step()
    return found


def test_the_latest_figures_are_those_of_the_last_record() -> None:
    result = Result()
    assert (result.latest, result.latest_model, result.latest_step) == ({}, None, None)
    for step, record in zip((3, 7), records(2), strict=True):
        result.note(step, record)
        assert result.latest is record.layers
        assert result.latest_model is record.model
        assert result.latest_step == step
    copied = pickle.loads(pickle.dumps(result))
    assert copied.latest.keys() == {"weight", "bias"}
    assert copied.latest_step == 7


def test_two_results_are_independent() -> None:
    first, second = Result(), Result()
    first.skipped["inf"] += 1
    first.state["monitor"] = {}
    assert second == Result()
