"""`Together`: what ranks know and decide together is the same on all of them."""

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
    """One rank is slow at observing; both observe the same steps."""
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
    # torch does not say publicly how many hooks an optimizer has.
    hooks = len(optimizer._optimizer_step_pre_hooks)
    return {"hooks": hooks, "observing": monitor.is_observing, "names": names}


def test_of_replicas_the_first_rank_observes(two) -> None:
    first, second = two(replica)
    assert first == {"hooks": 1, "observing": True, "names": ["weight", "bias"]}
    assert second == {"hooks": 0, "observing": False, "names": None}


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


def scales_of_blocks(rank: int) -> str:
    net = fsdp(SIZE)
    return refused(lambda: UpdateMonitor(net, formats="nvfp4").attach(sgd(net)))


def test_scales_of_whole_tensors_are_refused(two) -> None:
    for each in two(scales_of_blocks):
        assert "leave out 'nvfp4'" in each


# Scales


def largest(rank: int, scaling: Scaling) -> list[tuple[str, bool]]:
    """Whether what each comes to is the truth, in whichever strategy."""
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
def test_the_amax_of_shards_is_that_of_the_whole(four, scaling: Scaling) -> None:
    ranks = four(largest, scaling)
    assert len(ranks[0]) > 60
    for each in ranks:
        assert [layer for layer, is_right in each if not is_right] == []


LAYERS = 6


def begin_at_zero(rank: int) -> dict[str, Any]:
    """Layers of which no weight sets a scale until the first step gives each another amax."""
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


def test_layers_that_begin_at_zero_get_their_own_scales_whatever_the_order_of_sets() -> None:
    first, second = run(begin_at_zero, SIZE, hash_seeds=(1, 2))
    assert first["order"] != second["order"]
    for each in (first, second):
        assert each["amax"] == {f"{k}.weight": [k + 1.0] for k in range(LAYERS)}
        assert each["zero"] == []


# What elements have done


def packed(bits: torch.Tensor) -> torch.Tensor:
    flat = torch.cat((bits.flatten(), torch.zeros(-bits.numel() % 8, dtype=torch.uint8)))
    return (flat.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def remember(rank: int) -> list[dict[str, tuple[tuple[int, int], list[int]]]]:
    """Of 19 elements in two kinds of bits; a layer of which nothing is known, and one that is not
    there. First what is known before the ranks have met."""
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


def test_what_elements_have_done_on_any_rank_is_known_on_all(two) -> None:
    true = torch.zeros(2, 19, dtype=torch.uint8)
    true[0, [3, 13]] = true[1, 18] = 1
    for rank, (before, state) in enumerate(two(remember)):
        assert before["a"][0] == (2, 10 - rank)
        assert state == {"a": ((2, 19), packed(true).tolist())}


def remember_otherwise(rank: int) -> str:
    """Rank 1 knows nothing of one of two layers."""
    mesh = init_device_mesh("cpu", (SIZE,))
    parameters = {n: distribute_tensor(torch.zeros(19), mesh, [Shard(0)]) for n in ("a", "b")}
    return refused(lambda: attached(parameters).whole_history({}, ["a", "b"][rank:], 2))


def test_histories_of_different_layers_are_told_by_every_rank(two) -> None:
    told = "LostRankError: ranks have different layers, and keep different histories"
    assert two(remember_otherwise) == [told] * SIZE


def states(rank: int) -> list[Any]:
    """What a monitor has seen, as it says when attached, detached, attached again, and loaded."""
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


def test_a_state_is_the_same_whenever_it_is_asked_for(two) -> None:
    first, second = two(states)
    assert first == second
    nothing, *each = first
    assert nothing == {}
    assert len(each[0]) > 5
    assert all(state == each[0] for state in each)
