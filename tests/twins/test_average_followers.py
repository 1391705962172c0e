"""`Follower`: twins update averages of their weights as the run updates its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from altgrad import Recipe
from tests.twins.averaging import (
    KINDS,
    count_differences,
    iterate_sampled,
    list_notices,
    make_hand_written,
    train_averaged,
    update_by_hand,
)
from tests.twins.twinning import Watched, make_net, one_thread, train

on_one_thread = one_thread()

RECIPES = ["bf16-true", Recipe("low", states={"average": "bf16"})]


def watch(
    net: nn.Module, averaged: nn.Module, **settings: Any
) -> tuple[Watched, torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    watched = Watched(net, optimizer, recipes=RECIPES, formats=["e4m3fn"])
    watched.monitor.watch_average(averaged, **settings)
    return watched, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_average_of_the_reference_twin_is_that_of_the_run_bit_for_bit(
    kind: str, dtype: torch.dtype
) -> None:
    net = make_net(dtype)
    averaged = KINDS[kind](net)
    watched, optimizer = watch(net, averaged)
    train_averaged(net, optimizer, 10, lambda _: averaged.update_parameters(net))
    assert count_differences(watched.monitor, averaged) == 0
    assert list_notices(watched) == []


@pytest.mark.parametrize("updates", [lambda i: int(i % 3 == 2), lambda i: 2, lambda i: int(i > 4)])
def test_twins_update_as_often_as_the_run(updates: Any) -> None:
    net = make_net()
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    watched, optimizer = watch(net, averaged)

    def update(index: int) -> None:
        for _ in range(updates(index)):
            averaged.update_parameters(net)

    train_averaged(net, optimizer, 9, update)
    assert count_differences(watched.monitor, averaged) == 0
    low = [own for _, _, own in iterate_sampled(watched.monitor, "low")]
    assert all(torch.equal(each, each.bfloat16().float()) for each in low)
    assert {each.dtype for _, _, each in iterate_sampled(watched.monitor, "bf16-true")} == {
        torch.bfloat16
    }


def test_an_average_that_was_updated_before_is_taken_over_with_its_count() -> None:
    net = make_net()
    averaged = AveragedModel(net)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    train_averaged(net, optimizer, 5, lambda _: averaged.update_parameters(net))
    watched, optimizer = watch(net, averaged)
    train_averaged(net, optimizer, 5, lambda _: averaged.update_parameters(net))
    assert count_differences(watched.monitor, averaged) == 0


def test_an_average_that_something_else_writes_to_is_taken_over_by_all_twins() -> None:
    net = make_net()
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    watched, optimizer = watch(net, averaged)

    def update(index: int) -> None:
        if index == 4:
            with torch.no_grad():
                averaged.module[0].weight.mul_(3.0)
        elif index < 4:
            averaged.update_parameters(net)

    train_averaged(net, optimizer, 6, update)
    assert count_differences(watched.monitor, averaged) == 0
    for layer, indices, own in iterate_sampled(watched.monitor, "low"):
        if layer == "0.weight":
            real = torch.take(averaged.module[0].weight.detach(), indices)
            torch.testing.assert_close(own, real, rtol=2**-8, atol=0)
    assert list_notices(watched) == []


def test_an_average_that_is_swapped_in_for_an_evaluation_goes_on_as_before() -> None:
    figures = []
    for swaps in (False, True):
        net = make_net()
        averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        watched, optimizer = watch(net, averaged)

        def update(index: int, net: Any = net, averaged: Any = averaged, s: bool = swaps) -> None:
            averaged.update_parameters(net)
            for _ in range(2 if s and index % 4 == 3 else 0):
                own, other = copy.deepcopy((net.state_dict(), averaged.module.state_dict()))
                net.load_state_dict(other)
                averaged.module.load_state_dict(own)

        train_averaged(net, optimizer, 15, update)
        assert count_differences(watched.monitor, averaged) == 0
        layers = watched.records[-1].layers
        figures.append({f"{n} {k}": layers[n][k] for n in layers for k in layers[n].twin_keys})
    assert figures[0] == pytest.approx(figures[1], rel=0, abs=0, nan_ok=True)


def test_weights_that_are_clipped_after_a_step_are_clipped_in_the_averages_of_twins() -> None:
    net = make_net()
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    watched, optimizer = watch(net, averaged)

    def update(_: int) -> None:
        with torch.no_grad():
            net[0].weight.clamp_(-0.05, 0.05)
        averaged.update_parameters(net)

    train_averaged(net, optimizer, 10, update)
    train(net, optimizer, 1, first=10)  # a clip is seen before the next step
    assert count_differences(watched.monitor, averaged) == 0


def test_a_layer_that_is_unfrozen_leaves_the_averages_of_others_as_they_are() -> None:
    net = make_net()
    net[3].requires_grad_(requires_grad=False)
    averaged = AveragedModel(net, avg_fn=get_ema_avg_fn(0.9))
    watched, optimizer = watch(net, averaged)
    train_averaged(net, optimizer, 5, lambda _: averaged.update_parameters(net))
    before = {layer: own for layer, _, own in iterate_sampled(watched.monitor, "bf16-true")}
    net[3].requires_grad_(requires_grad=True)
    train(net, optimizer, 1, first=5)
    after = {layer: own for layer, _, own in iterate_sampled(watched.monitor, "bf16-true")}
    assert before.keys() < after.keys()
    assert all(torch.equal(each, after[layer]) for layer, each in before.items())
    assert count_differences(watched.monitor, averaged) == 0


@pytest.mark.parametrize("by_hand", [False, True])
def test_an_update_is_not_lost_when_a_layer_is_unfrozen_right_after_it(by_hand: bool) -> None:
    ends = []
    for unfreezes in (False, True):
        net = make_net()
        net[3].bias.requires_grad_(requires_grad=False)
        averaged: Any = (
            make_hand_written(net) if by_hand else AveragedModel(net, avg_fn=get_ema_avg_fn(0.5))
        )
        watched, optimizer = watch(net, averaged)

        def update(
            index: int, net: Any = net, averaged: Any = averaged, unfreezes: bool = unfreezes
        ) -> None:
            if by_hand:
                update_by_hand(averaged, net, 0.5)
            else:
                averaged.update_parameters(net)
            if index == 4 and unfreezes:
                net[3].bias.requires_grad_(requires_grad=True)

        train_averaged(net, optimizer, 6, update)
        assert count_differences(watched.monitor, averaged) == 0
        sampled = iterate_sampled(watched.monitor, "bf16-true")
        ends.append({layer: own for layer, _, own in sampled})
    assert ends[1].keys() - ends[0].keys() == {"3.bias"}
    assert all(torch.equal(each, ends[1][layer]) for layer, each in ends[0].items())


# --- averages that the user's loop updates


@pytest.mark.parametrize(("decay", "through_data"), [(0.9, False), (0.99, True), (0.999, False)])
def test_the_decay_is_found_from_two_states_in_float32(decay: float, through_data: bool) -> None:
    """The oracle is a twin of a run that states its decay, in the function of its average."""
    net = make_net()
    averaged = make_hand_written(net)
    watched, optimizer = watch(net, averaged)

    def update(_: int) -> None:
        if not through_data:
            update_by_hand(averaged, net, decay)
            return
        for average, weights in zip(averaged.parameters(), net.parameters(), strict=True):
            average.data = average.data * decay + weights.data * (1 - decay)

    train_averaged(net, optimizer, 20, update)
    assert count_differences(watched.monitor, averaged) == 0
    assert list_notices(watched) == []
    same = make_net()
    function = AveragedModel(same, multi_avg_fn=get_ema_multi_avg_fn(decay))
    function.update_parameters(same)  # the first update copies the weights
    other, another = watch(same, function)
    train_averaged(same, another, 20, lambda _: function.update_parameters(same))
    both = (iterate_sampled(each.monitor, "bf16-true") for each in (watched, other))
    for (_, _, found), (_, _, expected) in zip(*both, strict=True):
        apart = (found.double() - expected.double()).norm() / expected.double().norm()
        assert apart < 2**-8


def test_a_decay_that_rises_is_followed() -> None:
    net = make_net()
    averaged = make_hand_written(net)
    watched, optimizer = watch(net, averaged)
    train_averaged(
        net, optimizer, 15, lambda i: update_by_hand(averaged, net, min(0.99, (1 + i) / (10 + i)))
    )
    assert count_differences(watched.monitor, averaged) == 0
    figures = watched.records[-1].layers["0.weight"]
    assert figures["average_ratio/bf16-true"] == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("rises", [False, True])
def test_an_addend_that_is_rounded_to_the_dtype_of_the_weights_is_explained(rises: bool) -> None:
    """In the loop of timm, 1 − decay times weights in bf16 is in bf16, too."""
    errors = []
    for rounds in (True, False):
        net = make_net(torch.bfloat16)
        averaged = make_hand_written(net).float()
        watched, optimizer = watch(net, averaged)

        def update(
            index: int, net: Any = net, averaged: Any = averaged, rounds: bool = rounds
        ) -> None:
            decay = min(0.99, (2 + index) / (11 + index)) if rises else 0.9
            with torch.no_grad():
                for average, weights in zip(averaged.parameters(), net.parameters(), strict=True):
                    own = weights if rounds else weights.float()
                    average.copy_(average * decay + (1 - decay) * own)

        train_averaged(net, optimizer, 15, update)
        assert count_differences(watched.monitor, averaged) == 0
        assert list_notices(watched) == []
        figures = watched.records[-1].layers["0.weight"]
        errors.append(figures["average_error/bf16-true"])
    assert errors[0] == pytest.approx(errors[1], rel=0.02)
    assert errors[0] > 0.001


def test_an_average_that_is_loaded_in_a_loop_is_taken_over() -> None:
    net = make_net()
    averaged = make_hand_written(net)
    watched, optimizer = watch(net, averaged)
    other = make_net(width=130)
    with torch.no_grad():
        for each in other.parameters():
            each.add_(torch.randn(each.shape))

    def update(index: int) -> None:
        if index == 6:
            averaged.load_state_dict(other.state_dict())
        else:
            update_by_hand(averaged, net, 0.9)

    train_averaged(net, optimizer, 7, update)
    train(net, optimizer, 1, first=7)
    for layer, indices, own in iterate_sampled(watched.monitor, "low"):
        real = torch.take(dict(other.named_parameters())[layer].detach(), indices)
        torch.testing.assert_close(own, real, rtol=2**-8, atol=0)
    assert list_notices(watched) == []


def test_a_bf16_average_moves_by_the_decay_that_the_user_states() -> None:
    net = make_net(torch.bfloat16)
    averaged = make_hand_written(net)
    watched, optimizer = watch(net, averaged, decay=0.9)
    train_averaged(net, optimizer, 15, lambda _: update_by_hand(averaged, net, 0.9))
    assert count_differences(watched.monitor, averaged) == 0
    assert list_notices(watched) == []
    figures = watched.records[-1].layers["0.weight"]
    assert 0 < figures["average_error/bf16-true"] < 0.05


@pytest.mark.parametrize(
    ("real", "stated", "every"),
    [(0.9, 0.9, 1), (0.99, 0.99, 3), (0.9, 0.99, 3), (0.99, 0.9, 1)],
)
def test_a_decay_that_is_not_that_of_a_bf16_average_is_noticed(
    real: float, stated: float, every: int
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 80), nn.Linear(80, 8)).bfloat16()
    averaged = make_hand_written(net)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    watched = Watched(net, optimizer, recipes=RECIPES, formats=["e4m3fn"], every_n_steps=every)
    watched.monitor.watch_average(averaged, decay=stated)
    for _ in range(30):
        optimizer.zero_grad()
        net(torch.randn(16, 8).bfloat16()).float().square().mean().backward()
        optimizer.step()
        update_by_hand(averaged, net, real)
    notices = list_notices(watched)
    assert len(notices) == (real != stated)
    assert all("ends the figures of the average 'average'" in each for each in notices)
