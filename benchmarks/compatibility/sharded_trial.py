"""Train a sharded model twice, and compare its figures with those of one process.

The process replays the whole tensors, which a run has cloned around each step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from altgrad import StepRecord
from benchmarks.compatibility.trial import (
    EXACT,
    LEFT_OUT,
    NOT_RUN,
    REFUSED,
    WRONG,
    Finding,
    RefusedError,
    quiet,
    shorten,
)
from tests.distributed.comparing import differences
from tests.distributed.sharded import WholeStep, replayed

SETTINGS: dict[str, Any] = {"max_elements": 300, "recipes": ()}


class Sharded(NamedTuple):
    """What a training of a sharded model was: its whole steps, the records, the notices."""

    steps: list[WholeStep]
    records: list[StepRecord]
    notices: list[str]


def try_sharded(train: Callable[[bool], Sharded], *, is_silent: bool = False) -> Finding:
    """Train on a rank without and with a monitor, and compare with one process.

    Args:
        train: Function that trains; its argument is True if it is watched.
        is_silent: If True, the rank is to observe nothing, as all under DDP but the first.

    Returns:
        What came out on this rank.
    """
    with quiet():
        try:
            plain = train(False)
        except Exception as error:  # noqa: BLE001 - a library or a device is missing
            return Finding(NOT_RUN, f"fails without AltGrad: {shorten(error)}")
        try:
            watched = train(True)
        except RefusedError as error:
            return Finding(REFUSED, str(error))
        if not is_same(plain.steps, watched.steps):
            return Finding(WRONG, "training differs from that without AltGrad")
        note = " ".join(dict.fromkeys(watched.notices))
        if not watched.records:
            silent = Finding(EXACT) if is_silent else Finding(WRONG, "no record")
            return Finding(LEFT_OUT, note) if note else silent
        problem = compare_with_one_process(watched)
    return Finding(WRONG, problem) if problem else Finding(EXACT, note)


def compare_with_one_process(watched: Sharded) -> str | None:
    """Describe the first figure that differs from that of one process; None if there is none."""
    layers = {name: before for step in watched.steps for name, (before, _, _) in step.items()}
    parameters = {name: nn.Parameter(before.clone()) for name, before in layers.items()}
    expected = replayed(watched.steps, parameters=parameters, **SETTINGS).records
    if len(watched.records) != len(expected):
        return f"{len(watched.records)} records instead of {len(expected)}"
    pairs = zip(watched.records, expected, strict=True)
    return next((found for own, other in pairs for found in differences(own, other)), None)


def is_same(some: list[WholeStep], others: list[WholeStep]) -> bool:
    """Compare steps bit for bit; NaN, which some rows have, equals itself."""

    def equal(a: Tensor, b: Tensor) -> bool:
        return torch.equal(a.view(torch.int32), b.view(torch.int32))

    return len(some) == len(others) and all(
        mine.keys() == theirs.keys()
        and all(equal(a, b) for n in mine for a, b in zip(mine[n], theirs[n], strict=True))
        for mine, theirs in zip(some, others, strict=True)
    )
