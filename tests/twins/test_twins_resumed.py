"""`Twins` after a resume: they go on exactly, or begin anew with a notice."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from altgrad import UpdateMonitor
from altgrad.twins.self_check import Check
from tests.twins.twinning import Watched, assert_equal, make_net, one_thread, train

on_one_thread = one_thread()
pytestmark = pytest.mark.default_twins


def resume(net: nn.Module, optimizer: Optimizer, state: dict[str, Any], **settings: Any) -> Watched:
    watched = Watched(nn.Linear(2, 2), **settings)
    watched.monitor = UpdateMonitor(
        net,
        watched.records.append,
        warn=watched.note,
        **{"formats": ["bf16"], "every_n_steps": 5, "strict": True} | settings,
    )
    watched.monitor.load_state_dict(state)
    watched.monitor.attach(optimizer)
    return watched


def save_after(steps: int, **settings: Any) -> tuple[nn.Module, Optimizer, dict[str, Any]]:
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    watched = Watched(net, optimizer, formats=["bf16"], **settings)
    train(net, optimizer, steps)
    watched.monitor.detach()
    return net, optimizer, watched.monitor.state_dict()


@pytest.mark.parametrize("change", ["seed", "steps"])
def test_twins_begin_anew_if_the_state_has_other_elements_or_the_run_went_on(change: str) -> None:
    net, optimizer, state = save_after(10)
    if change == "steps":
        train(net, optimizer, 10, first=10)
    watched = resume(net, optimizer, state, seed=int(change == "seed"))
    train(net, optimizer, 20, first=20)
    assert any("twins" in each and "begin anew" in each for each in watched.notices)
    assert {*watched.monitor.twins.checks.values()} == {Check.EQUAL}
    assert watched.records[-1].model["frozen_frac/bf16"] < 1


def test_a_recipe_that_is_new_at_a_resume_makes_all_twins_begin_anew() -> None:
    net, optimizer, state = save_after(10, recipes=["bf16"])
    watched = resume(net, optimizer, state, recipes=["fp32", "bf16"])
    train(net, optimizer, 20, first=10)
    [notice] = watched.notices
    assert "fp32" in notice
    for layer in watched.records[-1].layers.values():
        assert layer["progress_kept/fp32"] == pytest.approx(1.0)


def test_a_recipe_that_is_missing_at_a_resume_leaves_the_other_twins_as_they_are() -> None:
    net, optimizer, state = save_after(10, recipes=["fp32", "bf16"])
    watched = resume(net, optimizer, state, recipes=["fp32"])
    train(net, optimizer, 20, first=10)
    assert_equal(watched)


@pytest.mark.parametrize("name", ["ASGD", "NAdam"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_numbers_that_torch_rounds_at_a_resume_end_no_twin(name: str, dtype: torch.dtype) -> None:
    net = make_net(dtype)
    make = getattr(torch.optim, name)
    optimizer = make(net.parameters(), 1e-3, foreach=True)
    watched = Watched(net, optimizer, formats=["e4m3fn"], recipes=["bf16", "e4m3fn"])
    train(net, optimizer, 10)
    state, saved = copy.deepcopy(watched.monitor.state_dict()), optimizer.state_dict()
    watched.monitor.detach()
    optimizer = make(net.parameters(), 1e-3, foreach=True)
    optimizer.load_state_dict(saved)
    watched = resume(net, optimizer, state, formats=["e4m3fn"], recipes=["bf16", "e4m3fn"])
    train(net, optimizer, 10, first=10)
    assert watched.notices == []


@pytest.mark.parametrize("through_data", [False, True])
def test_a_write_between_the_last_step_and_a_checkpoint_is_seen_after_a_resume(
    through_data: bool,
) -> None:
    figures = []
    for stops in (False, True):
        net = make_net()
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
        watched = Watched(net, optimizer, formats=["bf16"], every_n_steps=lambda i: i in (3, 5, 17))
        train(net, optimizer, 3)
        net[0].weight.data.mul_(0.9)  # found at step 3; from then on, the weights are watched
        train(net, optimizer, 7, first=3)
        with torch.no_grad():
            written = net[3].weight.data if through_data else net[3].weight
            written.mul_(0.9)
        reset_moment(optimizer.state[net[0].weight])
        if stops:
            state = copy.deepcopy(watched.monitor.state_dict())
            watched.monitor.detach()
            watched = resume(net, optimizer, state, every_n_steps=lambda i: i == 7)
        train(net, optimizer, 10, first=10)
        assert_equal(watched)
        layers = watched.records[-1].layers
        figures.append({f"{n} {k}": layers[n][k] for n in layers for k in layers[n].twin_keys})
    assert figures[0] == pytest.approx(figures[1], rel=0, abs=0, nan_ok=True)


def reset_moment(state: dict[str, Tensor]) -> None:
    state["exp_avg"].zero_()
    state["step"].zero_()
