"""`Together` gives every rank the same knowledge and the same decisions."""

from __future__ import annotations

import math
import time
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from altgrad import StepRecord, UpdateMonitor
from altgrad.distributed.together import Together
from altgrad.measurement.measurer import Measurer
from altgrad.quantization.formats import Scaling
from tests.distributed.parameters import Parameters, attached
from tests.distributed.sharded import (
    fsdp,
    fsdp_and_tensor_parallel,
    fsdp_by_columns,
    hsdp,
    tensor_parallel,
    whole,
)
from tests.distributed.training import refused, sgd, train
from tests.processes import run

SIZE = 2

# Decisions


def budget(rank: int) -> dict[str, Any]:
    """Observe with a budget while one rank measures slowly."""
    net = fsdp(SIZE)
    optimizer = sgd(net)
    records: list[StepRecord] = []
    watched = UpdateMonitor(net, records.append, overhead_budget=0.5, strict=True)
    measure = Measurer.measure_batch

    def slowly(measurer: Measurer, batch: Any) -> Any:
        time.sleep(0.05 * rank)
        return measure(measurer, batch)

    with (
        mock.patch.object(Measurer, "measure_batch", slowly),
        watched.attach(optimizer) as monitor,
    ):
        train(net, optimizer, 30)
        state = monitor.state_dict()["budgets"]
    return {
        "steps": [record.index for record in records],
        "seconds": [(record.own_seconds, record.training_seconds) for record in records],
        "state": state,
    }


def test_all_ranks_share_the_budget_of_the_slowest_rank(two) -> None:
    first, second = two(budget)
    assert 1 < len(first["steps"]) < 20
    assert repr(first) == repr(second)
    assert max(own for own, _ in first["seconds"] if not math.isnan(own)) > 0.04


def skipped(rank: int) -> dict[str, int]:
    """Count skipped steps: one without gradients, and two with a learning rate of 0."""
    net = fsdp(SIZE)
    optimizer = sgd(net)
    with UpdateMonitor(net, strict=True).attach(optimizer) as monitor:
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.0
        train(net, optimizer, 2)
        assert monitor.latest is None
        return dict(monitor.skipped)


def test_every_rank_counts_the_same_skipped_steps(two) -> None:
    for each in two(skipped):
        assert each == {"no gradients": 1, "learning rate 0": 2}


def replica(rank: int) -> dict[str, Any]:
    """Observe one step under DistributedDataParallel."""
    net = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
    optimizer = sgd(net)
    monitor = UpdateMonitor(net, strict=True).attach(optimizer)
    net(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    names = None if monitor.latest is None else [*monitor.latest.layers]
    # torch has no public name for the hooks of an optimizer.
    hooks = len(optimizer._optimizer_step_pre_hooks)
    return {"hooks": hooks, "observing": monitor.is_observing, "names": names}


def test_the_first_rank_observes_replicas(two) -> None:
    first, second = two(replica)
    assert first == {"hooks": 1, "observing": True, "names": ["weight", "bias"]}
    assert second == {"hooks": 0, "observing": False, "names": None}


def second_optimizer(rank: int) -> dict[str, Any]:
    """Attach an optimizer that is refused, then step the one that was attached before."""
    net = fsdp(SIZE)
    optimizer = sgd(net)
    other = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    monitor = UpdateMonitor(net, strict=True).attach(optimizer)
    why = refused(lambda: monitor.attach(other))
    train(net, optimizer, 1)
    return {"why": why, "layers": len(monitor.latest.layers)}


def test_the_first_optimizer_stays_attached_if_another_is_refused(two) -> None:
    for each in two(second_optimizer):
        assert "steps none of the observed parameters" in each["why"]
        assert each["layers"] > 5


def attach_block_format(rank: int) -> str:
    net = fsdp(SIZE)
    return refused(lambda: UpdateMonitor(net, formats="nvfp4").attach(sgd(net)))


def test_formats_with_a_tensor_scale_and_block_scales_are_refused(two) -> None:
    for each in two(attach_block_format):
        assert "leave out 'nvfp4'" in each


# Scales


def largest(rank: int, scaling: Scaling) -> list[tuple[str, bool]]:
    """Compare the amax of each layer with that of the whole tensor, for every strategy."""
    found = []
    for make in (fsdp, fsdp_by_columns, hsdp, tensor_parallel, fsdp_and_tensor_parallel):
        parameters = dict(make(4).named_parameters())
        with torch.no_grad():
            parameters["norm.bias"].zero_()
        amax, has_zero = attached(parameters).amax(parameters, scaling)
        for (name, parameter), own, is_zero in zip(parameters.items(), amax, has_zero, strict=True):
            finite = whole(parameter).nan_to_num(0, 0, 0).abs()
            rows = finite.view(len(finite), -1) if scaling == "channel" else finite.view(1, -1)
            true = rows.amax(1)
            is_right = torch.equal(own, true) and is_zero == bool((true == 0).any())
            found.append((f"{make.__name__} {name}", is_right))
    return found


@pytest.mark.parametrize("scaling", ["tensor", "channel"])
def test_the_amax_over_shards_equals_the_amax_of_the_whole_tensor(four, scaling: Scaling) -> None:
    ranks = four(largest, scaling)
    assert len(ranks[0]) > 60
    for each in ranks:
        assert [layer for layer, is_right in each if not is_right] == []


LAYERS = 6


def begin_at_zero(rank: int) -> dict[str, Any]:
    """Observe layers that are zero until the first step gives each a different amax."""
    layers = [nn.Linear(4, 4, bias=False) for _ in range(LAYERS)]
    net = fully_shard(nn.Sequential(*layers), mesh=init_device_mesh("cpu", (SIZE,)))
    for k, p in enumerate(net.parameters()):
        p.data.zero_()
        p.grad = torch.full_like(p, k + 1.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    with UpdateMonitor(net, formats="e4m3fn", strict=True).attach(optimizer) as monitor:
        optimizer.step()
    scales = monitor.state_dict()["scales"]
    amax = {name: each.tolist() for name, (_, each) in scales["amax"].items()}
    return {"amax": amax, "zero": scales["zero"], "order": [*{*amax}]}


@pytest.mark.slow
def test_all_zero_layers_get_the_right_scales_for_any_hash_seed() -> None:
    first, second = run(begin_at_zero, SIZE, hash_seeds=(1, 2))
    assert first["order"] != second["order"]
    for each in (first, second):
        assert each["amax"] == {f"{k}.weight": [k + 1.0] for k in range(LAYERS)}
        assert each["zero"] == []


# Histories of elements


def packed(bits: torch.Tensor) -> torch.Tensor:
    flat = torch.cat((bits.flatten(), torch.zeros(-bits.numel() % 8, dtype=torch.uint8)))
    return (flat.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def remember(rank: int) -> list[dict[str, tuple[tuple[int, int], list[int]]]]:
    """Return the whole history of 19 elements, before and after attach().

    One other layer has no history, and one name is no layer.
    """
    mesh = init_device_mesh("cpu", (SIZE,))
    parameters = {n: distribute_tensor(torch.zeros(19), mesh, [Shard(0)]) for n in ("a", "quiet")}
    bits = torch.zeros(2, 10 - rank, dtype=torch.uint8)  # elements 0 to 9, 10 to 18
    bits[0, 3], bits[1, -1] = 1, rank
    here = {"a": ((2, 10 - rank), packed(bits))}
    states = [
        ranks.whole_history(here, ["a", "quiet", "none"], 2)
        for ranks in (Together(Parameters(parameters)), attached(parameters))
    ]
    return [
        {name: (shape, each.tolist()) for name, (shape, each) in state.items()} for state in states
    ]


def test_every_rank_knows_the_history_of_all_elements(two) -> None:
    true = torch.zeros(2, 19, dtype=torch.uint8)
    true[0, [3, 13]] = true[1, 18] = 1
    for before, state in two(remember):
        assert before == {}
        assert state == {"a": ((2, 19), packed(true).tolist())}


def remember_otherwise(rank: int) -> str:
    """Ask for a history of two layers on rank 0, and of only one on rank 1."""
    mesh = init_device_mesh("cpu", (SIZE,))
    parameters = {n: distribute_tensor(torch.zeros(19), mesh, [Shard(0)]) for n in ("a", "b")}
    return refused(lambda: attached(parameters).whole_history({}, ["a", "b"][rank:], 2))


def test_every_rank_refuses_histories_of_different_layers(two) -> None:
    for told in two(remember_otherwise):
        assert told.startswith("LostRankError: state_dict(): ranks have flags of")
        assert told.endswith("give every rank the same layers and sampling")


def states(rank: int) -> list[Any]:
    """Return the history in each state: attached, detached, attached again, and restored."""
    net = fsdp(SIZE)
    optimizer = sgd(net)
    monitor = UpdateMonitor(net, strict=True)
    seen = [monitor.state_dict()]
    monitor.attach(optimizer)
    train(net, optimizer, 2)
    seen.append(monitor.state_dict())
    monitor.detach()
    seen.append(monitor.state_dict())
    seen.append(monitor.attach(optimizer).state_dict())
    another = UpdateMonitor(net, strict=True)
    another.load_state_dict(seen[-1])
    seen.append(another.state_dict())
    seen.append(another.attach(optimizer).state_dict())
    return [
        {name: (shape, bits.tolist()) for name, (shape, bits) in state["ever_moved"].items()}
        for state in seen
    ]


def test_the_state_is_the_same_attached_detached_and_restored(two) -> None:
    first, second = two(states)
    assert first == second
    nothing, *each = first
    assert nothing == {}
    assert len(each[0]) > 5
    assert all(state == each[0] for state in each)
