"""The number of collectives in a step, and their bytes, for models of different sizes."""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from altgrad import UpdateMonitor
from altgrad.distributed.host_group import HostGroup
from altgrad.distributed.twin_message import TwinPlan
from altgrad.measurement.columns import max_count, sum_count
from altgrad.monitor import scale_state
from altgrad.recipes.names import find_default_recipes
from tests.distributed.listening import Listening, Said
from tests.distributed.training import refused

SIZE, MANY = 2, 200
STEPS_PER_SCALE = 4
"""The number of steps after which scales are taken again, here."""
FLOAT64 = 8  # bytes
FORMATS = {"one": ["bf16"], "four": ["fp16", "bf16", "e4m3fn", "e5m2"]}


def sharded(layers: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a sharded model whose layers have 16 elements and gradients, and its optimizer."""
    net = fully_shard(
        nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(layers))),
        mesh=init_device_mesh("cpu", (SIZE,)),
    )
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    return net, torch.optim.SGD(net.parameters(), lr=1e-2)


def listen(rank: int, layers: int, formats: list[str]) -> dict[str, Said]:
    net, optimizer = sharded(layers)
    said: dict[str, Said] = {}

    def during(name: str, call) -> None:
        with Listening() as each:
            call()
        said[name] = each.said

    # The last step is not observed.
    schedule = (lambda index: index < STEPS_PER_SCALE + 1) if layers == 10 else (lambda i: i < 2)
    monitor = UpdateMonitor(net, formats=formats, every_n_steps=schedule, strict=True)
    with mock.patch.object(scale_state, "STEPS_PER_SCALE", STEPS_PER_SCALE):
        during("attach", lambda: monitor.attach(optimizer))
        during("first", optimizer.step)
        during("second", optimizer.step)
        if layers == 10:
            for _ in range(STEPS_PER_SCALE - 2):
                optimizer.step()
            during("refresh", optimizer.step)
    during("not observed", optimizer.step)
    during("checkpoint", monitor.state_dict)
    assert len(monitor.latest.layers) == layers
    return said


@pytest.mark.parametrize("formats", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("layers", [10, MANY])
def test_an_observed_step_makes_two_all_reduces_and_other_steps_make_none(
    two, layers: int, formats: list[str]
) -> None:
    first, second = two(listen, layers, formats)
    assert first == second
    kinds, twins = len(formats), TwinPlan([*find_default_recipes(formats), "now"], 256)
    sums = layers * (sum_count(kinds) + twins.sum_count) * FLOAT64
    maxima = layers * (max_count(kinds) + 1 + twins.max_count) + twins.name_count + 7
    step = [("allreduce", sums), ("allreduce", maxima * FLOAT64)]
    is_scaled = "e4m3fn" in formats
    scales = [("allreduce", layers * FLOAT64)] * is_scaled
    assert first["first"] == scales + step
    assert first["second"] == step
    assert first["not observed"] == []
    if layers == 10:
        assert first["refresh"] == scales + step
    assert first["attach"] == scales  # for twins, which make every step
    assert [name for name, _ in first["checkpoint"]] == ["allreduce"]  # the state of twins


def texts(rank: int) -> dict[str, Any]:
    """Record the texts that many layers exchange; rank 1 fails in the third step."""
    net, optimizer = sharded(MANY)
    gather, said = HostGroup.gather, {}

    def on_record(record: Any) -> None:
        if rank == 1 and record.index == 1:
            raise ArithmeticError

    def during(name: str, call: Any) -> None:
        said[name] = []

        def note(group: HostGroup, call: str, value: Any) -> list[Any]:
            said[name].append((call, len(json.dumps(value))))
            return gather(group, call, value)

        with mock.patch.object(HostGroup, "gather", note):
            call()

    monitor = UpdateMonitor(net, on_record, formats=["fp16", "bf16"], strict=True)
    during("attach", lambda: monitor.attach(optimizer))
    for name in ("first", "second"):
        during(name, optimizer.step)
    during("checkpoint", monitor.state_dict)
    with Listening() as numbers:
        during("failed", lambda: refused(optimizer.step))
    return said | {"numbers": [name for name, _ in numbers.said]}


def test_texts_are_exchanged_only_by_calls_between_steps_and_after_an_error(two) -> None:
    for rank, said in enumerate(two(texts)):
        assert said["first"] == said["second"] == []
        # A digest of all settings that must be alike.
        ((call, length),) = said["attach"]
        assert (call, length < 100) == ("attach()", True)
        # For each of 16 elements a bit for "ever moved", and one for each format. Then the length
        # of the state of twins.
        flags, twins = said["checkpoint"]
        assert [call for call, _ in (flags, twins)] == ["state_dict()"] * 2
        assert flags[1] < MANY * 3 * 16 // 8
        assert twins[1] < 10
        assert said["numbers"] == ["allreduce", "allreduce"]
        ((call, length),) = said["failed"]
        assert (call, length > len("null")) == ("optimizer.step()", rank == 1)
