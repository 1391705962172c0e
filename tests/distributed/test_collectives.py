"""How often processes speak with each other, and how much they say: whatever the model's size."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from altgrad import UpdateMonitor
from altgrad.measurement.columns import max_count, sum_count
from altgrad.monitor.scale_state import STEPS_PER_SCALE
from tests.distributed.listening import Listening, Said

SIZE = 2
FLOAT64 = 8  # bytes
FORMATS = {"one": ["bf16"], "four": ["fp16", "bf16", "e4m3fn", "e5m2"]}


def listen(rank: int, layers: int, formats: list[str]) -> dict[str, Said]:
    net = fully_shard(
        nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(layers))),
        mesh=init_device_mesh("cpu", (SIZE,)),
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    said: dict[str, Said] = {}

    def during(name: str, call) -> None:
        with Listening() as each:
            call()
        said[name] = each.said

    # The last is every step that is not observed.
    schedule = (lambda index: index < STEPS_PER_SCALE + 1) if layers == 10 else (lambda i: i < 2)
    monitor = UpdateMonitor(net, formats=formats, every_n_steps=schedule, strict=True)
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
@pytest.mark.parametrize("layers", [10, 1000])
def test_an_observed_step_is_one_sum_and_one_max(two, layers: int, formats: list[str]) -> None:
    first, second = two(listen, layers, formats)
    assert first == second
    kinds = len(formats)
    sums = layers * sum_count(kinds) * FLOAT64
    maxima = (layers * (max_count(kinds) + 1) + 7) * FLOAT64
    step = [("allreduce", sums), ("allreduce", maxima)]
    is_scaled = "e4m3fn" in formats
    scales = [("allreduce", layers * FLOAT64)] * is_scaled
    assert first["first"] == scales + step
    assert first["second"] == step
    assert first["not observed"] == []
    if layers == 10:
        assert first["refresh"] == scales + step
    # Who is there, and a bit for whether each of 16 elements ever moved and one for each format.
    header = ("allgather", 16)
    assert first["checkpoint"] == [header, ("allreduce", layers * (1 + kinds) * 16 // 8)]
    (begin, (kind, size)) = first["attach"]  # a digest of what is to be alike
    assert begin == header
    assert (kind, size < 100) == ("allgather", True)
