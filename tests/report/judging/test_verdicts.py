"""The types of verdicts: what an advice rests on, and in which order layers come."""

import math

import pytest

from altgrad.report import Advice, Assessment, Verdict

NAN = math.nan


def advise(layer: str, recipe: str = "bf16", kept: float = 1.0, error: float = 0.0) -> Advice:
    figures, errors = {"progress_kept": kept}, {"progress_kept": error}
    return Advice(layer, recipe, Verdict.WATCH, figures, errors, "")


def test_each_verdict_has_a_phrase_and_a_word_of_its_own() -> None:
    assert len({each.short for each in Verdict}) == len({str(each) for each in Verdict}) == 10
    assert str(Verdict.FROZEN) == Verdict.FROZEN.short == "frozen"
    assert all(" " not in each.short for each in Verdict)


def test_an_advice_keeps_the_share_of_its_twin_or_of_single_steps() -> None:
    twin = advise("a", kept=0.7)
    steps = twin._replace(figures={"kept_update_ratio": 0.4})
    neither = twin._replace(figures={})
    assert [each.has_twin for each in (twin, steps, neither)] == [True, False, False]
    assert (twin.kept, steps.kept) == (0.7, 0.4)
    assert math.isnan(neither.kept)


def test_an_interval_is_that_of_95_percent() -> None:
    low, high = advise("a", kept=0.7, error=0.1).interval("progress_kept")
    assert (low, high) == pytest.approx((0.504, 0.896), abs=1e-4)
    assert advise("a", kept=0.7).interval("progress_kept") == (0.7, 0.7)
    assert all(map(math.isnan, advise("a", error=NAN).interval("progress_kept")))


def test_layers_that_keep_the_least_come_first() -> None:
    layers = [advise("most", kept=0.9), advise("nothing", kept=NAN), advise("least", kept=0.1)]
    found = Assessment({}, [*layers, advise("most", "e5m2", 0.5)], {}, "").by_layer
    assert [*found] == ["least", "most", "nothing"]
    assert [*found["most"]] == ["bf16", "e5m2"]


def test_layers_that_lose_now_come_before_those_that_would() -> None:
    advice = [
        *(advise("would", "now", 1.0), advise("would", "e5m2", 0.0)),
        *(advise("loses", "now", 0.6), advise("loses", "e5m2", 0.5)),
        *(advise("frozen", "now", 0.0), advise("frozen", "e5m2", 0.9)),
    ]
    assert [*Assessment({}, advice, {}, "").by_layer] == ["frozen", "loses", "would"]
