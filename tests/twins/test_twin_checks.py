"""`TwinChecks`: the worst results of layers, on this rank and on others."""

from __future__ import annotations

import torch

from altgrad.measurement.twin_parts import TwinShare
from altgrad.twins.layer_plan import LaneKind
from altgrad.twins.self_check import Check
from altgrad.twins.twin_checks import TwinChecks

KIND = LaneKind(torch.float32, torch.float32, torch.device("cpu"), 1)
BLOCKS = KIND._replace(block=32)
PLACES = {check: place for place, check in enumerate(Check)}


def test_a_layer_with_several_samples_has_the_worst_result() -> None:
    checks = TwinChecks(print)
    checks.note(KIND, {"a": Check.EQUAL, "b": Check.DIFFERENT})
    checks.note(BLOCKS, {"a": Check.TAILS, "b": Check.EQUAL})
    assert checks.find_worst() == {"a": Check.TAILS, "b": Check.DIFFERENT}
    checks.note(KIND, {"b": Check.EQUAL})
    assert checks.find_worst() == {"a": Check.TAILS, "b": Check.EQUAL}


def test_another_rank_may_have_a_worse_result() -> None:
    notices: list[str] = []
    checks = TwinChecks(notices.append)
    checks.note(KIND, {"a": Check.EQUAL, "b": Check.EQUAL})
    checks.note_ranks(TwinShare([], {}, {"a": PLACES[Check.DIFFERENT], "b": PLACES[Check.EQUAL]}))
    assert checks.find_worst() == {"a": Check.DIFFERENT, "b": Check.EQUAL}
    assert checks.find_own() == {"a": Check.EQUAL, "b": Check.EQUAL}
    [notice] = notices
    assert "differ from the run in a on another rank" in notice


def test_layers_that_a_rank_misses_twice_have_a_notice() -> None:
    notices: list[str] = []
    checks = TwinChecks(notices.append)
    share = TwinShare([], {"bf16": ["a"], "now": ["a", "b"]}, {})
    checks.note_ranks(share)
    assert notices == []  # a layer that is new has no scale before the next observed step
    checks.note_ranks(TwinShare([], {"bf16": ["a"], "now": ["b"]}, {}))
    assert [notice.partition(":")[0] for notice in notices] == [
        "has no figures of the twins of bf16 in a",
        "has no figures of the twins of now in b",
    ]
