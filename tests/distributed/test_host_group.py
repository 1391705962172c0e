"""`HostGroup` brings numbers and texts to all ranks, and reports a missing rank in time."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import distributed as dist

from altgrad.distributed.host_group import meet
from tests.distributed.training import LIMIT, refused
from tests.processes import run

SIZE = 3


def default_store() -> Any:
    return dist.distributed_c10d._get_default_store()  # torch has no public name for it


# Collectives and exchanges


def say(rank: int) -> dict[str, Any]:
    group = meet()
    numbers = {
        "SUM": torch.tensor([rank, 0.5, -1.0], dtype=torch.float64),
        "MAX": torch.tensor([rank, -rank, -torch.inf], dtype=torch.float64),
    }
    for how, each in numbers.items():
        group.reduce(each, how)
    return {how: each.tolist() for how, each in numbers.items()} | {
        "texts": group.exchange("calls", f"of {rank}" + "é" * rank * 100_000),
        "again": group.exchange("calls", f"again {rank}"),
        "errors": group.exchange("errors", f"error {rank}"),
        "place": (group.rank, group.size),
    }


def test_every_rank_gets_the_sum_the_maximum_and_texts_of_any_length(three) -> None:
    for rank, each in enumerate(three(say)):
        assert each["SUM"] == [0 + 1 + 2, 1.5, -3.0]
        assert each["MAX"] == [2, 0, -torch.inf]
        assert each["texts"] == ["of 0", "of 1" + "é" * 100_000, "of 2" + "é" * 200_000]
        assert each["again"] == ["again 0", "again 1", "again 2"]
        assert each["errors"] == ["error 0", "error 1", "error 2"]
        assert each["place"] == (rank, SIZE)


def meet_twice(rank: int) -> dict[str, Any]:
    """Use two groups at once."""
    first = meet()
    first.exchange("calls", "met")  # each attach() does so, before there can be another group
    second = meet()
    numbers = torch.tensor([1.0 + rank]), torch.tensor([10.0 + rank])
    second.reduce(numbers[1], "SUM")
    first.reduce(numbers[0], "SUM")
    texts = [second.exchange("calls", "second"), first.exchange("calls", "first")]
    dist.barrier()
    left = [key for key in range(SIZE) if default_store().check([f"altgrad/{key}"])]
    group = dist.new_group()
    name = dist.distributed_c10d._world.pg_names[group]  # torch has no public one
    said = [float(each) for each in numbers]
    return {"said": said, "texts": texts, "left": left, "name": name}


def test_each_meeting_creates_a_separate_group_and_leaves_no_keys_in_the_store(three) -> None:
    seen = three(meet_twice)
    for each in seen:
        assert each["said"] == [1 + 2 + 3, 10 + 11 + 12]
        assert each["texts"] == [["second"] * SIZE, ["first"] * SIZE]
        assert each["left"] == []
        assert each["name"] == seen[0]["name"]


def exchange_often(rank: int) -> list[int]:
    """Count the keys in the store after few exchanges, and after many."""
    group, counted = meet(), []
    for times in (3, 20):
        for number in range(times):
            group.exchange("calls", str(number))
        dist.barrier()
        counted.append(default_store().num_keys())
        dist.barrier()
    return counted


def test_texts_are_deleted_once_every_rank_has_read_them(three) -> None:
    for few, many in three(exchange_often):
        assert few == many


# Missing ranks


def silence(rank: int) -> dict[str, Any]:
    """Reduce numbers on rank 0 alone in one of two groups."""
    group = meet()
    group.exchange("calls", "met")
    other = meet()
    found: dict[str, Any] = {}
    if rank == 0:
        start = time.monotonic()
        found["first"] = refused(lambda: group.reduce(torch.zeros(1), "SUM"))
        found["seconds"] = time.monotonic() - start
        found["again"] = [
            refused(lambda: group.reduce(torch.zeros(1), "SUM")),
            refused(lambda: group.exchange("calls", "it")),
        ]
        found["seconds again"] = time.monotonic() - start - found["seconds"]
    dist.barrier()
    numbers = torch.ones(1)
    other.reduce(numbers, "SUM")
    return found | {"other": float(numbers)}


def test_a_group_is_lost_after_half_the_limit_and_fails_at_once_afterwards() -> None:
    first, second = run(silence, 2, collective=LIMIT)
    assert first["first"].startswith("LostRankError: rank 0 of 2 had no answer from at least one")
    assert LIMIT / 2 - 0.1 <= first["seconds"] < LIMIT
    assert all(each.endswith("(an earlier call has timed out)") for each in first["again"])
    assert first["seconds again"] < 0.1
    assert first["other"] == second["other"] == 2


def call_alone(rank: int) -> dict[str, Any]:
    """Exchange a text on rank 0 alone in one of two channels, then on both ranks."""
    group = meet()
    start = time.monotonic()
    alone = [refused(lambda: group.exchange("calls", "alone"))] if rank == 0 else []
    seconds = time.monotonic() - start
    dist.barrier()
    again = [refused(lambda: group.exchange("calls", f"again {rank}"))]
    dist.barrier()
    numbers = torch.ones(1)
    group.reduce(numbers, "SUM")
    texts = group.exchange("errors", f"of {rank}")
    return {
        "calls": alone + again,
        "seconds": seconds,
        "numbers": float(numbers),
        "texts": texts,
    }


def test_only_the_channel_in_which_a_rank_was_alone_is_lost() -> None:
    first, second = run(call_alone, 2, collective=LIMIT)
    assert LIMIT / 2 - 0.1 <= first["seconds"] < LIMIT
    alone, again = first["calls"]
    assert alone.startswith("LostRankError: rank 0 of 2 had no answer from at least one")
    assert again.endswith("(an earlier call has timed out)")
    assert second["calls"][0].startswith("LostRankError: rank 1 of 2 had no answer from at least")
    for each in (first, second):
        assert each["numbers"] == 2
        assert each["texts"] == ["of 0", "of 1"]


def lose(rank: int) -> tuple[str, list[str]]:
    group = meet()
    group.lose("calls")
    return refused(lambda: group.exchange("calls", "it")), group.exchange("errors", str(rank))


def test_a_lost_channel_refuses_every_exchange(three) -> None:
    for lost, other in three(lose):
        assert lost.startswith("LostRankError: ")
        assert lost.endswith("(an earlier call has timed out)")
        assert other == ["0", "1", "2"]


def come_alone(rank: int) -> dict[str, Any]:
    """Meet on rank 0 alone, then on both ranks."""
    start = time.monotonic()
    alone = refused(meet) if rank == 0 else ""
    seconds = time.monotonic() - start
    dist.barrier()
    return {"alone": alone, "seconds": seconds, "said": meet().exchange("calls", str(rank))}


def test_a_rank_that_meets_alone_gives_up_after_half_the_limit_and_can_meet_later() -> None:
    first, second = run(come_alone, 2, collective=LIMIT)
    assert first["alone"].startswith("LostRankError: rank 0 of 2 had no answer from at least one")
    assert LIMIT / 2 - 0.1 <= first["seconds"] < LIMIT
    assert first["said"] == second["said"] == ["0", "1"]
