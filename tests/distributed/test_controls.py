"""That the comparison with one process can fail: with the errors that others have made."""

from __future__ import annotations

from unittest import mock

import torch

from altgrad import UpdateMonitor
from altgrad.distributed.ranks import Ranks
from altgrad.distributed.shards import Shard
from tests.distributed.comparing import differences
from tests.distributed.sharded import WholeSteps, fsdp, hsdp, replayed
from tests.distributed.training import train, warned

_shard_of, _reduce = Shard.of, Ranks._reduce


def every_replica_counts(*arguments) -> Shard:
    return _shard_of(*arguments)._replace(counts=True)


def average_for_max(ranks: Ranks, numbers: torch.Tensor, how: str) -> None:
    if how != "MAX":
        return _reduce(ranks, numbers, how)
    finite = torch.where(numbers.isfinite(), numbers, 0)
    _reduce(ranks, finite, "SUM")
    numbers.copy_(torch.where(numbers.isfinite(), finite / ranks.size, numbers))
    return None


def observe(rank: int, make, size: int) -> list[str]:
    net = make(size)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    truth, records = WholeSteps(net, optimizer), []
    with UpdateMonitor(net, records.append, max_elements=300, strict=True).attach(optimizer):
        train(net, optimizer, 2)
    expected = replayed(truth.steps, max_elements=300).records
    pairs = zip(records, expected, strict=True)
    return [found for own, other in pairs for found in differences(own, other)]


def control(rank: int) -> dict[str, list[str]]:
    no_check = mock.patch.object(Ranks, "_check_counts", return_value=None)
    twice = mock.patch.object(Shard, "of", staticmethod(every_replica_counts))
    average = mock.patch.object(Ranks, "_reduce", average_for_max)
    found = {"sound": observe(rank, hsdp, 2)}
    with twice, no_check:
        found["replicas twice"] = observe(rank, hsdp, 2)
    with twice:
        net = hsdp(2)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with UpdateMonitor(net).attach(optimizer):
            found["replicas twice, as told"] = warned(net, optimizer, 1)
    with average:
        found["averaged maxima"] = observe(rank, fsdp, 2)
    return found


def test_errors_that_others_have_made_are_found(two) -> None:
    first, second = two(control)
    assert first["sound"] == second["sound"] == []
    twice = first["replicas twice"]
    assert any("up.weight: elements : 600.0 for 300.0" in each for each in twice), twice
    assert any("model" in each for each in twice)
    (told,) = first["replicas twice, as told"]
    assert "was measured in" in told
    assert "replicas and shards are not what the placements say" in told
    averaged = first["averaged maxima"]
    assert averaged
    assert any("largest" in each for each in averaged)
