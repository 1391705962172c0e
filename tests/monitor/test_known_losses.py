"""Notices of what is lost in any case: one of each kind, true, and with a remedy that helps."""

from __future__ import annotations

import ast
import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Optimizer, lr_scheduler

from altgrad import UpdateMonitor, WeightStorage
from altgrad.monitor.known_losses import KnownLosses


def make_net(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4)).to(dtype)


def step(net: nn.Module, optimizer: Optimizer) -> None:
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def read_notices(
    net: nn.Module, *optimizers: Optimizer, steps: int = 0, **options: Any
) -> list[str]:
    """Return the notices of a monitor that expect a loss."""
    said: list[str] = []
    options = {"recipes": (), "strict": True, **options}
    monitor = UpdateMonitor(net, formats=["e5m2"], warn=said.append, **options)
    with monitor.attach(*optimizers):
        for _ in range(steps):
            for optimizer in optimizers:
                step(net, optimizer)
    return [notice for notice in said if notice.startswith("expects ")]


def test_a_run_in_bf16_has_a_notice_of_each_kind_with_a_remedy() -> None:
    net = make_net()
    decay, average = read_notices(net, AdamW(net.parameters()), recipes=["bf16-sr"])
    assert decay.startswith(
        "expects weight decay to be lost in 0.weight, 1.weight, 1.bias: AdamW multiplies weights "
        "by 1 - 1e-05 (lr=0.001 and weight_decay=0.01, or less), which changes no number in bf16. "
        "Without rounding, weights without gradients would halve in 69,000 steps. "
    )
    assert decay.endswith(
        "round them stochastically or with Kahan summation; fused=True of AdamW helps only where "
        "updates are large. See decay_projection/now, and that of recipes=['bf16-sr', "
        "'bf16-kahan', 'bf16-true-fused']"
    )
    assert average == (
        "expects exp_avg_sq of 0.weight, 1.weight, 1.bias to stay large after gradients shrink: "
        "AdamW multiplies by betas[1]=0.999, which changes no number in bf16. Keep such states in "
        "float32, or round them stochastically, or take 0.9843 or less"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_run_in_float32_has_no_notice(dtype: torch.dtype) -> None:
    net = make_net(dtype)
    assert read_notices(net, AdamW(net.parameters()), steps=1) == []


def run_for_decay(
    make: Callable[[list[nn.Parameter]], Optimizer], *recipes: str, **options: Any
) -> tuple[str, list[str], dict[str, float]]:
    """Step a layer in bf16 as often as its twins need to be judged.

    Returns:
        The notice that decay is lost, the other notices, and each ``decay_projection``.
    """
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False).bfloat16()
    optimizer = make([layer.weight])
    said: list[str] = []
    monitor = UpdateMonitor(layer, formats=["e5m2"], recipes=recipes, warn=said.append, **options)
    with monitor.attach(optimizer):
        for _ in range(3):
            step(layer, optimizer)
    assert monitor.latest is not None
    figures = monitor.latest.layers["weight"].items()
    [decay] = [notice for notice in said if "weight decay" in notice]
    return (
        decay,
        [notice for notice in said if notice != decay],
        {key: number for key, number in figures if key.startswith("decay_projection/")},
    )


def read_recipes(notice: str) -> list[str]:
    """Return the recipes that a notice names, each with a figure that it names."""
    _, _, text = notice.partition("decay_projection/now, and that of recipes=")
    return ast.literal_eval(text) if text else []


SWITCHED = {"weight_decay": 0.1, "decoupled_weight_decay": True}
WITH_TWINS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "Adam": lambda layers: torch.optim.Adam(layers, **SWITCHED),
    "NAdam": lambda layers: torch.optim.NAdam(layers, **SWITCHED),
    "RAdam": lambda layers: torch.optim.RAdam(layers, **SWITCHED),
}
IS_SWITCHED = "decoupled_weight_decay" in inspect.signature(torch.optim.Adam).parameters


@pytest.mark.parametrize("kind", WITH_TWINS)
def test_the_recipes_and_figures_that_a_notice_names_exist(kind: str) -> None:
    if kind == "Adam" and not IS_SWITCHED:
        pytest.skip("this torch has no decoupled decay of Adam")
    recipes = read_recipes(run_for_decay(WITH_TWINS[kind], "bf16-sr")[0])
    assert recipes
    notice, others, figures = run_for_decay(WITH_TWINS[kind], *recipes)
    assert not [other for other in others if "ends the twin" in other]
    named = ["decay_projection/now", *(f"decay_projection/{recipe}" for recipe in recipes)]
    assert all(math.isfinite(figures[each]) for each in named)
    has_fused = "fused" in inspect.signature(getattr(torch.optim, kind)).parameters
    assert ("fused" in notice) is has_fused


@pytest.mark.parametrize("kind", ["Adafactor", "Muon"])
def test_optimizers_that_have_no_twins_have_no_figures_in_a_notice(kind: str) -> None:
    if not hasattr(torch.optim, kind):
        pytest.skip(f"this torch has no {kind}")
    make = getattr(torch.optim, kind)
    notice, _, figures = run_for_decay(lambda p: make(p, weight_decay=0.1), "bf16-sr")
    assert all(math.isnan(number) for number in figures.values())
    assert notice.endswith("or round them stochastically or with Kahan summation")


@pytest.mark.parametrize(
    ("recipes", "options"), [((), {}), (["bf16-sr"], {"twin_elements": 0})], ids=str
)
def test_a_run_without_twins_has_no_figures_in_a_notice(
    recipes: Sequence[str], options: dict[str, int]
) -> None:
    notice, _, figures = run_for_decay(AdamW, *recipes, **options)
    assert not [number for number in figures.values() if math.isfinite(number)]
    assert notice.endswith("fused=True of AdamW helps only where updates are large")


def test_a_notice_of_several_optimizers_names_what_each_has() -> None:
    net = make_net()
    radam = torch.optim.RAdam(net[0].parameters(), **SWITCHED)
    notices = read_notices(net, radam, AdamW(net[1].parameters()), recipes=["bf16-sr"])
    assert "lost in 0.weight, 1.weight, 1.bias: RAdam and AdamW multiplies" in notices[0]
    assert "fused=True of AdamW helps" in notices[0]
    assert read_recipes(notices[0]) == ["bf16-sr", "bf16-kahan", "bf16-true-fused"]


def test_groups_and_optimizers_share_a_notice() -> None:
    net = make_net()
    first, second = net
    groups = [{"params": first.parameters()}, {"params": [second.bias], "weight_decay": 0.0}]
    optimizers = [AdamW(groups), AdamW([second.weight], lr=1e-2, weight_decay=0.25)]
    decay, average = read_notices(net, *optimizers)
    assert "lost in 0.weight, 1.weight: AdamW multiplies weights by 1 - 0.0025 (lr=0.01" in decay
    assert "which changes no number, or only some, in bf16" in decay
    assert "exp_avg_sq of 0.weight, 1.bias, 1.weight to" in average


def test_a_beta_that_changes_only_some_numbers_is_told_so() -> None:
    net = make_net()
    [notice] = read_notices(net, AdamW(net.parameters(), betas=(0.9, 0.997), weight_decay=0))
    assert "betas[1]=0.997, which changes only some numbers in bf16" in notice


def test_float16_has_its_own_bounds() -> None:
    net = make_net(torch.float16)
    [decay] = read_notices(net, AdamW(net.parameters()), recipes=["fp16-sr"])
    assert "no number in fp16" in decay
    assert "recipes=['fp16-sr', 'fp16-kahan', 'fp16-true-fused']" in decay
    optimizer = AdamW(net.parameters(), weight_decay=0, betas=(0.9, 0.9999))
    [average] = read_notices(net, optimizer)
    assert average.endswith("or take 0.998 or less")


def test_states_that_a_storage_rounds_are_told() -> None:
    net = make_net(torch.float32)
    optimizer = AdamW(net.parameters())
    with WeightStorage("bf16", states={"exp_avg_sq": "e4m3fn"}).attach(optimizer, module=net):
        [notice] = read_notices(net, optimizer)
    assert "exp_avg_sq of 0.weight" in notice
    assert notice.endswith(
        "no number in e4m3fn. Keep such states in float32, or round them stochastically"
    )


def test_frozen_layers_are_not_named() -> None:
    net = make_net()
    net[1].requires_grad_(False)
    decay, average = read_notices(net, AdamW(net.parameters()))
    assert "lost in 0.weight: AdamW" in decay
    assert "exp_avg_sq of 0.weight to stay" in average


def test_layers_with_a_learning_rate_of_0_are_not_named() -> None:
    net = make_net()
    first, second = net
    groups = [{"params": first.parameters()}, {"params": second.parameters(), "lr": 0.0}]
    decay, average = read_notices(net, AdamW(groups))
    assert "lost in 0.weight: AdamW" in decay
    assert "exp_avg_sq of 0.weight to stay" in average
    assert read_notices(net, AdamW(net.parameters(), lr=torch.tensor(0.0))) == []


def test_layers_whose_learning_rate_a_schedule_raises_from_0_are_named() -> None:
    net = make_net()
    optimizer = AdamW(net.parameters())
    lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    assert optimizer.param_groups[0]["lr"] == 0
    assert len(read_notices(net, optimizer)) == 2


def test_empty_layers_are_not_named() -> None:
    net = make_net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of layers without elements
        net.append(nn.Linear(0, 4, bias=False).bfloat16())
    decay, average = read_notices(net, AdamW(net.parameters()))
    assert "2.weight" not in decay + average
    assert read_notices(net, AdamW([net[2].weight])) == []


class CountsInHalf(torch.optim.SGD):
    """An optimizer that counts steps in the dtype of the layer."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state.setdefault("step", torch.zeros((), dtype=parameter.dtype)).add_(1)
        super().step(closure)


@pytest.mark.parametrize(("dtype", "end"), [(torch.bfloat16, 256), (torch.float16, 2048)])
def test_a_counter_in_16_bits_is_told_after_the_first_step(dtype: torch.dtype, end: int) -> None:
    net = make_net(dtype)
    optimizer = CountsInHalf(net.parameters(), lr=0.1)
    assert read_notices(net, optimizer) == []
    [notice] = read_notices(net, optimizer, steps=3)
    assert f"counter of steps of 0.weight, 1.weight, 1.bias to stop at {end:,} in" in notice
    for _ in range(end):
        optimizer.step()
    assert {float(state["step"]) for state in optimizer.state.values()} == {end}


@pytest.mark.parametrize("rate", [None, "constant"])
def test_a_counter_has_a_notice_whatever_stands_for_the_learning_rate(rate: object) -> None:
    net = make_net()
    optimizer = CountsInHalf(net.parameters(), lr=0.1)
    step(net, optimizer)
    for group in optimizer.param_groups:
        group["lr"] = rate
    [notice] = read_notices(net, optimizer)
    assert "counter of steps of 0.weight, 1.weight, 1.bias" in notice
    optimizer.param_groups[0]["lr"] = 0.0
    assert read_notices(net, optimizer) == []


def test_a_counter_that_was_loaded_in_16_bits_is_told_at_once() -> None:
    net = make_net(torch.float32)
    optimizer = AdamW(net.parameters())
    step(net, optimizer)
    assert read_notices(net, optimizer, steps=1) == []
    saved = optimizer.state_dict()
    saved["state"][0]["step"] = saved["state"][0]["step"].bfloat16()
    optimizer.load_state_dict(saved)
    for steps in (0, 2):
        [notice] = read_notices(net, optimizer, steps=steps)
        assert "counter of steps of 0.weight to stop at 256 in bf16" in notice


def test_counters_are_looked_for_after_the_first_step_alone() -> None:
    net, asked = make_net(), []
    losses = KnownLosses(
        lambda optimizers: asked.append(optimizers) or {}, pytest.fail, lambda _: False
    )
    optimizer = AdamW(net.parameters())
    for _ in range(3):
        losses.check_stepped(optimizer)
    assert asked == [[optimizer]]


def shrink(dtype: torch.dtype, lr: float, *, store: WeightStorage | None = None, **flags: bool):
    """Return the share of itself to which weight decay shrinks a layer, exactly 0.61, and notices.

    Without a decay, the layer stays what it is on average over its elements.
    """
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False)
    start = nn.init.normal_(layer.weight, std=0.02).detach().clone().double()
    layer.to(dtype)
    optimizer = AdamW(layer.parameters(), lr=lr, weight_decay=1e-3 / lr, **flags)
    if store is not None:
        store.attach(optimizer)
    notices = [notice for notice in read_notices(layer, optimizer) if "weight decay" in notice]
    for _ in range(500):
        step(layer, optimizer)
    return float((layer.weight.detach().double() * start).sum() / start.square().sum()), notices


@pytest.mark.parametrize("flags", [{}, {"foreach": True}], ids=["loop", "foreach"])
def test_a_decay_that_is_told_to_be_lost_is_lost(flags: dict[str, bool]) -> None:
    kept, notices = shrink(torch.bfloat16, 1e-4, **flags)
    assert len(notices) == 1
    assert kept > 0.97


def store_at_random() -> WeightStorage:
    return WeightStorage("bf16", rounding="stochastic")


def store_with_errors() -> WeightStorage:
    return WeightStorage("bf16", compensation="kahan")


@pytest.mark.parametrize("remedy", [lambda: None, store_at_random, store_with_errors])
def test_the_remedies_keep_weight_decay(remedy: Callable[[], WeightStorage | None]) -> None:
    kept, notices = shrink(torch.float32, 1e-4, store=remedy())
    assert notices == []
    assert kept == pytest.approx(0.61, abs=0.02)


def test_a_fused_optimizer_keeps_decay_only_where_updates_are_large() -> None:
    large, _ = shrink(torch.bfloat16, 1e-3, fused=True)
    small, notices = shrink(torch.bfloat16, 1e-5, fused=True)
    assert large == pytest.approx(0.61, abs=0.05)
    assert small > 0.97
    assert notices == []


def decay_without_gradients(change: float, dtype: torch.dtype) -> tuple[float, list[str]]:
    """Return the share of weights that a step of decay changes, and the notices of lost decay."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False).to(dtype)
    optimizer = AdamW(layer.parameters(), lr=1e-4, weight_decay=change / 1e-4)
    notices = [notice for notice in read_notices(layer, optimizer) if "weight decay" in notice]
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    return float((layer.weight.detach() != before).double().mean()), notices


@pytest.mark.parametrize("change", [1e-12, 1e-8, 2.9e-8])
def test_a_decay_that_float32_loses_too_has_no_notice(change: float) -> None:
    assert decay_without_gradients(change, torch.bfloat16) == (0, [])
    assert decay_without_gradients(change, torch.float32)[0] == 0


@pytest.mark.parametrize(("steps", "count"), [(9.9e6, 1), (10.1e6, 0)])
def test_a_decay_that_halves_weights_in_ten_million_steps_is_the_slowest_with_a_notice(
    steps: float, count: int
) -> None:
    change = 1 - 0.5 ** (1 / steps)
    _, notices = decay_without_gradients(change, torch.bfloat16)
    assert len(notices) == count
    assert decay_without_gradients(change, torch.float32)[0] > 0.99  # float32 is a remedy


def test_layers_with_a_slower_decay_are_not_named() -> None:
    net = make_net()
    first, second = net
    slow = {"params": second.parameters(), "lr": 1e-6}
    [notice] = read_notices(net, AdamW([{"params": first.parameters()}, slow], betas=(0.9, 0.9)))
    assert notice.startswith("expects weight decay to be lost in 0.weight: AdamW")


def test_a_state_that_would_not_fall_in_float32_has_no_notice() -> None:
    net = make_net()
    assert read_notices(net, AdamW(net.parameters(), betas=(0.9, 1 - 1e-8), weight_decay=0)) == []


def fall(beta: float, **flags: bool) -> tuple[float, list[str]]:
    """Return by how much exp_avg_sq in bf16 is too large after gradients shrink, and notices."""
    ends, found = [], []
    for dtype in (torch.bfloat16, torch.float64):
        torch.manual_seed(0)
        layer = nn.Linear(16, 16, bias=False).to(dtype)
        optimizer = AdamW(layer.parameters(), betas=(0.9, beta), **flags)
        found += [notice for notice in read_notices(layer, optimizer) if "exp_avg_sq" in notice]
        for number in range(1_000):
            layer.weight.grad = torch.randn(16, 16).to(dtype) * (1 if number < 100 else 0.01)
            optimizer.step()
        ends.append(float(optimizer.state[layer.weight]["exp_avg_sq"].mean()))
    return ends[0] / ends[1], found


@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_a_second_moment_that_is_told_to_stay_large_does(flags: dict[str, bool]) -> None:
    ratio, notices = fall(0.999, **flags)
    assert len(notices) == 1
    assert ratio > 1.5
    ratio, notices = fall(0.9843, **flags)
    assert notices == []
    assert ratio == pytest.approx(1, abs=0.1)


def test_notices_are_warnings_of_the_monitor() -> None:
    net = make_net()
    monitor = UpdateMonitor(net, formats=["e5m2"], recipes=())
    with (
        pytest.warns(UserWarning, match="expects") as caught,
        monitor.attach(AdamW(net.parameters())),
    ):
        pass
    assert [str(each.message).split(" of ")[0].split(" in ")[0] for each in caught] == [
        "UpdateMonitor expects weight decay to be lost",
        "UpdateMonitor expects exp_avg_sq",
    ]
