"""Twins that add up gradients themselves, against real trainings with low-precision buffers.

The oracles are loops of plain torch in `accumulating`: a buffer in 16 bits for each layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from altgrad import Recipe, UpdateMonitor, WeightStorage
from tests.twins.accumulating import (
    LOW,
    RANDOM,
    LowSums,
    MakeOptimizer,
    accumulate,
    assert_same_weights,
    find_loss,
    make_adam,
    make_batches,
    read_weights,
    watch,
)
from tests.twins.twinning import assert_equal, make_net, one_thread

on_one_thread = one_thread()


def follow(
    count: int = 8,
    *,
    recipe: Recipe = LOW,
    dtype: torch.dtype = torch.bfloat16,
    make: MakeOptimizer = make_adam,
    steps: int = 5,
    set_to_none: bool = True,
    change: Callable[[nn.Module], object] | None = None,
    net: nn.Module | None = None,
) -> None:
    """Train with a twin, and assert that a real training with low-precision sums equals it."""
    net = make_net() if net is None else net
    real, optimizer = LowSums(net, make, dtype), make([*net.parameters()])
    watched = watch(net, optimizer, recipes=recipe)
    for index in range(steps):
        real.step(net, index, count, change)
        optimizer.zero_grad(set_to_none)
        accumulate(net, index, count)
        if change is not None:
            change(net)
        optimizer.step()
    assert_equal(watched)
    assert_same_weights(watched.monitor.state_dict(), recipe, real.net)


# --- predicted and real


@pytest.mark.parametrize("count", [1, 2, 8, 40])
def test_a_twin_equals_a_training_that_adds_up_in_bf16(count: int) -> None:
    follow(count)


@pytest.mark.slow
@pytest.mark.parametrize("count", [128, 512])
def test_a_twin_equals_a_training_that_adds_up_many_micro_batches(count: int) -> None:
    follow(count, steps=3)


@pytest.mark.parametrize("set_to_none", [False, True])
@pytest.mark.parametrize(
    "make", [make_adam, lambda held: SGD(held, 0.1, momentum=0.9)], ids=["AdamW", "SGD"]
)
def test_zeroed_gradients_begin_anew(make: MakeOptimizer, set_to_none: bool) -> None:
    follow(make=make, set_to_none=set_to_none)


def test_a_twin_equals_a_training_that_adds_up_in_fp16() -> None:
    follow(recipe=Recipe("low", accumulate="fp16"), dtype=torch.float16)


def test_a_sum_that_rounds_at_random_is_right_on_average() -> None:
    """512 equal micro-gradients: rounding to nearest stops at 256 of them."""
    net = nn.Linear(64, 64, bias=False)
    nn.init.zeros_(net.weight)
    optimizer = SGD(net.parameters(), 1.0)
    watched = watch(net, optimizer, recipes=[LOW, RANDOM])
    for _ in range(512):
        net.weight.sum().backward()
    optimizer.step()
    ((_, _, nearest),) = read_weights(watched.monitor.state_dict(), "low")
    ((_, _, random),) = read_weights(watched.monitor.state_dict(), "random")
    assert {*nearest.tolist()} == {-256.0}
    assert random.mean().item() == pytest.approx(-512, abs=2)
    assert len({*random.tolist()}) > 10


def test_layers_that_miss_some_backward_passes_keep_their_sums() -> None:
    net = make_net()
    make = make_adam
    real, optimizer = LowSums(net, make, torch.bfloat16), make([*net.parameters()])
    watched = watch(net, optimizer)
    for index in range(4):
        sums = [torch.zeros_like(each, dtype=torch.bfloat16) for each in net.parameters()]
        optimizer.zero_grad()
        for number, inputs in enumerate(make_batches(index, 6)):
            outputs = net[:3](inputs) if number % 3 else net(inputs)
            outputs.square().mean().backward(retain_graph=True)
            micro = torch.autograd.grad(
                outputs.square().mean(), [*net.parameters()], allow_unused=True
            )
            for total, each in zip(sums, micro, strict=True):
                if each is not None:
                    total.add_(each)
        for own, total in zip(real.net.parameters(), sums, strict=True):
            own.grad = total.float()
        real.optimizer.step()
        optimizer.step()
    assert_equal(watched)
    assert_same_weights(watched.monitor.state_dict(), LOW, real.net)


def test_each_of_two_optimizers_has_sums_of_its_own() -> None:
    net = make_net()
    first, last = [*net[0].parameters(), *net[2].parameters()], [*net[3].parameters()]
    optimizers = make_adam(first), SGD(last, 0.1)
    low = LowSums(net, lambda held: make_adam(held[:4]), torch.bfloat16)
    other = SGD([*low.net[3].parameters()], 0.1)
    watched = watch(net, *optimizers)
    for index in range(6):
        low.step(net, index, 5)
        net.zero_grad()
        accumulate(net, index, 5)
        other.step()
        for each in optimizers:
            each.step()
    assert_equal(watched)
    assert_same_weights(watched.monitor.state_dict(), LOW, low.net)


def test_in_a_run_in_bf16_a_recipe_adds_up_in_fp32() -> None:
    fine = Recipe("fine", accumulate="fp32")
    net = make_net(torch.bfloat16)
    real = copy.deepcopy(net).float()
    stepped, optimizer = make_adam([*real.parameters()]), make_adam([*net.parameters()])
    watched = watch(net, optimizer, recipes=fine, formats="e4m3fn")
    for index in range(4):
        sums = [torch.zeros_like(each, dtype=torch.float32) for each in net.parameters()]
        for inputs in make_batches(index, 30):
            micro = torch.autograd.grad(find_loss(net, inputs, 30), [*net.parameters()])
            for total, each in zip(sums, micro, strict=True):
                total.add_(each)
        optimizer.zero_grad()
        accumulate(net, index, 30)
        for own, total in zip(real.parameters(), sums, strict=True):
            own.grad = total
        optimizer.step()
        stepped.step()
    assert watched.notices == []
    assert_same_weights(watched.monitor.state_dict(), fine, real)


def test_in_a_run_in_fp32_adding_up_in_fp32_changes_nothing() -> None:
    net = make_net()
    optimizer = make_adam([*net.parameters()])
    fine = Recipe("fine", accumulate=torch.float32)
    watched = watch(net, optimizer, recipes=[fine, "fp32"])
    for index in range(3):
        optimizer.zero_grad()
        accumulate(net, index, 8)
        optimizer.step()
    assert_same_weights(watched.monitor.state_dict(), fine, net)


def test_layers_have_sums_in_samples_of_single_elements_and_of_blocks() -> None:
    net = make_net()
    real, optimizer = LowSums(net, make_adam, torch.bfloat16), make_adam([*net.parameters()])
    blocks = Recipe("blocks", states={"exp_avg": "mxfp8"}, accumulate="fp16")
    watched = watch(net, optimizer, recipes=[blocks, LOW], twin_elements=256)
    for index in range(3):
        real.step(net, index, 8)
        optimizer.zero_grad()
        accumulate(net, index, 8)
        optimizer.step()
    assert_equal(watched)
    single, other = watched.monitor.state_dict()["twins"]["lanes"]
    if "low" not in single["twins"]:
        single, other = other, single
    assert_same_weights({"twins": {"lanes": [single]}}, LOW, real.net)
    assert other["twins"].keys() == {"blocks"}


def test_layers_that_a_storage_rounds_have_sums() -> None:
    net = make_net()
    optimizer = make_adam([*net.parameters()])
    with WeightStorage("bf16").attach(optimizer):
        watched = watch(net, optimizer, recipes=[LOW, "fp32"], every_n_steps=1)
        for index in range(3):
            optimizer.zero_grad()
            accumulate(net, index, 100)
            optimizer.step()
    figures = watched.monitor.latest.layers["0.weight"]
    assert 0.99 < figures["progress_kept/low"] < 1.01
    assert figures["progress_kept/low"] != figures["progress_kept/fp32"] == 1


def test_a_rate_that_is_set_after_attach_is_that_of_the_first_step() -> None:
    def make(held: list[nn.Parameter], group: dict[str, Any]) -> SGD:
        return SGD(held, group["lr"] * 10)

    net = nn.Linear(64, 64, bias=False)
    start, optimizer = net.weight.detach().clone(), SGD(net.parameters(), 1.0)
    recipe = Recipe("tenfold", optimizer=make, accumulate="bf16")
    watched = watch(net, optimizer, recipes=recipe)
    optimizer.param_groups[0]["lr"] = 0.25
    net.weight.grad = torch.ones(64, 64)
    optimizer.step()
    ((_, _, weights),) = read_weights(watched.monitor.state_dict(), "tenfold")
    assert torch.equal(weights.view(64, 64), start - 2.5)


# --- what happens between the backward passes and the step


def test_clipping_by_norm_clips_the_sum_of_the_twin_by_the_same_factor() -> None:
    net = make_net()
    real, optimizer = LowSums(net, make_adam, torch.bfloat16), make_adam([*net.parameters()])
    watched = watch(net, optimizer)
    for index in range(5):
        optimizer.zero_grad()
        real_step = real.step
        parameters = [*net.parameters()]
        accumulate(net, index, 8)
        norm = nn.utils.clip_grad_norm_(parameters, 0.05)
        factor = (0.05 / (norm + 1e-6)).clamp(max=1.0)
        assert factor < 1

        def clip(low: nn.Module, factor: Tensor = factor) -> None:
            for each in low.parameters():
                each.grad.mul_(factor)

        gradients = [each.grad for each in parameters]
        real_step(net, index, 8, clip)
        for each, gradient in zip(parameters, gradients, strict=True):
            each.grad = gradient
        optimizer.step()
    assert_equal(watched)
    parameters = dict(real.net.named_parameters())
    for name, indices, weights in read_weights(watched.monitor.state_dict(), "low"):
        expected = parameters[name].detach().flatten()[indices]
        torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scale_is_divided_out_of_the_sum_of_the_twin(fused: bool) -> None:
    def make(held: list[nn.Parameter]) -> AdamW:
        return AdamW(held, 1e-3, fused=fused)

    net = make_net()
    real, optimizer = LowSums(net, make, torch.bfloat16), make([*net.parameters()])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    watched = watch(net, optimizer)
    for index in range(6):
        if index != 3:
            real.step(net, index, 8)  # a power of two changes no rounding
        optimizer.zero_grad()
        accumulate(net, index, 8, scaler.scale(torch.ones(())).item())
        if index == 3:
            net[0].weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    assert_equal(watched)
    if fused:  # the flat tensors of the twin have other tails than the layers of the real run
        for name, indices, weights in read_weights(watched.monitor.state_dict(), "low"):
            expected = dict(real.net.named_parameters())[name].detach().flatten()[indices]
            torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-7)
    else:
        assert_same_weights(watched.monitor.state_dict(), LOW, real.net)


def double_gradients(net: nn.Module) -> None:
    for each in net.parameters():
        each.grad.mul_(2)


def test_gradients_that_the_user_doubles_are_doubled_in_the_twin() -> None:
    follow(change=double_gradients)


def test_hooks_of_the_user_are_seen_whenever_they_are_registered() -> None:
    net = make_net()
    real, optimizer = LowSums(net, make_adam, torch.bfloat16), make_adam([*net.parameters()])
    watched = watch(net, optimizer)
    net[0].weight.register_hook(lambda gradient: gradient.clamp(-1e-4, 1e-4))
    for index in range(3):
        real.step(net, index, 8)
        optimizer.zero_grad()
        accumulate(net, index, 8)
        optimizer.step()
    assert_equal(watched)
    assert_same_weights(watched.monitor.state_dict(), LOW, real.net)


def test_a_gradient_that_was_set_by_hand_is_rounded_once() -> None:
    net = nn.Linear(64, 64, bias=False)
    start, optimizer = net.weight.detach().clone(), SGD(net.parameters(), 1.0)
    watched = watch(net, optimizer)
    net.weight.grad = torch.randn(64, 64)
    optimizer.step()
    start -= net.weight.grad.bfloat16().float()
    ((_, _, weights),) = read_weights(watched.monitor.state_dict(), "low")
    assert torch.equal(weights.view(64, 64), start)
    optimizer.zero_grad()
    for _ in range(3):  # these are added up, and forgotten after the step
        (0.1 * net.weight).sum().backward()
    optimizer.step()
    buffer = torch.zeros(64, 64, dtype=torch.bfloat16)
    for _ in range(3):
        buffer.add_(torch.full((64, 64), 0.1))
    start -= buffer.float()
    net.weight.grad = torch.randn(64, 64)
    optimizer.step()
    start -= net.weight.grad.bfloat16().float()
    ((_, _, weights),) = read_weights(watched.monitor.state_dict(), "low")
    assert torch.equal(weights.view(64, 64), start)


def test_a_layer_that_is_unfrozen_or_moved_later_is_followed_from_the_next_step_on() -> None:
    net = make_net()
    net[0].requires_grad_(False)
    optimizer = SGD(net.parameters(), 0.1)
    watched = watch(net, optimizer, recipes=[LOW])

    def step(index: int) -> None:
        optimizer.zero_grad()
        accumulate(net, index, 40)
        optimizer.step()

    step(0)
    net[0].requires_grad_(True)
    net[0].weight.data = net[0].weight.data.double()  # torch makes another node for its gradient
    net[0].weight.data = net[0].weight.data.float()
    step(1)
    earlier = {n: w.clone() for n, _, w in read_weights(watched.monitor.state_dict(), "low")}
    buffers = [torch.zeros_like(each, dtype=torch.bfloat16) for each in net.parameters()]
    for inputs in make_batches(2, 40):
        micro = torch.autograd.grad(find_loss(net, inputs, 40), [*net.parameters()])
        for total, each in zip(buffers, micro, strict=True):
            total.add_(each)
    step(2)
    names = [name for name, _ in net.named_parameters()]
    for name, indices, weights in read_weights(watched.monitor.state_dict(), "low"):
        gradient = buffers[names.index(name)].float().flatten()[indices]
        assert torch.equal(weights, earlier[name].add_(gradient, alpha=-0.1)), name
    assert watched.notices == []


# --- resuming


def test_a_resumed_run_goes_on_exactly() -> None:
    def run(net: nn.Module, optimizer: Any, monitor: UpdateMonitor, first: int, last: int) -> None:
        with monitor.attach(optimizer):
            for index in range(first, last):
                optimizer.zero_grad()
                accumulate(net, index, 6)
                optimizer.step()

    def make_monitor(net: nn.Module) -> UpdateMonitor:
        return UpdateMonitor(net, recipes=[LOW, RANDOM], strict=True)

    net = make_net()
    optimizer, whole = make_adam([*net.parameters()]), make_monitor(net)
    run(net, optimizer, whole, 0, 3)
    saved, weights = copy.deepcopy(whole.state_dict()), copy.deepcopy(net.state_dict())
    adam = copy.deepcopy(optimizer.state_dict())
    run(net, optimizer, whole, 3, 6)

    net = make_net()
    net.load_state_dict(weights)
    optimizer, resumed = make_adam([*net.parameters()]), make_monitor(net)
    optimizer.load_state_dict(adam)
    resumed.load_state_dict(saved)
    run(net, optimizer, resumed, 3, 6)
    assert whole.latest is not None
    assert resumed.latest is not None
    for name, figures in whole.latest.layers.items():
        mine = {key: value for key, value in figures.items() if key.endswith(("/low", "/random"))}
        assert len(mine) > 6
        again = {key: resumed.latest.layers[name][key] for key in mine}
        assert again == pytest.approx(mine, rel=0, abs=0, nan_ok=True)
