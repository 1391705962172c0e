"""`StepMessage` carries the sums and maxima over ranks; here messages are reduced by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, strategies as st

from altgrad.distributed.peers import StepSums
from altgrad.distributed.step_message import Expected, StepMessage
from altgrad.measurement.columns import ELEMENTS, POPULATION, max_count, sum_count
from altgrad.measurement.numbers import Numbers
from altgrad.observation.observer import RankError
from altgrad.observation.step import SkipReason
from tests.strategies import thorough

FORMATS, ROWS = 2, 5
SUMS, MAXIMA = sum_count(FORMATS), max_count(FORMATS)
STEP, LAYERS = "step 3 of SGD", ("a", "b", "c")
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


def pack_messages(
    each: Sequence[StepSums], step: str = STEP, layers: Sequence[str] = LAYERS
) -> list[StepMessage]:
    """Return the message of each rank, which expects the elements that they have together."""
    elements = {
        name: sum(float(s.vectors[s.names.index(name), ELEMENTS]) for s in each if name in s.names)
        for name in layers
    }
    expected = {name: Expected(1000, count) for name, count in elements.items()}
    messages = [StepMessage(step, expected, ROWS, FORMATS) for _ in each]
    for message, said in zip(messages, each, strict=True):
        message.pack(said)
    return messages


def failed_message() -> StepMessage:
    """Return the message of a rank that has failed, and therefore packs nothing."""
    return StepMessage(STEP, dict.fromkeys(LAYERS, Expected(1000, 0)), ROWS, FORMATS)


def reduced(messages: Sequence[StepMessage]) -> StepMessage:
    """Return the first message as the collectives leave it on every rank."""
    first = messages[0]
    first.sums[:] = np.sum([each.sums for each in messages], axis=0)
    first.maxima[:] = np.max([each.maxima for each in messages], axis=0)
    return first


@st.composite
def draw_local_sums(draw: st.DrawFn) -> StepSums:
    """Draw sums for any layers in any order; some layers are measured but not stepped."""
    present = draw(st.lists(st.sampled_from(LAYERS), unique=True))
    names = draw(st.lists(st.sampled_from(LAYERS), unique=True))
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
    step = reduced(pack_messages(each)).unpack(0)
    assert step.names == [n for n in LAYERS if any(n in said.present for said in each)]
    assert step.present == step.names
    assert step.error is None
    for name, vector in zip(step.names, step.vectors, strict=True):
        parts = [said.vectors[said.names.index(name)] for said in each if name in said.names]
        sums = sum((part[:SUMS] for part in parts), np.zeros(SUMS))
        sums[POPULATION] = 1000  # of the whole layer, whatever ranks have
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
    first, second, third = pack_messages([local()] * 3)
    assert not reduced([first, second, third]).is_failed
    assert reduced([first, failed_message(), third]).is_failed
    assert reduced([failed_message(), failed_message()]).is_failed


@pytest.mark.parametrize(
    ("step", "layers", "is_one"),
    [
        (STEP, "abc", True),
        ("step 4 of SGD", "abc", False),
        ("step 3 of Adam", "abc", False),
        (STEP, "ab", False),
        (STEP, "acb", False),
    ],
    ids=["same", "index", "optimizer", "layers", "order"],
)
def test_ranks_in_different_steps_are_an_error_on_each(step, layers, is_one: bool) -> None:
    (first,), (second,) = pack_messages([local()]), pack_messages([local()], step, layers)
    assert (first.sums.shape, first.maxima.shape) == (second.sums.shape, second.maxima.shape)
    for own, other in ((first, second), (second, pack_messages([local()])[0])):
        assert own.unpack(1).names == []
        together = reduced([own, other])
        if is_one:
            assert together.unpack(1).names == []
            continue
        expected = f"different steps or layers, rank 1 {own.step} with .* give every rank the same"
        with pytest.raises(RankError, match=expected):
            together.unpack(1)


@pytest.mark.parametrize("elements", [4, 6])
def test_elements_that_are_missing_or_counted_twice_are_an_error(elements: int) -> None:
    message = StepMessage(STEP, {"a": Expected(1000, elements)}, ROWS, FORMATS)
    message.pack(local({"a": np.full(SUMS + MAXIMA, 5.0)}, ["a"]))
    expected = f"^a, {STEP}: expected {elements} measured elements on all ranks together, got 5: "
    with pytest.raises(RankError, match=expected):
        message.unpack(0)


@pytest.mark.parametrize("kind", ["stepped", "measured"])
def test_layers_that_ranks_have_not_agreed_on_are_an_error(kind: str) -> None:
    names = ["a", "d", "e"]
    figures = {name: np.ones(SUMS + MAXIMA) for name in names}
    message = failed_message()
    with pytest.raises(RuntimeError, match=r"^layers=d, e: expected layers that all ranks knew"):
        message.pack(local(present=names) if kind == "stepped" else local(figures))
    assert message.is_failed


def test_packing_raises_the_error_of_the_step() -> None:
    message, error = failed_message(), ArithmeticError()
    with pytest.raises(ArithmeticError) as raised:
        message.pack(local()._replace(error=error))
    assert raised.value is error
    assert message.is_failed
