"""The reference twin equals the run bit for bit, whichever optimizer of torch the run has."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RMSprop
from torch.optim.lr_scheduler import LambdaLR

from altgrad.recipes.recipe import Recipe
from altgrad.twins.self_check import Check
from tests.twins.twinning import Watched, copy_weights, make_net, one_thread, train

on_one_thread = one_thread()
pytestmark = pytest.mark.default_twins

OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGD": (SGD, {"lr": 0.01}),
    "Nesterov": (SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
    "dampening": (SGD, {"lr": 0.01, "momentum": 0.9, "dampening": 0.1, "maximize": True}),
    "Adam": (Adam, {"weight_decay": 0.01}),
    "AdamW": (AdamW, {}),
    "amsgrad": (AdamW, {"amsgrad": True}),
    "maximize": (AdamW, {"maximize": True}),
    "NAdam": (NAdam, {}),
    "RAdam": (torch.optim.RAdam, {}),
    "Adamax": (torch.optim.Adamax, {}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "RMSprop": (RMSprop, {}),
    "centered": (RMSprop, {"centered": True, "momentum": 0.5}),
    "Adadelta": (torch.optim.Adadelta, {}),
    "ASGD": (torch.optim.ASGD, {}),
    "Rprop": (torch.optim.Rprop, {}),
}
HAS_FUSED = {SGD, Adam, AdamW, torch.optim.Adagrad}
"""Classes with a fused implementation on the CPU."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

MATRIX = [
    (name, implementation, dtype)
    for name, (kind, _) in OPTIMIZERS.items()
    for implementation in ("single", "foreach", "fused")
    for dtype in DTYPES
    if implementation != "fused" or (kind in HAS_FUSED and (kind is not SGD or dtype.itemsize > 2))
]
"""All that torch has on a CPU, but for fused SGD in 16 bits, which moves only the tail."""
QUICK = MATRIX[:: len(DTYPES) + 1]  # in turn through all dtypes and implementations


def make_optimizer(name: str, implementation: str, parameters: Any) -> Optimizer:
    kind, options = OPTIMIZERS[name]
    chosen = {} if implementation == "single" else {implementation: True}
    return kind(parameters, **{"foreach": False, **options, **chosen})


def watch(net: nn.Module, optimizer: Optimizer, **settings: Any) -> Watched:
    """Watch a format that is coarser than the weights, as others give a notice."""
    is_bf16 = next(net.parameters()).dtype == torch.bfloat16
    return Watched(net, optimizer, **{"formats": ["e4m3fn" if is_bf16 else "bf16"], **settings})


def assert_equal(watched: Watched, net: nn.Module) -> None:
    twins = watched.monitor.twins
    assert twins.checks == {name: Check.EQUAL for name, _ in net.named_parameters()}
    assert twins.resynchronised == {}
    # Twins in 16 bits have a notice in a run with fused SGD, which moves nothing there.
    assert [each for each in watched.notices if "finds fused SGD" not in each] == []
    watched.monitor.detach()


def assert_equal_over_thirty_steps(name: str, implementation: str, dtype: torch.dtype) -> None:
    net = make_net(dtype)
    optimizer = make_optimizer(name, implementation, net.parameters())
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    watched, start = watch(net, optimizer), copy_weights(net)

    def clip_and_decay(index: int) -> None:
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        if index:
            schedule.step()

    train(net, optimizer, 30, before_step=clip_and_decay)
    assert not torch.equal(start[0], copy_weights(net)[0])
    assert_equal(watched, net)


@pytest.mark.parametrize(("name", "implementation", "dtype"), QUICK)
def test_a_part_of_the_optimizers_equals_the_run(name, implementation, dtype) -> None:
    assert_equal_over_thirty_steps(name, implementation, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "implementation", "dtype"), MATRIX)
def test_each_optimizer_equals_the_run(name, implementation, dtype) -> None:
    assert_equal_over_thirty_steps(name, implementation, dtype)


def test_the_part_has_each_optimizer_implementation_and_dtype() -> None:
    for column, whole in enumerate(zip(*MATRIX, strict=True)):
        assert {case[column] for case in QUICK} == {*whole}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_sgd_on_a_cpu_moves_only_the_tail_in_16_bits(dtype: torch.dtype) -> None:
    # https://github.com/pytorch/pytorch/issues/191763: once this fails, torch is repaired: remove
    # `fused_sgd`, its test and its notice in `lane`, and let the matrix have fused SGD in 16 bits.
    weight = nn.Parameter(torch.ones(130, dtype=dtype))
    weight.grad = torch.ones_like(weight)
    SGD([weight], lr=0.5, fused=True).step()
    assert weight.tolist() == [1.0] * 128 + [0.5] * 2


# --- in mid-run


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_monitor_attached_in_mid_run_takes_the_states(name: str) -> None:
    net = make_net()
    optimizer = make_optimizer(name, "foreach", net.parameters())
    train(net, optimizer, 4)
    watched = watch(net, optimizer)
    train(net, optimizer, 15, first=4)
    assert_equal(watched, net)


class Scaled(nn.Module):
    """A layer of one element, as the temperature of a loss is."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape, dtype=dtype))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.scale


@pytest.mark.parametrize("kind", [Adam, NAdam])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shapes", [[()], [(1,)], [(), (1,)], [(), (130, 3)]], ids=str)
def test_layers_of_one_element_equal_the_run(
    kind: type[Optimizer], dtype: torch.dtype, shapes: list[tuple[int, ...]]
) -> None:
    net = nn.Sequential(*(Scaled(shape, dtype) for shape in shapes))
    optimizer = kind(net.parameters(), lr=0.01)

    def step(count: int) -> None:
        for _ in range(count):
            for parameter in net.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()

    step(4)
    watched = watch(net, optimizer)
    step(15)
    assert_equal(watched, net)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_that_is_added_equals_the_run(dtype: torch.dtype) -> None:
    net = make_net(dtype)
    optimizer = AdamW(net[0].parameters(), 1e-3)
    watched = watch(net, optimizer)
    train(net, optimizer, 10)
    optimizer.add_param_group({"params": [*net[2:].parameters()], "lr": 0.1, "betas": (0.5, 0.9)})
    train(net, optimizer, 20, first=10)
    assert_equal(watched, net)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_layers_that_are_frozen_for_a_while_equal_the_run(dtype: torch.dtype) -> None:
    net = make_net(dtype)
    optimizer = AdamW(net.parameters(), 1e-3)

    def freeze(index: int) -> None:
        net[0].requires_grad_(not 8 <= index < 17)
        for parameter in net[0].parameters():
            if not parameter.requires_grad:
                parameter.grad = None

    watched = watch(net, optimizer)
    train(net, optimizer, 30, before_step=freeze)
    assert_equal(watched, net)


# --- hyperparameters


def _change_betas(optimizer: Optimizer, index: int) -> None:
    optimizer.param_groups[index % 2]["betas"] = (0.8, 0.99 - index / 1000)


def _fill_rate(optimizer: Optimizer, index: int) -> None:
    optimizer.param_groups[index % 2]["lr"].mul_(0.9)


def _replace_rate(optimizer: Optimizer, index: int) -> None:
    optimizer.param_groups[index % 2]["lr"] = torch.tensor(1e-3 / (1 + index))


@pytest.mark.parametrize("change", [_change_betas, _fill_rate, _replace_rate])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hyperparameters_that_change_in_each_group_equal_the_run(
    change: Callable[[Optimizer, int], None], dtype: torch.dtype
) -> None:
    net = make_net(dtype)
    groups = [{"params": net[0].parameters()}, {"params": net[2:].parameters()}]
    optimizer = AdamW(groups, lr=1e-3 if change is _change_betas else torch.tensor(1e-3))
    if change is not _change_betas:
        for group in optimizer.param_groups:  # each with a tensor of its own
            group["lr"] = group["lr"].clone()
    watched = watch(net, optimizer)
    train(net, optimizer, 20, before_step=lambda index: change(optimizer, index))
    assert_equal(watched, net)


# --- ways to step


@pytest.mark.parametrize("implementation", ["single", "foreach", "fused"])
@pytest.mark.parametrize("name", ["AdamW", "Nesterov"])
def test_steps_that_a_grad_scaler_skips_move_no_twin(name: str, implementation: str) -> None:
    net = make_net()
    optimizer = make_optimizer(name, implementation, net.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=5)
    watched = watch(net, optimizer)
    skipped = 0
    for index in range(30):
        inputs = torch.randn(32, 65, generator=torch.Generator().manual_seed(index))
        optimizer.zero_grad()
        loss = net(inputs).square().mean()
        scaler.scale(loss * float("inf") if index % 9 == 4 else loss).backward()
        before = copy_weights(net)
        scaler.step(optimizer)
        skipped += all(map(torch.equal, before, copy_weights(net)))
        scaler.update()
    assert skipped == 3
    assert_equal(watched, net)


def test_closures_equal_the_run() -> None:
    net = make_net()
    optimizer = AdamW(net.parameters(), 1e-3)
    watched = watch(net, optimizer)
    for index in range(20):
        inputs = torch.randn(32, 65, generator=torch.Generator().manual_seed(index))

        def compute(inputs: Tensor = inputs) -> float:
            optimizer.zero_grad()
            loss = net(inputs).square().mean()
            loss.backward()
            return loss.item()

        optimizer.step(compute)
    assert_equal(watched, net)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_accumulated_over_batches_equal_the_run(dtype: torch.dtype) -> None:
    net = make_net(dtype)
    optimizer = AdamW(net.parameters(), 1e-3)
    watched = watch(net, optimizer)
    for _ in range(12):
        optimizer.zero_grad()
        for _ in range(3):
            net(torch.randn(8, 65, dtype=dtype)).float().square().mean().backward()
        optimizer.step()
    assert_equal(watched, net)


def test_two_optimizers_in_turn_equal_the_run() -> None:
    net = make_net()
    both = AdamW(net[0].parameters(), 1e-3), SGD(net[2:].parameters(), 0.01, momentum=0.9)
    watched = Watched(net, *both)
    for index in range(30):
        net.zero_grad()
        net(torch.randn(8, 65)).square().mean().backward()
        both[index % 3 == 0].step()
    assert_equal(watched, net)


# --- the training is left as it is


class Drawing(SGD):
    """An optimizer that draws from each global generator, as stochastic rounding does."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr)
        torch.manual_seed(0)
        random.seed(0)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        noise = torch.rand(()).item() + random.random() + np.random.rand()  # noqa: NPY002
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(noise)
        super().step(closure)


def draw_everywhere() -> tuple[float, float, float]:
    return torch.rand(()).item(), random.random(), np.random.rand()  # noqa: NPY002


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twins_that_draw_leave_the_streams_of_the_training(dtype: torch.dtype) -> None:
    recipe = Recipe("drawing", optimizer=lambda held, group: Drawing(held, group["lr"]))
    results = []
    for recipes in ((), ["e4m3fn-sr", recipe]):
        net = make_net(dtype)
        optimizer = AdamW(net.parameters(), 1e-3)
        watched = watch(net, optimizer, recipes=recipes)
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002
        drawn: list[tuple[float, float, float]] = []
        train(net, optimizer, 15, before_step=lambda _, into=drawn: into.append(draw_everywhere()))
        results.append((drawn, copy_weights(net)))
        assert watched.notices == []
    run = ("now",) if dtype is torch.bfloat16 else ()
    assert watched.records[-1].model.recipes == (*run, "e4m3fn-sr", "drawing")
    (drawn, weights), (also_drawn, also_weights) = results
    assert drawn == also_drawn
    assert all(map(torch.equal, weights, also_weights))


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="from torch 2.9 on")
@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_gradients_in_float32_of_weights_in_bfloat16_equal_the_run(name: str) -> None:
    net = make_net(torch.bfloat16)
    for each in net.parameters():
        each.grad_dtype = torch.float32
    optimizer = getattr(torch.optim, name)(net.parameters(), lr=1e-2, foreach=False)
    watched = Watched(net, optimizer, formats=["e4m3fn"])
    for index in range(10):
        random = torch.Generator().manual_seed(index)
        for each in net.parameters():
            each.grad = torch.randn(each.shape, generator=random)
        optimizer.step()
    assert_equal(watched, net)
