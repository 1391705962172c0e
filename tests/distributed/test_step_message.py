"""`StepMessage`: what several ranks say of a step, reduced by hand, is what all came to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from altgrad.distributed.peers import StepSums
from altgrad.distributed.step_message import StepMessage
from altgrad.measurement.columns import max_count, sum_count
from altgrad.observation.step import SkipReason
from tests.strategies import thorough

FORMATS, ROWS = 2, 5
SUMS, MAXIMA = sum_count(FORMATS), max_count(FORMATS)
STEP = 3, ("a", "b", "c")
REASONS: list[SkipReason | None] = [None, "no gradients", "learning rate 0", "inf"]
"""From the one that is told if no other is, to the one that is told in any case."""


def local(
    figures: Mapping[str, Tensor] | None = None,
    present: Sequence[str] = (),
    seconds: tuple[float, float] = (math.nan, math.nan),
    found_inf: bool = False,
    skipped: SkipReason | None = None,
) -> StepSums:
    rows = [*(figures or {}).values()]
    vectors = torch.stack(rows) if rows else torch.zeros(0, SUMS + MAXIMA, dtype=torch.float64)
    return StepSums(seconds, vectors, [*(figures or {})], present, found_inf, skipped)


def message_of(
    said: StepSums,
    error: Exception | None = None,
    step: tuple[int, tuple[str, ...]] = STEP,
) -> StepMessage:
    message = StepMessage(FORMATS, ROWS, *step)
    assert message.pack(said, error) is error
    return message


def reduced(messages: Sequence[StepMessage]) -> StepMessage:
    """Return the first one, as the collectives leave it on every rank."""
    first = messages[0]
    first.sums.copy_(torch.stack([each.sums for each in messages]).sum(0))
    first.maxima.copy_(torch.stack([each.maxima for each in messages]).amax(0))
    return first


@st.composite
def locals_of_ranks(draw: st.DrawFn) -> StepSums:
    """Of any of the layers, in any order; also of some that were measured and not stepped."""
    present = draw(st.lists(st.sampled_from(STEP[1]), unique=True))
    names = draw(st.lists(st.sampled_from(STEP[1]), unique=True))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    whole = (SUMS + MAXIMA,)
    return local(
        {name: torch.randint(-9, 9, whole, generator=generator).double() for name in names},
        present,
        (draw(st.sampled_from([math.nan, 0.0, 1.5])), draw(st.sampled_from([math.nan, 0.0, 2.5]))),
        draw(st.booleans()),
        draw(st.sampled_from(REASONS)),
    )


@thorough
@given(st.lists(locals_of_ranks(), min_size=1, max_size=4))
def test_all_come_to_the_sum_and_the_largest_of_what_each_says(each: list[StepSums]) -> None:
    step = reduced([message_of(said) for said in each]).unpack()
    assert step.names == [n for n in STEP[1] if any(n in said.present for said in each)]
    assert step.present == step.names
    assert step.error is None
    for name, vector in zip(step.names, step.vectors, strict=True):
        parts = [said.vectors[said.names.index(name)] for said in each if name in said.names]
        sums = sum((part[:SUMS] for part in parts), torch.zeros(SUMS).double())
        maxima = [
            max((float(p[SUMS + k]) for p in parts), default=-math.inf) for k in range(MAXIMA)
        ]
        assert vector.tolist() == [*sums.tolist(), *maxima]
    for place in (0, 1):
        known = [said.seconds[place] for said in each if not math.isnan(said.seconds[place])]
        assert repr(step.seconds[place]) == repr(max(known, default=math.nan))
    assert step.found_inf == any(said.found_inf for said in each)
    assert step.skipped == max((said.skipped for said in each), key=REASONS.index)


def test_all_hear_whether_any_of_them_has_failed() -> None:
    error = ArithmeticError()
    assert not reduced([message_of(local()) for _ in range(3)]).is_failed
    assert reduced([message_of(local(), each) for each in (None, error, None)]).is_failed
    assert reduced([message_of(local(), each) for each in (error, error)]).is_failed


def test_one_that_failed_says_no_figures_and_the_others_are_heard_all_the_same() -> None:
    ones = torch.ones(SUMS + MAXIMA).double()
    failed = message_of(local({"a": ones}, ["a"]), ArithmeticError())
    together = reduced([failed, message_of(local({"b": ones}, ["b"]))])
    assert together.is_failed
    assert together.unpack().names == ["b"]
    assert together.unpack().vectors.tolist() == [ones.tolist()]


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
    first, second = message_of(local()), message_of(local(), step=step)
    assert (first.sums.shape, first.maxima.shape) == (second.sums.shape, second.maxima.shape)
    assert first.agrees_on_step
    assert second.agrees_on_step
    assert reduced([first, second]).agrees_on_step == is_one
    assert reduced([second, message_of(local())]).agrees_on_step == is_one


@pytest.mark.parametrize("kind", ["stepped", "measured"])
def test_layers_that_were_not_agreed_upon_are_an_error_that_all_hear_of(kind: str) -> None:
    names = ["a", "d", "e"]
    figures = {name: torch.ones(SUMS + MAXIMA).double() for name in names}
    said = local(present=names) if kind == "stepped" else local(figures)
    message = StepMessage(FORMATS, ROWS, *STEP)
    error = message.pack(said, None)
    assert isinstance(error, RuntimeError)
    assert str(error) == "d, e are stepped and were not agreed upon"
    assert message.is_failed
    assert message.unpack().names == []


def test_an_error_from_before_is_the_one_that_is_told() -> None:
    before = ArithmeticError()
    assert StepMessage(FORMATS, ROWS, *STEP).pack(local(present=["d"]), before) is before
