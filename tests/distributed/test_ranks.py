"""`Ranks`: what processes say to each other, and that all of them are told what went wrong."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from altgrad.distributed.host_group import LostRankError
from altgrad.distributed.ranks import Expected, Ranks
from altgrad.distributed.step_message import Own, StepMessage, Together
from altgrad.measurement.columns import ELEMENTS, POPULATION, max_count, sum_count
from altgrad.observation.observer import FaultElsewhereError
from tests.distributed.training import refused

WIDTH = sum_count(1) + max_count(1)


def met() -> Ranks:
    ranks = Ranks()
    ranks.meet()
    return ranks


def own(elements: dict[str, int], seconds: float = 0.0) -> Own:
    """So many elements of each layer, and as much of all that is summed or compared."""
    vectors = torch.tensor([*elements.values()], dtype=torch.float64)[:, None].repeat(1, WIDTH)
    rows = {name: row for row, name in enumerate(elements)}
    return Own(rows, vectors, [*elements], (seconds, seconds), False, -1)


def merged(ranks: Ranks, said: Own, expected: dict[str, int], index: int = 0) -> Together:
    layers = {name: Expected(10 * count, count) for name, count in expected.items()}
    message = StepMessage(1, len(layers), (index, (*layers,)))
    return ranks.merge(message, layers, said, index)


def test_without_a_process_group_there_are_none() -> None:
    with (
        mock.patch("torch.distributed.is_initialized", return_value=False),
        pytest.raises(
            RuntimeError, match=r"no process group: .* after torch.distributed.init_proc"
        ),
    ):
        Ranks()


# An observed step


def step(rank: int) -> dict[str, Any]:
    """A layer of which each has some, one that lies in the last process, one that none stepped."""
    here = {"some": 1 + rank} | ({"last": 4} if rank == 2 else {})
    together = merged(met(), own(here, seconds=float(rank)), {"some": 6, "none": 9, "last": 4})
    return together._asdict()


def test_a_step_is_the_sum_and_the_largest_of_all_with_the_population_of_the_whole(three) -> None:
    for each in three(step):
        assert each["names"] == ["some", "last"]
        assert each["vectors"][:, ELEMENTS].tolist() == [1 + 2 + 3, 4]
        assert each["vectors"][:, POPULATION].tolist() == [60, 40]
        assert each["vectors"][:, sum_count(1) - 1].tolist() == [6, 4]
        assert each["vectors"][:, -1].tolist() == [3, 4]
        assert each["seconds"] == (2.0, 2.0)


def miscount(rank: int) -> list[str]:
    ranks = met()

    def merge(expected: int) -> Together:
        return merged(ranks, own({"it": 2}), {"it": expected})

    return [refused(lambda expected=expected: merge(expected)) for expected in (5, 7, 6)]


def test_elements_that_are_left_out_or_counted_twice_are_told_by_the_first_process(three) -> None:
    kinds = ["RuntimeError", "FaultElsewhereError", "FaultElsewhereError"]
    for kind, each in zip(kinds, three(miscount), strict=True):
        for told, expected in zip(each[:2], (5, 7), strict=True):
            assert told.startswith(f"{kind}: it was measured in 6 elements by all processes toget")
            assert f"has {expected} to be measured" in told
        assert each[2] == ""


def other_step(rank: int) -> str:
    return refused(lambda: merged(met(), own({"it": 2}), {"it": 6}, index=rank // 2))


def test_another_step_of_one_is_told_by_the_first_process(three) -> None:
    first, *others = three(other_step)
    assert first.startswith("RuntimeError: processes observe different steps or layers, this one s")
    assert all(each.startswith("FaultElsewhereError: ") for each in others)


# Faults of one


def fail(rank: int) -> dict[str, Any]:
    """Two of three fail; then a step of which none does."""
    ranks = met()
    with ranks.keeping_faults():
        if rank > 0:
            raise ArithmeticError(f"of {rank}")
    if rank > 0:
        ranks.keep(KeyError("a later one"))
    found: dict[str, Any] = {}
    try:
        merged(ranks, own({"it": 2}), {"it": 6})
    except (ArithmeticError, FaultElsewhereError) as fault:
        found |= {"raised": repr(fault), "cause": repr(fault.__cause__)}
    found["left"] = ranks.take_fault()
    return found | {"next": merged(ranks, own({"it": 2}), {"it": 6}).names}


def test_the_first_that_failed_says_how_and_the_others_whom_to_ask(three) -> None:
    innocent, first, second = three(fail)
    elsewhere = "FaultElsewhereError('rank 1 has failed to observe this step, and says how')"
    assert first["raised"] == "ArithmeticError('of 1')"
    assert innocent["raised"] == second["raised"] == elsewhere
    assert innocent["cause"] == "None"
    assert second["cause"] == "ArithmeticError('of 2')"
    for each in (innocent, first, second):
        assert each["left"] is None
        assert each["next"] == ["it"]


def fail_to_take(rank: int) -> dict[str, Any]:
    """One has no numbers to say, of three kinds."""
    ranks = met()

    def take() -> Tensor:
        if rank == 1:
            raise ArithmeticError("of numbers")
        return torch.tensor([rank - 5.0, 1.0], dtype=torch.float64)

    found: dict[str, Any] = {}
    for say in (ranks.largest, ranks.largest_beside, ranks.total):
        found[say.__name__] = say(take, 2).tolist()
        found[f"{say.__name__}, told"] = refused(lambda: merged(ranks, own({"a": 1}), {"a": 3}))
    return found


def test_numbers_of_one_that_failed_do_not_count_and_the_next_step_tells_it(three) -> None:
    for rank, each in enumerate(three(fail_to_take)):
        assert each["largest"] == each["largest_beside"] == [-3.0, 1.0]
        assert each["total"] == [-8.0, 2.0]
        told = {each[f"{name}, told"] for name in ("largest", "largest_beside", "total")}
        elsewhere = "FaultElsewhereError: rank 1 has failed to observe this step, and says how"
        assert told == {"ArithmeticError: of numbers" if rank == 1 else elsewhere}


def lose(rank: int) -> str:
    ranks = Ranks()

    def work() -> None:
        with ranks.keeping_faults():
            raise LostRankError("gone")

    told = refused(work)
    assert ranks.take_fault() is None
    return told


def test_of_a_process_that_is_lost_nothing_is_kept_for_later(two) -> None:
    assert two(lose) == ["LostRankError: gone", "LostRankError: gone"]


# Beside steps


def say_bits(rank: int) -> list[int]:
    return met().joined(torch.tensor([1 << rank, 0, 8], dtype=torch.uint8)).tolist()


def test_bits_that_are_set_in_any_process_are_set_in_all(three) -> None:
    assert three(say_bits) == [[0b111, 0, 8]] * 3


def say_other_numbers(rank: int) -> list[str]:
    """One has more of them; then all have as many."""
    ranks = met()

    def total(count: int) -> Tensor:
        return ranks.total(lambda: torch.ones(count, dtype=torch.float64), count)

    said = [refused(lambda count=count: total(count)) for count in (2 + rank // 2, 2)]
    return [*said, refused(lambda: merged(ranks, own({"it": 2}), {"it": 6}))]


def test_lengths_that_differ_are_told_before_they_meet_and_again_with_the_next_step(three) -> None:
    why = "LostRankError: processes say [2, 2, 3] numbers to each other in weight_octaves()"
    elsewhere = "FaultElsewhereError: rank 0 has failed to observe this step, and says how"
    for rank, (at_once, afterwards, in_the_step) in enumerate(three(say_other_numbers)):
        assert at_once == why
        assert afterwards.startswith("LostRankError: ")
        assert afterwards.endswith("(which was found before)")
        assert in_the_step == (elsewhere if rank else why)


def make_other_calls(rank: int) -> str:
    ranks = met()
    numbers = torch.zeros(1, dtype=torch.uint8)
    return refused(lambda: ranks.joined(numbers) if rank == 1 else ranks.total(lambda: numbers, 1))


def test_different_calls_are_named_where_they_meet(three) -> None:
    first, second, third = three(make_other_calls)
    assert first.startswith("LostRankError: rank 1 is in state_dict() while rank 0 is in weight_oc")
    assert second.startswith("LostRankError: rank 0 is in weight_octaves() while rank 1 is in stat")
    assert third.startswith("LostRankError: rank 1 is in state_dict() while rank 2 is in weight_oc")


def speak_too_soon(rank: int) -> tuple[bool, str, bool]:
    ranks = Ranks()
    before = ranks.have_met
    told = refused(lambda: ranks.joined(torch.zeros(1, dtype=torch.uint8)))
    ranks.meet()
    return before, told, ranks.have_met


def test_before_they_meet_nothing_is_said(two) -> None:
    for before, told, after in two(speak_too_soon):
        assert (before, after) == (False, True)
        assert told.endswith("have not met yet: attach() in each first")


# Before the first step


def compare(rank: int) -> dict[str, str]:
    ranks = met()
    many = [f"layer {number}" for number in range(6 if rank == 1 else 1 + rank)]
    each: dict[str, tuple[dict[str, list[str]], Exception | None]] = {
        "alike": ({"settings": ["a=1"], "layers": []}, None),
        "order": ({"settings": ["a=1", "b=2"][:: 1 if rank < 2 else -1]}, None),
        "kinds": ({"settings": ["a=1"], "layers": many, "state": [f"{rank}"]}, None),
        "problem": ({}, KeyError("no") if rank == 1 else None),
    }
    return {
        kind: refused(lambda said=said: ranks.check_alike(*said)) for kind, said in each.items()
    }


def test_the_first_process_that_differs_is_named_with_what_differs_first(three) -> None:
    for rank, each in enumerate(three(compare)):
        assert each["alike"] == ""
        assert each["order"] == (
            "ValueError: the processes have the same settings in different orders: make them alike"
        )
        assert each["kinds"].startswith(
            "ValueError: rank 1 has other layers than rank 0: layer 1; layer 2; layer 3 and 2 more "
            "of its 6, where rank 0 has none of its 1; processes with different layers"
        )
        elsewhere = "ValueError: rank 1 cannot observe this run: KeyError('no')"
        assert each["problem"] == ("KeyError: 'no'" if rank == 1 else elsewhere)
