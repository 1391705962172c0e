"""A notice of the fused SGD that moves nothing in 16 bits on a CPU.

`test_twins_reference` asserts that torch still has this error.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer

from tests.twins.twinning import Watched, make_net, train

pytestmark = pytest.mark.default_twins

FP32, BF16 = torch.float32, torch.bfloat16


def run(kind: type[Optimizer], dtype: torch.dtype, recipes: list[str], **options: Any) -> list[str]:
    net = make_net(dtype)
    optimizer = kind(net.parameters(), lr=0.01, **options)  # type: ignore[call-arg]
    watched = Watched(net, optimizer, formats=["e4m3fn"], recipes=recipes)

    def freeze(index: int) -> None:
        if index >= 3:  # twins are rearranged
            net[0].bias.grad = None

    train(net, optimizer, 8, before_step=freeze)
    return watched.notices


@pytest.mark.parametrize(
    ("dtype", "recipes", "fused", "still"),
    [
        (FP32, ["bf16", "bf16-true", "fp16-true"], True, "the twin bf16-true, the twin fp16-true"),
        (FP32, ["bf16-true", "bf16-true-fused"], False, "the twin bf16-true-fused"),
        (BF16, ["e4m3fn"], True, "the run"),
        (BF16, ["fp16-true"], True, "the run, the twin fp16-true"),
    ],
)
def test_one_notice_names_the_run_and_twins_that_fused_sgd_does_not_move(
    dtype: torch.dtype, recipes: list[str], fused: bool, still: str
) -> None:
    [notice] = run(SGD, dtype, recipes, fused=fused)
    assert f"191763): {still}; create the optimizer with foreach=True" in notice


@pytest.mark.parametrize(
    ("kind", "recipes", "options"),
    [
        (SGD, ["bf16-true", "fp16-true"], {"foreach": True}),
        (SGD, ["bf16", "bf16-sr"], {"fused": True}),
        (AdamW, ["bf16-true", "bf16-true-fused"], {"fused": True}),
    ],
)
def test_other_runs_have_no_notice(
    kind: type[Optimizer], recipes: list[str], options: dict[str, Any]
) -> None:
    assert run(kind, FP32, recipes, **options) == []
