"""`StepMessage` carries the sums and maxima over ranks; here messages are reduced by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, strategies as st

from altgrad.distributed.peers import StepSums
from altgrad.distributed.step_message import StepMessage
from altgrad.measurement.columns import Numbers, max_count, sum_count
from altgrad.observation.step import SkipReason
from tests.strategies import thorough

FORMATS, ROWS = 2, 5
SUMS, MAXIMA = sum_count(FORMATS), max_count(FORMATS)
STEP = 3, ("a", "b", "c")
REASONS: list[SkipReason | None] = [None, "no gradients", "learning rate 0", "inf"]
"""Reasons by priority, lowest first: the reason of a step is the highest of any rank."""


def local(
    figures: Mapping[str, Numbers] | None = None,
    present: Sequence[str] = (),
    seconds: tuple[float, float] = (math.nan, math.nan),
    found_inf: bool = False,
    skipped: SkipReason | None = None,
) -> StepSums:
    rows = [*(figures or {}).values()]
    vectors = np.stack(rows) if rows else np.zeros((0, SUMS + MAXIMA))
    return StepSums(seconds, vectors, [*(figures or {})], present, found_inf, skipped)


def pack_message(
    said: StepSums,
    error: Exception | None = None,
    step: tuple[int, tuple[str, ...]] = STEP,
) -> StepMessage:
    message = StepMessage(FORMATS, ROWS, *step)
    assert message.pack(said, error) is error
    return message


def reduced(messages: Sequence[StepMessage]) -> StepMessage:
    """Return the first message as the collectives leave it on every rank."""
    first = messages[0]
    first.sums[:] = np.sum([each.sums for each in messages], axis=0)
    first.maxima[:] = np.max([each.maxima for each in messages], axis=0)
    return first


@st.composite
def draw_local_sums(draw: st.DrawFn) -> StepSums:
    """Draw sums for any layers in any order; some layers are measured but not stepped."""
    present = draw(st.lists(st.sampled_from(STEP[1]), unique=True))
    names = draw(st.lists(st.sampled_from(STEP[1]), unique=True))
    generator = np.random.default_rng(draw(st.integers(0, 9)))
    return local(
        {name: generator.integers(-9, 9, SUMS + MAXIMA).astype(np.float64) for name in names},
        present,
        (draw(st.sampled_from([math.nan, 0.0, 1.5])), draw(st.sampled_from([math.nan, 0.0, 2.5]))),
        draw(st.booleans()),
        draw(st.sampled_from(REASONS)),
    )


@thorough
@given(st.lists(draw_local_sums(), min_size=1, max_size=4))
def test_a_reduced_message_has_the_sums_and_maxima_over_ranks(each: list[StepSums]) -> None:
    step = reduced([pack_message(said) for said in each]).unpack()
    assert step.names == [n for n in STEP[1] if any(n in said.present for said in each)]
    assert step.present == step.names
    assert step.error is None
    for name, vector in zip(step.names, step.vectors, strict=True):
        parts = [said.vectors[said.names.index(name)] for said in each if name in said.names]
        sums = sum((part[:SUMS] for part in parts), np.zeros(SUMS))
        maxima = [
            max((float(p[SUMS + k]) for p in parts), default=-math.inf) for k in range(MAXIMA)
        ]
        assert vector.tolist() == [*sums.tolist(), *maxima]
    for place in (0, 1):
        known = [said.seconds[place] for said in each if not math.isnan(said.seconds[place])]
        assert repr(step.seconds[place]) == repr(max(known, default=math.nan))
    assert step.found_inf == any(said.found_inf for said in each)
    assert step.skipped == max((said.skipped for said in each), key=REASONS.index)


def test_a_reduced_message_shows_whether_any_rank_failed() -> None:
    error = ArithmeticError()
    assert not reduced([pack_message(local()) for _ in range(3)]).is_failed
    assert reduced([pack_message(local(), each) for each in (None, error, None)]).is_failed
    assert reduced([pack_message(local(), each) for each in (error, error)]).is_failed


def test_a_failed_rank_adds_no_sums_and_other_ranks_still_count() -> None:
    ones = np.ones(SUMS + MAXIMA)
    failed = pack_message(local({"a": ones}, ["a"]), ArithmeticError())
    together = reduced([failed, pack_message(local({"b": ones}, ["b"]))])
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
def test_messages_for_different_steps_disagree_after_they_are_reduced(step, is_one: bool) -> None:
    first, second = pack_message(local()), pack_message(local(), step=step)
    assert (first.sums.shape, first.maxima.shape) == (second.sums.shape, second.maxima.shape)
    assert first.agrees_on_step
    assert second.agrees_on_step
    assert reduced([first, second]).agrees_on_step == is_one
    assert reduced([second, pack_message(local())]).agrees_on_step == is_one


@pytest.mark.parametrize("kind", ["stepped", "measured"])
def test_unknown_layers_are_an_error_that_reaches_every_rank(kind: str) -> None:
    names = ["a", "d", "e"]
    figures = {name: np.ones(SUMS + MAXIMA) for name in names}
    said = local(present=names) if kind == "stepped" else local(figures)
    message = StepMessage(FORMATS, ROWS, *STEP)
    error = message.pack(said, None)
    assert isinstance(error, RuntimeError)
    assert str(error) == "d, e are stepped and were not agreed upon"
    assert message.is_failed
    assert message.unpack().names == []


def test_an_earlier_error_is_reported_instead_of_a_later_one() -> None:
    before = ArithmeticError()
    assert StepMessage(FORMATS, ROWS, *STEP).pack(local(present=["d"]), before) is before
