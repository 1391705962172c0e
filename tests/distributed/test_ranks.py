"""`Ranks` merges the steps of all ranks, and reports errors on every rank."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from altgrad.distributed.host_group import LostRankError
from altgrad.distributed.peers import StepSums
from altgrad.distributed.ranks import Ranks
from altgrad.distributed.step_message import Expected, StepMessage
from altgrad.measurement.columns import ELEMENTS, POPULATION, max_count, sum_count
from altgrad.observation.observer import RankError
from tests.distributed.training import refused

WIDTH = sum_count(1) + max_count(1)
STEP = "step 7 of SGD"


def met() -> Ranks:
    ranks = Ranks()
    ranks.group.meet()
    ranks.group.gather("attach()", "")  # each attach() does so, before there can be another group
    return ranks


def local(elements: dict[str, int], seconds: float = 0.0) -> StepSums:
    """Return sums in which every column has the number of elements as its value."""
    vectors = np.array([*elements.values()], dtype=np.float64)[:, None].repeat(WIDTH, 1)
    return StepSums((seconds, seconds), vectors, [*elements], [*elements])


def merged(ranks: Ranks, said: StepSums, expected: dict[str, int], index: int = 7) -> StepSums:
    layers = {name: Expected(10 * count, count) for name, count in expected.items()}
    return ranks.merge(StepMessage(f"step {index} of SGD", layers, len(layers), 1), said)


def without_places(told: str) -> str:
    return re.sub(r" in (\w+), \S+\.py:\d+", r" in \1", told)


# An observed step


def step(rank: int) -> dict[str, Any]:
    """Merge a layer on all ranks, one on the last rank, and one that no rank stepped."""
    here = {"some": 1 + rank} | ({"last": 4} if rank == 2 else {})
    together = merged(met(), local(here, float(rank)), {"some": 6, "none": 9, "last": 4})
    return {name: getattr(together, name) for name in ("names", "vectors", "seconds")}


def test_a_merged_step_has_the_sums_maxima_and_populations_over_all_ranks(three) -> None:
    for each in three(step):
        assert each["names"] == ["some", "last"]
        assert each["vectors"][:, ELEMENTS].tolist() == [1 + 2 + 3, 4]
        assert each["vectors"][:, POPULATION].tolist() == [60, 40]
        assert each["vectors"][:, sum_count(1) - 1].tolist() == [6, 4]
        assert each["vectors"][:, -1].tolist() == [3, 4]
        assert each["seconds"] == (2.0, 2.0)


def miscount(rank: int) -> list[str]:
    ranks = met()
    return [refused(lambda n=n: merged(ranks, local({"it": 2}), {"it": n})) for n in (5, 6)]


def test_every_rank_reports_elements_that_are_missing_or_counted_twice(three) -> None:
    for told, sound in three(miscount):
        assert told.startswith("RankError: it, step 7 of SGD: expected 5 measured elements on all")
        assert sound == ""


def other_step(rank: int) -> str:
    return refused(lambda: merged(met(), local({"it": 2}), {"it": 6}, index=7 + rank // 2))


def test_every_rank_reports_its_step_if_one_rank_is_in_another_step(three) -> None:
    for rank, told in enumerate(three(other_step)):
        assert told.startswith(
            f"RankError: ranks observe different steps or layers, rank {rank} step "
            f"{7 + rank // 2} of SGD with 1 layer: "
        )


# Errors


def fail(rank: int) -> dict[str, Any]:
    """Merge a step with errors on two of three ranks (two on the last), then one without errors."""
    ranks = met()
    with ranks.hold_errors():
        if rank > 0:
            raise ArithmeticError(f"of {rank}")
    said = local({"it": 2})
    if rank == 2:
        said = said._replace(error=KeyError("a later one"))
    found: dict[str, Any] = {}
    try:
        merged(ranks, said, {"it": 6})
    except RankError as error:
        found |= {"told": without_places(str(error)), "cause": repr(error.__cause__)}
    found["left"] = ranks.take_error()
    return found | {"next": merged(ranks, local({"it": 2}), {"it": 6}).names}


def test_every_rank_reports_which_ranks_failed_and_why(three) -> None:
    causes = ["None", "ArithmeticError('of 1')", "ArithmeticError('of 2')"]
    for cause, each in zip(causes, three(fail), strict=True):
        assert each["told"] == (
            f"rank 1 failed before {STEP}: ArithmeticError('of 1') in fail; "
            f"rank 2 failed before {STEP}: ArithmeticError('of 2') in fail"
        )
        assert each["cause"] == cause
        assert each["left"] is None
        assert each["next"] == ["it"]


def fail_to_measure(rank: int) -> str:
    said = local({"it": 2})
    try:
        torch.zeros(1).view(2)
    except RuntimeError as error:
        said = said._replace(error=error) if rank == 1 else said
    return without_places(refused(lambda: merged(met(), said, {"it": 6})))


def test_every_rank_reports_an_error_in_the_step(three) -> None:
    error = """RuntimeError("shape '[2]' is invalid for input of size 1") in fail_to_measure"""
    assert three(fail_to_measure) == [f"RankError: rank 1 failed in {STEP}: {error}"] * 3


def all_fail(rank: int) -> str:
    ranks = met()
    with ranks.hold_errors():
        raise ArithmeticError(f"of {rank}")
    return refused(lambda: merged(ranks, local({}), {"it": 6}))


def test_the_first_three_errors_are_reported(four) -> None:
    for told in four(all_fail):
        each = [text in told for text in ("('of 0')", "('of 1')", "('of 2')", "('of 3')")]
        assert each == [True, True, True, False]
        assert told.endswith(" and 1 more")


def fail_to_take(rank: int) -> dict[str, Any]:
    """Fail on rank 1 to compute the numbers for a maximum."""
    ranks = met()

    def take() -> Tensor:
        if rank == 1:
            raise ArithmeticError("of numbers")
        return torch.tensor([rank - 5.0, 1.0], dtype=torch.float64)

    maximum = ranks.maximum(take, 2).tolist()
    told = refused(lambda: merged(ranks, local({"a": 1}), {"a": 3}))
    return {"maximum": maximum, "told": without_places(told)}


def test_a_failed_rank_adds_no_numbers_and_the_next_step_reports_it(three) -> None:
    told = f"RankError: rank 1 failed before {STEP}: ArithmeticError('of numbers') in take"
    for each in three(fail_to_take):
        assert each == {"maximum": [-3.0, 1.0], "told": told}


def lose(rank: int) -> list[str]:
    """Lose rank 1 in a callback of rank 0, which goes on to the next step."""
    ranks = met()
    with ranks.hold_errors():
        if rank == 0:
            raise LostRankError("gone")
    return [refused(lambda: merged(ranks, local({"it": 2}), {"it": 4})) for _ in range(2)]


def test_every_rank_reports_a_rank_that_was_lost_between_steps(two) -> None:
    assert two(lose) == [[f"RankError: rank 0 failed before {STEP}: gone", ""]] * 2


# Beside steps


def make_other_calls(rank: int) -> list[str]:
    """Make different calls, then the same call, then two steps, then the same call."""
    ranks = met()
    calls = ["state_dict()" if rank == 1 else "optimizer.step()", "state_dict()"]
    told = [refused(lambda call=call: ranks.group.gather(call, 1)) for call in calls]
    told += [refused(lambda: merged(ranks, local({"it": 2}), {"it": 6})) for _ in range(2)]
    return [*told, refused(lambda: ranks.group.gather("state_dict()", 1))]


def test_different_calls_are_reported_at_once_and_by_every_rank_in_the_next_step(three) -> None:
    met_others = [
        "rank 1 called state_dict() while rank 0 called optimizer.step()",
        "rank 0 called optimizer.step() while rank 1 called state_dict()",
        "rank 1 called state_dict() while rank 2 called optimizer.step()",
    ]
    named = [f"{it}: call both on all ranks, in the same order" for it in met_others]
    each = (f"rank {rank} failed before {STEP}: {text}" for rank, text in enumerate(named))
    in_the_step = "; ".join(each)
    for own, told in zip(named, three(make_other_calls), strict=True):
        at_once, afterwards, step, step_after, call_after = told
        assert at_once == afterwards == f"LostRankError: {own}"
        assert step == f"RankError: {in_the_step}"
        assert step_after == call_after == ""


def meet_again(rank: int) -> tuple[str, list[str]]:
    """Make different calls, then meet again."""
    ranks = met()
    call = "state_dict()" if rank == 1 else "optimizer.step()"
    lost = refused(lambda: ranks.group.gather(call, 1))
    ranks.group.meet()
    return lost, merged(ranks, local({"it": 2}), {"it": 6}).names


def test_ranks_that_meet_again_are_no_longer_lost(three) -> None:
    for lost, names in three(meet_again):
        assert lost.startswith("LostRankError: ")
        assert names == ["it"]


def hold_and_meet_again(rank: int) -> list[str]:
    """Fail on rank 1 between steps, then meet again."""
    ranks = met()
    with ranks.hold_errors():
        if rank == 1:
            raise ArithmeticError
    ranks.group.meet()
    return [refused(lambda: merged(ranks, local({"it": 2}), {"it": 4})) for _ in range(2)]


def test_an_error_between_steps_is_reported_although_the_ranks_met_again(two) -> None:
    told = f"RankError: rank 1 failed before {STEP}: ArithmeticError() in hold_and_meet_again"
    assert [[without_places(each) for each in seen] for seen in two(hold_and_meet_again)] == [
        [told, ""]
    ] * 2


# Before the first step


def compare(rank: int) -> dict[str, str]:
    ranks = met()
    many = [f"layer {number}" for number in range(6 if rank == 1 else 1 + rank)]

    def fails() -> list[str]:
        if rank == 1:
            raise KeyError("no")
        return []

    each = {
        "alike": lambda: ["layer it", "setting a=1"],
        "order": lambda: ["setting a=1", "setting b=2"][:: 1 if rank < 2 else -1],
        "more": lambda: many,
        "other": lambda: ["setting a=1", f"setting b={rank // 2}"],
        "less": lambda: many[rank:],
        "problem": fails,
    }
    return {
        kind: refused(lambda describe=describe: ranks.check_alike("attach()", describe))
        for kind, describe in each.items()
    }


def test_the_first_rank_that_differs_is_named_with_what_it_has_otherwise(three) -> None:
    differs = "DisagreementError: rank {} differs from rank 0: expected {}; give every rank"
    for each in three(compare):
        assert each["alike"] == ""
        for kind, rank, what in (
            ("order", 2, "one order, got another order of layers, optimizers or arguments"),
            ("more", 1, "nothing more, got layer 1; layer 2; layer 3 and 2 more"),
            ("other", 2, "setting b=0, got setting b=1"),
            ("less", 1, "layer 0, got layer 1; layer 2; layer 3 and 2 more"),
        ):
            assert each[kind].startswith(differs.format(rank, what)), each[kind]
        assert re.fullmatch(
            r"DisagreementError: rank 1 cannot observe this run: KeyError\('no'\) in fails, .*",
            each["problem"],
        )


def compare_too_soon(rank: int) -> str:
    return refused(lambda: Ranks().check_alike("attach()", list))


def test_a_comparison_is_refused_before_the_ranks_have_met(two) -> None:
    for told in two(compare_too_soon):
        assert told.endswith("have not met yet: attach() on each first")
