"""Ranks compare replicas on a device by the numbers that they would have on the CPU."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from altgrad.distributed.replicas import find_different_replicas
from altgrad.distributed.shards import Shard
from tests.devices.simulated import counting


def test_replicas_are_compared_by_the_numbers_of_the_cpu(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    here = {
        "strided": torch.randn(8, 9, generator=generator).t(),
        "odd": torch.tensor([torch.nan, torch.inf, 1.0]),
        "low": torch.randn(40, generator=generator).bfloat16(),
        "none": torch.empty(0),
    }

    def send(parameters: dict[str, Tensor]) -> Tensor:
        sent: list[Tensor] = []

        def take_maximum(find: Callable[[], Tensor], _: int) -> Tensor:
            sent.append(find())
            return sent[0]

        ranks: Any = SimpleNamespace(size=2, rank=0, maximum=take_maximum)
        shards = {name: Shard.read(name, each, 0) for name, each in parameters.items()}
        assert find_different_replicas(parameters, shards.__getitem__, ranks) == []
        return sent[0]

    expected, there = send(here), {name: each.to(device) for name, each in here.items()}
    with counting() as traffic:
        found = send(there)
    assert torch.equal(found, expected)
    assert (traffic.to_host, traffic.to_device, traffic.waits.total()) == (1, 0, 0)
