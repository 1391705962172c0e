"""`LoadedLanes`: which lane takes over which state of a checkpoint."""

from __future__ import annotations

from typing import Any

import torch

from altgrad import UpdateMonitor
from tests.twins.twinning import Watched, make_net, one_thread, train

on_one_thread = one_thread()


def resume(
    recipes: list[str], *, dtype: torch.dtype = torch.float32
) -> tuple[list[str], list[Any], list[Any]]:
    """Train with bf16, and go on with other recipes; return notices, and lanes after and before."""
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    first = Watched(net, optimizer, recipes=["bf16"])
    train(net, optimizer, 4)
    state = first.monitor.state_dict()
    first.monitor.detach()
    if dtype is not torch.float32:
        net.to(dtype)
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    notices: list[str] = []
    monitor = UpdateMonitor(
        net, formats=["e4m3fn"], recipes=recipes, warn=notices.append, strict=True
    )
    monitor.load_state_dict(state)
    monitor.attach(optimizer)
    train(net, optimizer, 3, first=4)
    return notices, monitor.state_dict()["twins"]["lanes"], state["twins"]["lanes"]


def test_a_state_goes_to_the_lane_of_its_layers() -> None:
    notices, [after], [before] = resume(["bf16"])
    assert not any("begin anew" in notice for notice in notices)
    assert after["kind"] == before["kind"]
    starts = [each["reference"]["tensors"]["start"] for each in (after, before)]
    assert torch.equal(*starts)


def test_a_state_without_a_recipe_is_not_taken_over() -> None:
    notices, [after], [before] = resume(["bf16", "bf16-sr"])
    assert "has all twins begin anew: the restored state has no recipe bf16-sr" in notices
    starts = [each["reference"]["tensors"]["start"] for each in (after, before)]
    assert not torch.equal(*starts)


def test_a_state_that_no_lane_wants_waits() -> None:
    _, lanes, [before] = resume(["bf16"], dtype=torch.bfloat16)
    assert [each["kind"][0] for each in lanes] == ["torch.bfloat16", "torch.float32"]
    assert torch.equal(
        lanes[1]["reference"]["tensors"]["start"], before["reference"]["tensors"]["start"]
    )
