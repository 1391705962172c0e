"""`Twins`: the reference twin equals the run, whatever changes weights and states between steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from altgrad import Recipe, SamplingRule, UpdateMonitor
from altgrad.twins.self_check import Check
from tests.combining import combine
from tests.twins.twinning import Watched, assert_equal, copy_weights, make_net, one_thread, train

on_one_thread = one_thread()
pytestmark = pytest.mark.default_twins


# --- weights


def clamp(parameters: list[Tensor], index: int) -> None:
    for each in parameters:
        each.data.clamp_(-0.02, 0.02)


def clamp_counted(parameters: list[Tensor], index: int) -> None:
    with torch.no_grad():
        for each in parameters:
            each.clamp_(-0.02, 0.02)


def prune(parameters: list[Tensor], index: int) -> None:
    for each in parameters:
        each.data.mul_(torch.arange(each.numel()).view(each.shape) % 10 != 0)


def look_ahead(parameters: list[Tensor], index: int) -> None:
    if index % 5 == 4:
        for each in parameters:
            each.data.copy_(each.data * 0.9)


@pytest.mark.parametrize(
    ("write", "interval"), combine([clamp, clamp_counted, prune, look_ahead], [1, 5])
)
def test_weights_that_are_written_to_again_and_again_are_followed(
    write: Callable[[list[Tensor], int], None], interval: int
) -> None:
    net = make_net()
    optimizer = torch.optim.RMSprop(net.parameters(), 1e-3)
    watched = Watched(net, optimizer, every_n_steps=interval)
    for index in range(30):
        train(net, optimizer, 1, first=index)
        write([*net.parameters()], index)
    assert_equal(watched)
    assert watched.monitor.twins.resynchronised["0.weight"] >= 4


@pytest.mark.parametrize("through_data", [False, True])
def test_a_write_before_a_step_in_which_another_layer_gets_gradients_again_is_counted(
    through_data: bool,
) -> None:
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    watched = Watched(net, optimizer, every_n_steps=4)
    net[3].requires_grad_(False)
    net[2].requires_grad_(False)
    train(net, optimizer, 9)
    net[0].weight.data.mul_(0.9) if through_data else net[0].weight.detach().mul_(0.9)
    net[2].requires_grad_(True)
    train(net, optimizer, 1, first=9)
    net[3].requires_grad_(True)
    train(net, optimizer, 10, first=10)
    assert_equal(watched)
    assert watched.monitor.twins.resynchronised == {"0.weight": 1}


# --- states and groups


def roll_back(net: nn.Module, optimizer: Optimizer, saved: Any) -> None:
    net.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])


def restart(net: nn.Module, optimizer: Optimizer, saved: Any) -> None:
    optimizer.state.clear()


def reset_first_moment(net: nn.Module, optimizer: Optimizer, saved: Any) -> None:
    for state in optimizer.state.values():
        state["exp_avg"].zero_()


def reset_one_layer(net: nn.Module, optimizer: Optimizer, saved: Any) -> None:
    state = optimizer.state[net[0].weight]  # type: ignore[index]
    state["exp_avg"].zero_()
    state["step"].zero_()


def split_group(net: nn.Module, optimizer: Optimizer, saved: Any) -> None:
    [group] = optimizer.param_groups
    tail = group["params"][3:]
    group["params"] = group["params"][:3]
    optimizer.add_param_group({"params": tail, "lr": 1e-2})


def offload(net: nn.Module, optimizer: Optimizer, saved: Any) -> None:
    for state in optimizer.state.values():
        for name, value in state.items():
            state[name] = value.clone()


def load_again(net: nn.Module, optimizer: Optimizer, saved: Any) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def replace_parameter(net: nn.Module, optimizer: Optimizer, saved: Any) -> None:
    new = nn.Parameter(net[0].weight.detach() * 0.5)  # type: ignore[index,operator]
    swap_parameter(net[0], optimizer, new)  # type: ignore[index]


def replace_parameter_with_its_state(net: nn.Module, optimizer: Optimizer, saved: Any) -> None:
    state = optimizer.state[net[0].weight]  # type: ignore[index]
    new = nn.Parameter(net[0].weight.detach() * 0.5)  # type: ignore[index,operator]
    swap_parameter(net[0], optimizer, new)  # type: ignore[index]
    optimizer.state[new] = state


def grow(net: nn.Module, optimizer: Optimizer, saved: Any) -> None:
    old = net[3].weight  # type: ignore[index]
    swap_parameter(net[3], optimizer, nn.Parameter(torch.cat([old, old]).detach()))  # type: ignore[index,list-item]
    bias = net[3].bias  # type: ignore[index]
    swap_parameter(net[3], optimizer, nn.Parameter(torch.cat([bias, bias]).detach()), "bias")  # type: ignore[index,list-item]


def swap_parameter(
    layer: Any, optimizer: Optimizer, new: nn.Parameter, name: str = "weight"
) -> None:
    """Put another parameter in place of a layer's, without a state."""
    old = getattr(layer, name)
    setattr(layer, name, new)
    optimizer.state.pop(old)
    for group in optimizer.param_groups:
        group["params"] = [new if each is old else each for each in group["params"]]


def cast_and_back(net: nn.Module, optimizer: Optimizer, saved: Any) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        net.to(dtype)
        for state in optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].to(dtype)
        train(net, optimizer, 2)


CHANGES = (
    *(roll_back, restart, reset_first_moment, reset_one_layer, split_group, replace_parameter),
    *(replace_parameter_with_its_state, grow, cast_and_back),
)


@pytest.mark.parametrize(("change", "interval"), combine(CHANGES, [1, 7]))
def test_changes_of_states_parameters_and_groups_are_followed(
    change: Callable[..., None], interval: int
) -> None:
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    watched = Watched(net, optimizer, every_n_steps=interval, formats=["bf16"])
    train(net, optimizer, 10)
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    train(net, optimizer, 7, first=10)
    change(net, optimizer, saved)
    train(net, optimizer, 20, first=17)
    assert not [notice for notice in watched.notices if "twin" in notice]
    assert {*watched.monitor.twins.checks.values()} == {Check.EQUAL}


@pytest.mark.parametrize("change", [offload, load_again])
def test_states_that_are_moved_or_loaded_again_change_no_figure(change: Any) -> None:
    figures = []
    for changes in (False, True):
        net = make_net()
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
        recipes = ["bf16-true", Recipe("v", states={"exp_avg_sq": "bf16"})]
        watched = Watched(net, optimizer, recipes=recipes)
        for index in range(21):
            train(net, optimizer, 1, first=index)
            if changes and index > 10:
                change(net, optimizer, None)
        assert_equal(watched)
        figures.append(watched.records[-1].model["exp_avg_sq_ratio/v"])
    assert figures[0] == figures[1] != 1.0


def test_a_counter_of_any_name_tells_layers_apart() -> None:
    class HandWritten(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"lr": 1e-2})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for each in self.param_groups[0]["params"]:
                if each.grad is not None:
                    state = self.state[each]
                    state["t"] = state.get("t", 0) + 1
                    each.add_(each.grad.sign(), alpha=-1e-2 / state["t"])

    net = make_net()
    optimizer = HandWritten(net.parameters())
    net[0].requires_grad_(False)
    train(net, optimizer, 4)
    net[0].requires_grad_(True)
    train(net, optimizer, 2, first=4)
    watched = Watched(net, optimizer)
    train(net, optimizer, 20, first=6)
    assert_equal(watched)


@pytest.mark.parametrize(("place", "interval"), combine(["before", "after"], [1, 7]))
def test_a_rate_that_a_hook_of_the_optimizer_changes_is_followed(place: str, interval: int) -> None:
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    [group] = optimizer.param_groups

    def change(*_: Any) -> None:
        group["lr"] *= 0.8

    if place == "before":
        optimizer.register_step_post_hook(change)
    watched = Watched(net, optimizer, every_n_steps=interval)
    if place == "after":
        optimizer.register_step_post_hook(change)
    train(net, optimizer, 30)
    assert_equal(watched)


def test_the_states_of_a_factory_outlast_a_change_of_those_of_the_run() -> None:
    figures = []
    for changes in (False, True):
        net = make_net()
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
        recipe = Recipe("mine", optimizer=lambda held, group: torch.optim.SGD(held, 1e-2, 0.9))
        watched = Watched(net, optimizer, recipes=[recipe])
        train(net, optimizer, 16)
        if changes:
            reset_first_moment(net, optimizer, None)
        train(net, optimizer, 1, first=16)
        figures.append(watched.monitor.twins.state_dict()["lanes"][0]["twins"]["mine"]["states"])
    for one, other in zip(*figures, strict=True):
        assert torch.equal(one["momentum_buffer"], other["momentum_buffer"])


def round_moments(net: nn.Module, optimizer: Optimizer) -> None:
    for state in optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            state[name].copy_(state[name].bfloat16().float())


def replace_moment(net: nn.Module, optimizer: Optimizer) -> None:
    for state in optimizer.state.values():
        state["exp_avg"] = torch.zeros_like(state["exp_avg"])


@pytest.mark.parametrize(
    ("change", "fused"), combine([round_moments, replace_moment], [False, True])
)
def test_small_and_uncounted_changes_of_states_are_followed(change: Any, fused: bool) -> None:
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, fused=fused)
    watched = Watched(net, optimizer, every_n_steps=5, recipes=["bf16", "bf16-true"])
    for index in range(25):
        train(net, optimizer, 1, first=index)
        change(net, optimizer)
    assert_equal(watched)


class OwnSchedule(torch.optim.SGD):
    """An optimizer that lowers its own rate, and keeps an array that only its user understands."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["lr"] *= 0.9
            group["counts"] = group.get("counts", np.zeros(3)) + 1
        super().step(closure)


def test_a_factory_follows_a_schedule_that_the_run_makes_in_its_own_step() -> None:
    net = make_net()
    optimizer = OwnSchedule(net.parameters(), 1e-1)
    rates: list[float] = []

    class Tenth(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            rates.append(self.param_groups[0]["lr"])
            super().step(closure)

    tenth = Recipe("tenth", optimizer=lambda held, group: Tenth(held, lr=group["lr"] / 10))
    watched = Watched(net, optimizer, recipes=[tenth, "bf16-true"])
    train(net, optimizer, 10)
    assert_equal(watched)
    # The twin's step is that of the run's group before the run's own step has changed it.
    assert rates[1:] == pytest.approx([1e-2 * 0.9**k for k in range(1, 10)])


def test_a_layer_that_is_cut_to_a_smaller_one_begins_anew() -> None:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), 1e-2)
    watched = Watched(net, optimizer, formats=["bf16"], max_elements=64)
    train(net, optimizer, 10)
    net[3].weight.grad = net[3].bias.grad = None
    net[3].weight.data, net[3].bias.data = net[3].weight.data[:5].clone(), net[3].bias.data[:5]
    train(net, optimizer, 10, first=10)
    assert not [notice for notice in watched.notices if "twin" in notice]
    assert {*watched.monitor.twins.checks.values()} == {Check.EQUAL}


def test_figures_since_the_start_survive_a_change_of_states() -> None:
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    watched = Watched(net, optimizer, every_n_steps=1)
    start = copy_weights(net)[0].flatten()
    train(net, optimizer, 10)
    reset_first_moment(net, optimizer, None)
    train(net, optimizer, 1, first=10)
    frozen = watched.records[-1].layers["0.weight"]["frozen_frac/bf16"]
    before = watched.records[-2].layers["0.weight"]["frozen_frac/bf16"]
    assert frozen <= before < 1
    assert (copy_weights(net)[0].flatten() != start).all()


# --- windows


def test_the_window_of_a_layer_begins_at_the_last_record_with_the_layer() -> None:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    rules = [SamplingRule("0.weight", every_n_steps=5)]
    watched = Watched(
        net, optimizer, sampling=rules, every_n_steps=1, formats=["bf16"], recipes=["fp32", "bf16"]
    )
    train(net, optimizer, 11)
    shown = [each for each in watched.records if "0.weight" in each.layers]
    assert len(shown) == 3
    last = shown[-1].layers["0.weight"]
    other = make_net()
    again = torch.optim.SGD(other.parameters(), 1e-3)
    due = [each.index for each in shown]
    seen = Watched(other, again, every_n_steps=lambda index: index in due, recipes=["bf16"])
    train(other, again, 11)
    assert last["still_frac/bf16"] == seen.records[-1].layers["0.weight"]["still_frac/bf16"]


def test_a_skipped_observed_step_begins_no_window() -> None:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    watched = Watched(net, optimizer, every_n_steps=lambda index: index % 2 == 0, recipes=["bf16"])
    train(net, optimizer, 2)
    train(net, optimizer, 1, first=2, before_step=lambda _: optimizer.param_groups[0].update(lr=0))
    optimizer.param_groups[0]["lr"] = 1e-3
    train(net, optimizer, 2, first=3)
    assert len(watched.records) == 2
    other = make_net()
    again = torch.optim.SGD(other.parameters(), 1e-3)
    seen = Watched(
        other,
        again,
        every_n_steps=lambda index: index in (0, 3),
        formats=["bf16"],
        recipes=["bf16"],
    )
    train(other, again, 2)
    train(other, again, 2, first=3)
    assert watched.records[-1].model["still_frac/bf16"] == pytest.approx(
        seen.records[-1].model["still_frac/bf16"]
    )


# --- the surroundings


def test_twins_step_under_a_default_device_and_inference_mode() -> None:
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    watched = Watched(net, optimizer, every_n_steps=2, formats=["bf16"])
    for index in range(6):
        random = torch.Generator().manual_seed(index)
        net(torch.randn(32, 65, generator=random)).square().mean().backward()
        with torch.device("meta"), torch.inference_mode():
            optimizer.step()
        optimizer.zero_grad()
    assert_equal(watched)


@pytest.mark.filterwarnings("error")
def test_warnings_as_errors_leave_twins_that_follow_updates() -> None:
    net = make_net()
    optimizer = torch.optim.Adafactor(net.parameters(), 1e-3)
    settings: dict[str, Any] = {"every_n_steps": 5, "formats": ["bf16"], "recipes": ["bf16"]}
    records: list[Any] = []
    monitor = UpdateMonitor(net, records.append, **settings).attach(optimizer)
    with pytest.raises(UserWarning, match="feeds the twins of bf16"):
        train(net, optimizer, 1)
    train(net, optimizer, 20, first=1)
    assert records[-1].model["progress_kept/bf16"] == records[-1].model["progress_kept/bf16"]
    assert records[-1].model.recipes == ("bf16",)
    monitor.detach()


def test_a_parameter_that_replaces_another_is_followed_by_an_optimizer_without_states() -> None:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    watched = Watched(net, optimizer, recipes=["bf16", "bf16-true"])
    train(net, optimizer, 10)
    optimizer.state[net[0].weight] = {}
    replace_parameter(net, optimizer, None)
    train(net, optimizer, 20, first=10)
    assert_equal(watched)
    assert watched.monitor.twins.resynchronised == {"0.weight": 1}
