"""`HostGroup`: what is said is heard by all, and of who is not heard, once, in time."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import distributed as dist

from altgrad.distributed.host_group import meet
from tests.distributed.training import LIMIT, refused
from tests.processes import run

SIZE = 3

# What is said together


def say(rank: int) -> dict[str, Any]:
    group, other = meet(["one", "other"])
    numbers = {
        "SUM": torch.tensor([rank, 0.5, -1.0], dtype=torch.float64),
        "MAX": torch.tensor([rank, -rank, -torch.inf], dtype=torch.float64),
        "BOR": torch.tensor([1 << rank, 6, 0], dtype=torch.uint8),
    }
    for how, each in numbers.items():
        group.reduce(each, how)
    gathered = other.gather(torch.tensor([rank, 10 * rank]))
    return {how: each.tolist() for how, each in numbers.items()} | {
        "gathered": [each.tolist() for each in gathered],
        "places": [(each.rank, each.size, each.is_lost) for each in (group, other)],
    }


def test_all_hear_the_sum_the_largest_the_bits_and_each(three) -> None:
    for rank, each in enumerate(three(say)):
        assert each["SUM"] == [0 + 1 + 2, 1.5, -3.0]
        assert each["MAX"] == [2, 0, -torch.inf]
        assert each["BOR"] == [0b111, 6, 0]
        assert each["gathered"] == [[0, 0], [1, 10], [2, 20]]
        assert each["places"] == [(rank, SIZE, False)] * 2


def meet_twice(rank: int) -> dict[str, Any]:
    """Groups of the same names, of which the first are still there."""
    (first,) = meet(["it"])
    first.gather(torch.tensor(rank))  # all have met
    (second,) = meet(["it"])
    numbers = torch.tensor([1.0 + rank]), torch.tensor([10.0 + rank])
    second.reduce(numbers[1], "SUM")
    first.reduce(numbers[0], "SUM")
    store = dist.distributed_c10d._get_default_store()
    dist.barrier()
    left = [key for key in range(SIZE) if store.check([f"altgrad/{key}"])]
    group = dist.new_group()
    name = dist.distributed_c10d._world.pg_names[group]
    return {"said": [float(each) for each in numbers], "left": left, "name": name}


def test_each_meeting_makes_groups_of_its_own_and_leaves_nothing_behind(three) -> None:
    seen = three(meet_twice)
    for each in seen:
        assert each["said"] == [1 + 2 + 3, 10 + 11 + 12]
        assert each["left"] == []
        assert each["name"] == seen[0]["name"]


# Who is not heard


def silence(rank: int) -> dict[str, Any]:
    """Rank 0 says something alone in one of two groups."""
    group, other = meet(["one", "other"])
    found: dict[str, Any] = {}
    if rank == 0:
        start = time.monotonic()
        found["first"] = refused(lambda: group.reduce(torch.zeros(1), "SUM"))
        found["seconds"] = time.monotonic() - start
        found["again"] = [
            refused(lambda: group.reduce(torch.zeros(1), "SUM")),
            refused(lambda: group.gather(torch.zeros(1))),
        ]
        found["seconds again"] = time.monotonic() - start - found["seconds"]
    dist.barrier()
    numbers = torch.ones(1)
    other.reduce(numbers, "SUM")
    return found | {"other": float(numbers), "lost": [group.is_lost, other.is_lost]}


def test_who_was_not_heard_in_half_the_limit_is_not_spoken_to_again() -> None:
    first, second = run(silence, 2, collective=LIMIT)
    assert first["first"].startswith("LostRankError: rank 0 of 2 did not hear from every other one")
    assert LIMIT / 2 - 0.1 <= first["seconds"] < LIMIT
    assert all(each.endswith("(which was found before)") for each in first["again"])
    assert first["seconds again"] < 0.1
    assert first["lost"] == [True, False]
    assert second["lost"] == [False, False]
    assert first["other"] == second["other"] == 2


def come_alone(rank: int) -> dict[str, Any]:
    """Rank 0 comes alone first; then both meet."""
    start = time.monotonic()
    alone = refused(lambda: meet(["it"])) if rank == 0 else ""
    seconds = time.monotonic() - start
    dist.barrier()
    (group,) = meet(["it"])
    return {
        "alone": alone,
        "seconds": seconds,
        "said": [*map(int, group.gather(torch.tensor(rank)))],
    }


def test_who_came_alone_gives_up_in_half_the_limit_and_is_met_later() -> None:
    first, second = run(come_alone, 2, collective=LIMIT)
    assert first["alone"].startswith("LostRankError: rank 0 of 2 did not hear from every other one")
    assert LIMIT / 2 - 0.1 <= first["seconds"] < LIMIT
    assert first["said"] == second["said"] == [0, 1]
