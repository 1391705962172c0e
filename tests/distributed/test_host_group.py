"""`HostGroup` brings numbers and texts to all ranks, and reports a missing rank in time."""

from __future__ import annotations

import time
from typing import Any
from unittest import mock

import pytest
import torch
from torch import distributed as dist

from altgrad.distributed.host_group import HostGroup
from tests.distributed.training import LIMIT, refused
from tests.processes import run

SIZE = 3


def meet() -> HostGroup:
    group = HostGroup()
    group.meet()
    return group


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
        "texts": group.gather("state_dict()", f"of {rank}" + "é" * rank * 100_000),
        "again": group.gather("state_dict()", [rank, None]),
        "place": (group.rank, group.size),
    }


def test_every_rank_gets_the_sum_the_maximum_and_texts_of_any_length(three) -> None:
    for rank, each in enumerate(three(say)):
        assert each["SUM"] == [0 + 1 + 2, 1.5, -3.0]
        assert each["MAX"] == [2, 0, -torch.inf]
        assert each["texts"] == ["of 0", "of 1" + "é" * 100_000, "of 2" + "é" * 200_000]
        assert each["again"] == [[0, None], [1, None], [2, None]]
        assert each["place"] == (rank, SIZE)


def meet_twice(rank: int) -> dict[str, Any]:
    """Use two groups at once."""
    first = meet()
    first.gather("attach()", "")  # each attach() does so, before there can be another group
    second = meet()
    numbers = torch.tensor([1.0 + rank]), torch.tensor([10.0 + rank])
    second.reduce(numbers[1], "SUM")
    first.reduce(numbers[0], "SUM")
    texts = [second.gather("state_dict()", "second"), first.gather("state_dict()", "first")]
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
            group.gather("state_dict()", str(number))
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
    group.gather("attach()", "")
    other = meet()
    found: dict[str, Any] = {}
    if rank == 0:
        start = time.monotonic()
        found["first"] = refused(lambda: group.reduce(torch.zeros(1), "SUM"))
        found["seconds"] = time.monotonic() - start
        found["again"] = [
            refused(lambda: group.reduce(torch.zeros(1), "SUM")),
            refused(lambda: group.gather("state_dict()", "it")),
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
    assert all(each.startswith("LostRankError: rank 0 of 2 had no") for each in first["again"])
    assert first["seconds again"] < 0.1
    assert first["other"] == second["other"] == 2


def call_alone(rank: int) -> dict[str, Any]:
    """Make a call on rank 0 alone, then the same call on both ranks, then an all-reduce."""
    group = meet()
    start = time.monotonic()
    alone = [refused(lambda: group.gather("state_dict()", "alone"))] if rank == 0 else []
    seconds = time.monotonic() - start
    alone += [refused(lambda: group.gather("state_dict()", "again"))] if rank == 0 else []
    seconds_again = time.monotonic() - start - seconds
    dist.barrier()
    numbers = torch.ones(1)
    group.reduce(numbers, "SUM")
    lost, group.lost = group.lost, ""
    texts = group.gather("state_dict()", f"of {rank}")
    return {
        "alone": alone,
        "seconds": (seconds, seconds_again),
        "lost": lost,
        "numbers": float(numbers),
        "texts": texts,
    }


def test_ranks_are_together_again_after_the_next_all_reduce() -> None:
    first, second = run(call_alone, 2, collective=LIMIT)
    seconds, seconds_again = first["seconds"]
    assert LIMIT / 2 - 0.1 <= seconds < LIMIT
    assert seconds_again < 0.1
    alone, again = first["alone"]
    assert alone.startswith("LostRankError: rank 0 of 2 had no answer from at least one")
    assert again == alone == f"LostRankError: {first['lost']}"
    assert second["lost"] == ""
    for each in (first, second):
        assert each["numbers"] == 2
        assert each["texts"] == ["of 0", "of 1"]


def make_other_calls(rank: int) -> list[str]:
    group = meet()
    call = "state_dict()" if rank == 1 else "optimizer.step()"
    return [refused(lambda: group.gather(call, rank)) for _ in range(2)]


def test_different_calls_are_named_and_texts_are_refused_afterwards(three) -> None:
    met_others = [
        "rank 1 called state_dict() while rank 0 called optimizer.step()",
        "rank 0 called optimizer.step() while rank 1 called state_dict()",
        "rank 1 called state_dict() while rank 2 called optimizer.step()",
    ]
    for expected, (told, again) in zip(met_others, three(make_other_calls), strict=True):
        assert told == f"LostRankError: {expected}: call both on all ranks, in the same order"
        assert again == told


def speak_too_soon(rank: int) -> list[str]:
    group = HostGroup()
    told = refused(lambda: group.gather("state_dict()", rank))
    group.meet()
    return [told, *group.gather("state_dict()", f"of {rank}")]


def test_ranks_exchange_nothing_before_they_have_met(two) -> None:
    for told, *texts in two(speak_too_soon):
        assert told.endswith("have not met yet: attach() on each first")
        assert texts == ["of 0", "of 1"]


def test_a_group_needs_a_process_group() -> None:
    with (
        mock.patch("torch.distributed.is_initialized", return_value=False),
        pytest.raises(RuntimeError, match=r"no process group: call torch\.distributed\.init_proc"),
    ):
        HostGroup()


def meet_again_alone(rank: int) -> tuple[str, str, list[float]]:
    """Meet once more on rank 0 alone; the group before goes on."""
    group = meet()
    group.gather("attach()", "")
    alone = refused(group.meet) if rank == 0 else ""
    dist.barrier()
    numbers = torch.ones(1)
    group.reduce(numbers, "SUM")
    return alone, group.lost, numbers.tolist()


def test_a_group_still_reduces_after_a_rank_has_met_alone() -> None:
    (alone, lost, first), (_, _, second) = run(meet_again_alone, 2, collective=LIMIT)
    assert alone == f"LostRankError: {lost}"
    assert first == second == [2.0]


def come_alone(rank: int) -> dict[str, Any]:
    """Meet on rank 0 alone, then on both ranks."""
    start = time.monotonic()
    alone = refused(meet) if rank == 0 else ""
    seconds = time.monotonic() - start
    dist.barrier()
    return {"alone": alone, "seconds": seconds, "said": meet().gather("state_dict()", str(rank))}


def test_a_rank_that_meets_alone_gives_up_after_half_the_limit_and_can_meet_later() -> None:
    first, second = run(come_alone, 2, collective=LIMIT)
    assert first["alone"].startswith("LostRankError: rank 0 of 2 had no answer from at least one")
    assert LIMIT / 2 - 0.1 <= first["seconds"] < LIMIT
    assert first["said"] == second["said"] == ["0", "1"]
