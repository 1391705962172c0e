"""`StepMessage`: what several ranks say of a step, reduced by hand, is what all came to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from altgrad.distributed.step_message import Own, StepMessage
from altgrad.measurement.columns import max_count, sum_count
from tests.strategies import thorough

FORMATS, ROWS = 2, 5
SUMS, MAXIMA = sum_count(FORMATS), max_count(FORMATS)
STEP = 3, ("a", "b", "c")


def own(
    figures: Mapping[str, Tensor] | None = None,
    present: Sequence[str] = (),
    seconds: tuple[float, float] = (math.nan, math.nan),
    found_inf: bool = False,
    reason: int = -1,
) -> Own:
    """Of layers in other rows than theirs, with one between that is nobody's."""
    figures = figures or {}
    rows = {name: 2 * row for row, name in enumerate(figures)}
    vectors = torch.full((2 * len(rows), SUMS + MAXIMA), torch.nan, dtype=torch.float64)
    for name, row in rows.items():
        vectors[row] = figures[name]
    return Own(rows, vectors, present, seconds, found_inf, reason)


def message_of(said: Own, failed: int = 0, step: tuple[int, tuple[str, ...]] = STEP) -> StepMessage:
    message = StepMessage(FORMATS, ROWS, step)
    message.fill(said)
    message.close(said, failed)
    return message


def reduced(messages: Sequence[StepMessage]) -> StepMessage:
    """The first one, as the collectives leave it in every process."""
    first = messages[0]
    first.sums.copy_(torch.stack([each.sums for each in messages]).sum(0))
    first.maxima.copy_(torch.stack([each.maxima for each in messages]).amax(0))
    return first


@st.composite
def owns(draw: st.DrawFn) -> Own:
    present = draw(st.lists(st.sampled_from(STEP[1]), unique=True))
    with_elements = draw(st.lists(st.sampled_from(present), unique=True)) if present else []
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    whole = (SUMS + MAXIMA,)
    return own(
        {name: torch.randint(-9, 9, whole, generator=generator).double() for name in with_elements},
        present,
        (draw(st.sampled_from([math.nan, 0.0, 1.5])), draw(st.sampled_from([math.nan, 0.0, 2.5]))),
        draw(st.booleans()),
        draw(st.integers(-1, 4)),
    )


@thorough
@given(st.lists(owns(), min_size=1, max_size=4))
def test_all_come_to_the_sum_and_the_largest_of_what_each_says(each: list[Own]) -> None:
    together = reduced([message_of(said) for said in each]).together()
    assert together.names == [n for n in STEP[1] if any(n in said.present for said in each)]
    for name, vector in zip(together.names, together.vectors, strict=True):
        parts = [said.vectors[said.rows[name]] for said in each if name in said.rows]
        sums = sum((part[:SUMS] for part in parts), torch.zeros(SUMS).double())
        maxima = [
            max((float(p[SUMS + k]) for p in parts), default=-math.inf) for k in range(MAXIMA)
        ]
        assert vector.tolist() == [*sums.tolist(), *maxima]
    for place in (0, 1):
        known = [said.seconds[place] for said in each if not math.isnan(said.seconds[place])]
        assert repr(together.seconds[place]) == repr(max(known, default=math.nan))
    assert together.found_inf == any(said.found_inf for said in each)
    assert together.reason == max(said.reason for said in each)


def test_all_hear_of_the_first_one_that_has_failed() -> None:
    assert reduced([message_of(own(), failed) for failed in (0, 0, 0)]).failed == 0
    assert reduced([message_of(own(), failed) for failed in (0, 2, 1)]).failed == 2


def test_one_that_failed_before_it_could_say_anything_is_heard_all_the_same() -> None:
    empty = StepMessage(FORMATS, ROWS, STEP)
    empty.close(own(present=["a"]), 1)
    together = reduced([empty, message_of(own(present=["b"]))])
    assert together.failed == 1
    assert together.together().names == ["b"]


@pytest.mark.parametrize(
    ("step", "is_one"),
    [
        ((3, ("a", "b", "c")), True),
        ((4, ("a", "b", "c")), False),
        ((3, ("a", "b")), False),
        ((3, ("a", "c", "b")), False),
    ],
    ids=["same", "index", "layers", "order"],
)
def test_messages_of_different_steps_can_meet_and_it_is_noticed(step, is_one: bool) -> None:
    first, second = message_of(own()), message_of(own(), step=step)
    assert (first.sums.shape, first.maxima.shape) == (second.sums.shape, second.maxima.shape)
    assert first.is_of_one_step
    assert second.is_of_one_step
    assert reduced([first, second]).is_of_one_step == is_one
    assert reduced([second, message_of(own())]).is_of_one_step == is_one


def test_layers_that_were_not_agreed_upon_are_refused_by_name() -> None:
    with pytest.raises(RuntimeError, match=r"^d, e are stepped and were not agreed upon$"):
        message_of(own(present=["a", "d", "e"]))
