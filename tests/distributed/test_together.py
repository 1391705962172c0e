"""What processes decide about a run is the same in all of them: steps, skips, who observes."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import nn

from altgrad import StepRecord, UpdateMonitor
from tests.distributed.sharded import fsdp
from tests.distributed.training import refused, sgd, train

SIZE = 2


def budget(rank: int) -> dict[str, Any]:
    """One process is slow at observing; both observe the same steps."""
    net = fsdp(SIZE)
    optimizer = sgd(net)
    records: list[StepRecord] = []
    watched = UpdateMonitor(net, records.append, overhead_budget=0.5, strict=True)
    measurer = watched._measuring._measurer
    measure = measurer.measure_batch
    measurer.measure_batch = lambda batch: (time.sleep(0.05 * rank), measure(batch))[1]
    with watched.attach(optimizer) as monitor:
        train(net, optimizer, 30)
        state = monitor.state_dict()["budgets"]
    return {
        "steps": [record.index for record in records],
        "seconds": [(record.own_seconds, record.training_seconds) for record in records],
        "state": state,
    }


def test_the_budget_is_of_the_slowest_and_the_same_for_all(two) -> None:
    first, second = two(budget)
    assert 1 < len(first["steps"]) < 20
    assert repr(first) == repr(second)
    assert max(own for own, _ in first["seconds"] if not math.isnan(own)) > 0.04


def skipped(rank: int) -> dict[str, int]:
    """Steps that were none: without gradients, and with a learning rate of 0."""
    net = fsdp(SIZE)
    optimizer = sgd(net)
    with UpdateMonitor(net, strict=True).attach(optimizer) as monitor:
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.0
        train(net, optimizer, 2)
        assert monitor.latest is None
        return dict(monitor.skipped)


def test_steps_that_were_none_are_counted_alike(two) -> None:
    for each in two(skipped):
        assert each == {"no gradients": 1, "learning rate 0": 2}


def replica(rank: int) -> dict[str, Any]:
    """Under DistributedDataParallel."""
    net = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
    optimizer = sgd(net)
    monitor = UpdateMonitor(net, strict=True).attach(optimizer)
    net(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    names = None if monitor.latest is None else [*monitor.latest.layers]
    return {"hooks": len(optimizer._optimizer_step_pre_hooks), "names": names}


def test_of_replicas_the_first_process_observes(two) -> None:
    first, second = two(replica)
    assert first == {"hooks": 1, "names": ["weight", "bias"]}
    assert second == {"hooks": 0, "names": None}


def second_optimizer(rank: int) -> dict[str, Any]:
    """Its refusal leaves the first one be."""
    net = fsdp(SIZE)
    optimizer = sgd(net)
    other = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    monitor = UpdateMonitor(net, strict=True).attach(optimizer)
    why = refused(lambda: monitor.attach(other))
    train(net, optimizer, 1)
    return {"why": why, "layers": len(monitor.latest.layers)}


def test_an_optimizer_that_is_refused_leaves_the_first_attached(two) -> None:
    for each in two(second_optimizer):
        assert "steps none of the observed parameters" in each["why"]
        assert each["layers"] > 5
