"""`LaneAverages`: averages of twins over a whole training, with resumes, errors and costs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from altgrad import Recipe, UpdateMonitor
from tests.counting import host_copies
from tests.twins.averaging import (
    count_differences,
    iterate_sampled,
    list_notices,
    make_hand_written,
    train_averaged,
    update_by_hand,
)
from tests.twins.twinning import Watched, copy_weights, make_net, one_thread, train

on_one_thread = one_thread()

RECIPES = ["bf16-true", Recipe("low", states={"average": "bf16"}, rounding="stochastic")]


def make_average(net: nn.Module, decay: float = 0.9) -> AveragedModel:
    return AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay))


def watch(net: nn.Module, averaged: nn.Module, **settings: Any) -> tuple[Watched, AdamW]:
    optimizer = AdamW(net.parameters(), 1e-3)
    watched = Watched(net, optimizer, **{"recipes": RECIPES, "formats": ["e4m3fn"]} | settings)
    watched.monitor.watch_average(averaged)
    return watched, optimizer


def list_figures(watched: Watched) -> list[dict[str, float]]:
    return [
        {f"{n} {k}": each.layers[n][k] for n in each.layers for k in each.layers[n].twin_keys}
        for each in watched.records
    ]


# --- resumes


def make_pair(net: nn.Module, *, by_hand: bool) -> tuple[nn.Module, Callable[[int], object]]:
    """Return an average, and a function that updates it."""
    if by_hand:
        copied = make_hand_written(net)
        return copied, lambda _: update_by_hand(copied, net, 0.9)
    averaged = make_average(net)
    return averaged, lambda _: averaged.update_parameters(net)


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_resumed_run_has_the_figures_of_one_that_was_not_interrupted(by_hand: bool) -> None:
    ends = []
    for stops in (False, True):
        net = make_net()
        averaged, update = make_pair(net, by_hand=by_hand)
        watched, optimizer = watch(net, averaged)
        train_averaged(net, optimizer, 9, update)
        if stops:
            state = copy.deepcopy(watched.monitor.state_dict())
            watched.monitor.detach()
            saved = copy.deepcopy(averaged.state_dict())
            averaged, update = make_pair(net, by_hand=by_hand)
            averaged.load_state_dict(saved)
            watched.monitor = UpdateMonitor(
                net,
                watched.records.append,
                formats=["e4m3fn"],
                every_n_steps=lambda index: index == 4,
                recipes=RECIPES,
                warn=watched.notices.append,
                strict=True,
            )
            watched.monitor.load_state_dict(state)
            watched.monitor.watch_average(averaged).attach(optimizer)
        train_averaged(net, optimizer, 9, update, first=9)
        assert count_differences(watched.monitor, averaged) == 0
        assert list_notices(watched) == []
        ends.append(list_figures(watched)[-1])
        assert len(watched.records) == 2
    assert ends[0] == pytest.approx(ends[1], rel=0, abs=0, nan_ok=True)
    assert ends[0]["0.weight average_error/low"] > 0


def test_twins_that_are_attached_again_go_on_with_their_averages() -> None:
    net = make_net()
    averaged = make_average(net)
    watched, optimizer = watch(net, averaged)
    train_averaged(net, optimizer, 5, lambda _: averaged.update_parameters(net))
    before = [own for _, _, own in iterate_sampled(watched.monitor, "low")]
    watched.monitor.detach()
    watched.monitor.attach(optimizer)
    train(net, optimizer, 1, first=5)
    after = [own for _, _, own in iterate_sampled(watched.monitor, "low")]
    assert all(map(torch.equal, before, after))
    assert count_differences(watched.monitor, averaged) == 0


# --- endings


def test_a_function_that_cannot_run_on_a_sample_ends_the_average_with_one_notice() -> None:
    def average_rows(averaged: Tensor, weights: Tensor, _: Tensor) -> Tensor:
        if averaged.dim() == 1 and len(averaged) > 130:
            raise ValueError("expected a matrix")
        return averaged.lerp(weights, 0.1)

    net = make_net()
    averaged = AveragedModel(net, avg_fn=average_rows)
    watched, optimizer = watch(net, averaged)
    train_averaged(net, optimizer, 16, lambda _: averaged.update_parameters(net))
    [notice] = watched.notices
    assert "ends the figures of the average 'average'" in notice
    assert "expected a matrix" in notice
    assert "average_ratio/low" not in watched.records[-1].layers["0.weight"]
    assert watched.records[-1].layers["0.weight"]["progress_kept/low"] > 0.99


class Moving(AveragedModel):
    """Averages otherwise than by its function."""

    def update_parameters(self, model: nn.Module) -> None:
        super().update_parameters(model)
        with torch.no_grad():
            for each in self.module.parameters():
                each.mul_(1.01)


@pytest.mark.parametrize("gap", [1, 3])
@pytest.mark.parametrize("every", [1, 3])
def test_an_average_whose_updates_differ_from_the_run_ends_with_one_notice(
    every: int, gap: int
) -> None:
    net = make_net()
    averaged = Moving(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    watched, optimizer = watch(net, averaged, every_n_steps=every)
    train_averaged(
        net, optimizer, 13, lambda i: None if i % gap else averaged.update_parameters(net)
    )
    [notice] = watched.notices
    assert "ends the figures of the average 'average'" in notice
    assert "differ from the run in 0.weight" in notice


@pytest.mark.parametrize("every", [1, 3])
def test_an_average_that_is_no_moving_average_ends_with_one_notice(every: int) -> None:
    net = make_net()
    averaged = make_hand_written(net)
    watched, optimizer = watch(net, averaged, every_n_steps=every)

    def update(index: int) -> None:
        with torch.no_grad():
            for each in averaged.parameters():
                random = torch.Generator().manual_seed(index)
                each.copy_(torch.randn(each.shape, generator=random))

    train_averaged(net, optimizer, 13, update)
    [notice] = watched.notices
    assert "ends the figures of the average 'average'" in notice


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("watches_inside", [False, True])
def test_an_averaged_model_that_a_loop_updates_is_told_to_be_watched_inside(
    every: int, watches_inside: bool
) -> None:
    net = make_net()
    averaged = make_average(net)
    watched, optimizer = watch(
        net, averaged.module if watches_inside else averaged, every_n_steps=every
    )
    train_averaged(net, optimizer, 16, lambda _: update_by_hand(averaged.module, net, 0.95))
    if watches_inside:
        assert watched.notices == []
        assert "average_error/low" in watched.records[-1].layers["0.weight"]
        return
    [notice] = watched.notices
    assert "watch_average(averaged.module)" in notice
    assert "average_error/low" not in watched.records[-1].layers["0.weight"]


def test_an_average_that_is_often_written_back_without_a_change_goes_on() -> None:
    net = make_net()
    averaged = make_average(net)
    watched, optimizer = watch(net, averaged, every_n_steps=1)

    def write_back(_: int) -> None:
        averaged.module.load_state_dict(copy.deepcopy(averaged.module.state_dict()))

    train_averaged(net, optimizer, 12, write_back)
    assert list_notices(watched) == []


@pytest.mark.parametrize("make", [make_average, AveragedModel])
def test_an_average_that_is_loaded_once_goes_on(make: Callable[..., AveragedModel]) -> None:
    net = make_net()
    averaged = make(net)
    other = copy.deepcopy(averaged.state_dict())
    watched, optimizer = watch(net, averaged, every_n_steps=3)

    def update(index: int) -> None:
        if index == 7:
            averaged.load_state_dict(other)
        else:
            averaged.update_parameters(net)

    train_averaged(net, optimizer, 22, update)
    assert count_differences(watched.monitor, averaged) == 0
    assert list_notices(watched) == []


def test_an_optimizer_that_is_not_elementwise_leaves_averages_of_the_weights() -> None:
    net = make_net()
    averaged = make_average(net)
    optimizer = Adafactor(net.parameters(), 1e-3)
    watched = Watched(net, optimizer, recipes=["bf16"], formats=["e4m3fn"])
    watched.monitor.watch_average(averaged)
    train_averaged(net, optimizer, 15, lambda _: averaged.update_parameters(net))
    assert count_differences(watched.monitor, averaged) == 0
    assert watched.records[-1].layers["0.weight"]["average_error/bf16"] > 0


def test_a_recipe_that_names_the_average_is_not_told_that_it_stores_nothing() -> None:
    for watches in (True, False):
        net = make_net()
        optimizer = SGD(net.parameters(), 1e-3, momentum=0.9)
        watched = Watched(net, optimizer, recipes=RECIPES, formats=["e4m3fn"])
        if watches:
            watched.monitor.watch_average(make_average(net))
        train(net, optimizer, 2)
        assert len(watched.notices) == (0 if watches else 1)


@pytest.mark.parametrize("first", ["generator", "critic"])
def test_a_state_that_another_optimizer_or_lane_stores_is_not_said_to_be_missing(
    first: str,
) -> None:
    parts = {"generator": make_net(), "critic": nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 1))}
    net = nn.ModuleDict(parts)
    averaged = make_average(parts["generator"])
    optimizers = {
        "generator": AdamW(parts["generator"].parameters(), 1e-3),
        "critic": SGD(parts["critic"].parameters(), 1e-2, momentum=0.9),
    }
    recipe = Recipe("mine", states={"average": "bf16", "exp_avg_sq": "bf16", "typo": "bf16"})
    watched = Watched(net, *optimizers.values(), recipes=[recipe], formats=["e4m3fn"])
    watched.monitor.watch_average(averaged)
    for index in range(6):
        net.zero_grad()
        parts["critic"](parts["generator"](torch.randn(4, 65))).square().mean().backward()
        if first == "generator" or index > 1:
            optimizers["generator"].step()
            averaged.update_parameters(parts["generator"])
        if first == "critic" or index > 1:
            optimizers["critic"].step()
    [notice] = watched.notices
    assert notice.startswith("stores nothing of typo in the twin of mine: expected names of states")


def test_a_statistic_of_another_lane_is_found_and_one_in_16_bits_is_said_to_be_so() -> None:
    for dtype, count in ((torch.float32, 0), (torch.bfloat16, 1)):
        head = nn.Linear(80, 8).double()
        body = nn.Sequential(nn.Linear(8, 80), nn.BatchNorm1d(80)).to(dtype)
        net = nn.ModuleDict({"body": body, "head": head})
        optimizer = AdamW(net.parameters())
        recipe = Recipe("mine", states={"running_var": "e5m2"})
        watched = Watched(net, optimizer, recipes=[recipe], formats=["e4m3fn"])
        for _ in range(3):
            head(body(torch.randn(16, 8).to(dtype)).double()).square().mean().backward()
            optimizer.step()
        notices = [each for each in watched.notices if "stores nothing" in each]
        assert len(notices) == count
        assert all("expected BatchNorm with running_var in float32" in each for each in notices)


# --- scaled formats, other dtypes, several averages


def test_an_average_in_a_format_with_scales_has_the_scales_of_whole_layers() -> None:
    net = make_net()
    averaged = make_average(net)
    recipe = Recipe("tiny", states={"average": "e4m3fn"})
    watched, optimizer = watch(net, averaged, recipes=[recipe])
    train_averaged(net, optimizer, 8, lambda _: averaged.update_parameters(net))
    for layer in watched.records[-1].layers.values():
        assert 0.001 < layer["average_error/tiny"] < 0.1
    assert list_notices(watched) == []


def test_a_float32_average_of_bf16_weights_stays_in_float32_in_all_twins() -> None:
    net = make_net(torch.bfloat16)
    averaged = make_hand_written(net).float()
    watched, optimizer = watch(net, averaged)

    def update(_: int) -> None:
        with torch.no_grad():
            for average, weights in zip(averaged.parameters(), net.parameters(), strict=True):
                average.lerp_(weights.float(), 0.1)

    train_averaged(net, optimizer, 10, update)
    assert count_differences(watched.monitor, averaged) == 0
    for twin in ("bf16-true", "baseline"):
        assert {own.dtype for _, _, own in iterate_sampled(watched.monitor, twin)} == {
            torch.float32
        }
    assert list_notices(watched) == []


def test_the_average_of_a_run_in_bf16_has_figures_of_itself() -> None:
    net = make_net(torch.bfloat16)
    averaged = make_average(net, 0.99)
    watched, optimizer = watch(net, averaged, every_n_steps=1)
    train_averaged(net, optimizer, 10, lambda _: averaged.update_parameters(net))
    train(net, optimizer, 1, first=10)
    twins = [
        {layer: own.double() for layer, _, own in iterate_sampled(watched.monitor, twin)}
        for twin in ("reference", "baseline")
    ]
    assert count_differences(watched.monitor, averaged) == 0
    for layer, figures in watched.records[-1].layers.items():
        low, high = (each[layer] for each in twins)
        error = ((low - high).norm() / high.norm()).item()
        assert figures["average_error/now"] == pytest.approx(error, rel=1e-6), layer
    assert list_notices(watched) == []


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_a_run_whose_weights_are_stored_in_a_format_has_figures_of_its_average(
    rounding: Any,
) -> None:
    net = make_net()
    averaged = make_average(net, 0.99)
    optimizer = AdamW(net.parameters(), 1e-3)
    with Recipe("mine", weights="bf16", rounding=rounding).attach(optimizer, module=net):
        watched = Watched(net, optimizer, recipes=["bf16-true"], every_n_steps=1)
        watched.monitor.watch_average(averaged)
        train_averaged(net, optimizer, 10, lambda _: averaged.update_parameters(net))
        assert count_differences(watched.monitor, averaged) == 0
        assert watched.records[-1].layers["0.weight"]["average_error/now"] > 0
        watched.monitor.detach()


def test_two_averages_have_figures_of_their_own() -> None:
    net = make_net()
    fast, slow = make_average(net, 0.5), make_average(net, 0.99)
    watched, optimizer = watch(net, fast)
    watched.monitor.watch_average(slow, "slow")

    def update(_: int) -> None:
        fast.update_parameters(net)
        slow.update_parameters(net)

    train_averaged(net, optimizer, 8, update)
    figures = watched.records[-1].layers["0.weight"]
    assert figures["average_error/bf16-true"] != figures["slow_error/bf16-true"]
    assert math_is_close(figures["average_ratio/low"], figures["slow_ratio/low"])


def test_an_average_of_a_part_has_figures_at_the_layers_of_that_part_alone() -> None:
    net = make_net()
    averaged = make_average(net[0])
    watched, optimizer = watch(net, averaged)
    train_averaged(net, optimizer, 8, lambda _: averaged.update_parameters(net[0]))
    found = {key.split()[0] for key in list_figures(watched)[-1] if "average" in key}
    assert found == {"0.weight", "0.bias"}


def math_is_close(one: float, other: float) -> bool:
    return abs(one - 1) < 0.05 and abs(other - 1) < 0.05


# --- what the training does not notice


@pytest.mark.parametrize("by_hand", [False, True])
def test_training_and_average_are_those_without_a_monitor(by_hand: bool) -> None:
    ends: list[list[Tensor]] = []
    for watches in (False, True):
        net = make_net()
        averaged, update = make_pair(net, by_hand=by_hand)
        optimizer = AdamW(net.parameters(), 1e-3)
        if watches:
            watched = Watched(net, optimizer, recipes=RECIPES, formats=["e4m3fn"])
            watched.monitor.watch_average(averaged)
        train_averaged(net, optimizer, 10, update)
        ends.append([*copy_weights(net), *copy_weights(averaged), torch.get_rng_state()])
    assert all(map(torch.equal, *ends))


def count_copies(update: Callable[[int], object] | None, observes: bool) -> int:
    """Count the host copies of a step with an average, and without one if `update` is None."""
    net = make_net()
    averaged = make_hand_written(net) if update is None else make_average(net)
    optimizer = SGD(net.parameters(), 1e-3, momentum=0.9)
    watched = Watched(
        net, optimizer, recipes=["bf16-true"], every_n_steps=lambda i: i == 0 or observes
    )
    if update is not None:
        watched.monitor.watch_average(averaged)
    for index in range(3):
        train(net, optimizer, 1, first=index)
        if update is not None:
            averaged.update_parameters(net)
    with host_copies() as copies:
        train(net, optimizer, 1, first=3)
    return len(copies)


@pytest.mark.parametrize("observes", [False, True])
def test_a_step_with_an_average_has_no_more_host_copies(observes: bool) -> None:
    assert count_copies(lambda _: None, observes) == count_copies(None, observes)
