"""`StatisticFollower`: running statistics of twins, and of BatchNorm modules really in bf16."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from altgrad import Recipe, UpdateMonitor
from altgrad.twins.batch_norm import BatchStatistic
from tests.counting import Operations, host_copies
from tests.twins.averaging import iterate_sampled
from tests.twins.twinning import one_thread

on_one_thread = one_thread()

NAMES = ("running_mean", "running_var")
RECIPES = [
    *("bf16", "bf16-true"),
    Recipe("low", states={"running_var": "bf16"}, rounding="stochastic"),
]


def make_net(momentum: float = 0.1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64, momentum=momentum), nn.ReLU()),
        *(nn.Conv2d(64, 10, 3), nn.BatchNorm2d(10, momentum=momentum)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(10, momentum=momentum)),
    )


def train(net: nn.Module, optimizer: SGD, steps: int, first: int = 0, batches: int = 1) -> None:
    for index in range(first, first + steps):
        optimizer.zero_grad()
        for part in range(batches):
            random = torch.Generator().manual_seed(index * batches + part)
            inputs = torch.randn(16, 3, 8, 8, generator=random)
            (net(inputs * (1 + index / 20) + 0.3) - 1).square().mean().backward()
        optimizer.step()


class Real:
    """Copies of the BatchNorm modules of a net in bf16, which get the inputs of these."""

    def __init__(self, net: nn.Module) -> None:
        self.modules: dict[str, nn.Module] = {}
        for name, each in net.named_modules():
            if isinstance(each, (nn.BatchNorm1d, nn.BatchNorm2d)):
                self.modules[f"{name}.weight"] = copy.deepcopy(each).bfloat16()
                each.register_forward_pre_hook(self.make_hook(self.modules[f"{name}.weight"]))

    @staticmethod
    def make_hook(low: nn.Module) -> Any:
        def feed(module: nn.Module, inputs: tuple[Tensor]) -> None:
            if module.training:
                low(inputs[0].detach().bfloat16())

        return feed


def watch(net: nn.Module, optimizer: SGD, records: list[Any], **settings: Any) -> UpdateMonitor:
    defaults = {"recipes": RECIPES, "formats": "e4m3fn", "every_n_steps": 5, "strict": True}
    return UpdateMonitor(net, records.append, **defaults | settings).attach(optimizer)


def list_figures(record: Any) -> dict[str, float]:
    layers = record.layers
    return {f"{n} {k}": layers[n][k] for n in layers for k in layers[n].twin_keys}


@pytest.mark.parametrize("momentum", [0.1, 0.01])
def test_ratio_and_error_are_those_of_real_modules_in_bf16(momentum: float) -> None:
    net = make_net(momentum)
    real, optimizer, records = Real(net), SGD(net.parameters(), 1e-2), []
    with watch(net, optimizer, records):
        train(net, optimizer, 60)
    modules = {f"{name}.weight": each for name, each in net.named_modules()}
    for layer, low in real.modules.items():
        figures = records[-1].layers[layer]
        # The mean of the last inputs, which are normalised, is 0 but for rounding.
        for name in NAMES if layer != "7.weight" else NAMES[1:]:
            ours = getattr(low, name).double()
            theirs = getattr(modules[layer], name).double()
            error = ((ours - theirs).norm() / theirs.norm()).item()
            found = figures[f"{name}_error/bf16-true"]
            # The inputs of the real module are rounded, too, which few channels do not average out.
            near = 0.15 if len(ours) >= 64 else 0.4
            assert found == pytest.approx(error, rel=near), (layer, name)
            ratio = (ours / theirs).median().item()
            assert figures[f"{name}_ratio/bf16-true"] == pytest.approx(ratio, abs=0.01)
    errors = [records[-1].layers[layer]["running_var_error/bf16-true"] for layer in real.modules]
    assert min(errors) > (0.005 if momentum == 0.1 else 0.05)


def test_the_statistics_of_the_reference_twin_are_those_of_the_run() -> None:
    net = make_net()
    optimizer = SGD(net.parameters(), 1e-2)
    monitor = watch(net, optimizer, [])
    train(net, optimizer, 7)
    modules = {f"{name}.weight": each for name, each in net.named_modules()}
    for name in NAMES:
        sampled = list(iterate_sampled(monitor, "reference", name))
        known = [layer for layer, _, own in sampled if not own.isnan().any()]
        assert known == ["1.weight", "4.weight", "7.weight"]
        for layer, indices, own in sampled:
            if layer in known:
                assert torch.equal(own, getattr(modules[layer], name)[indices])


def test_recipes_that_store_no_statistic_low_have_no_figures_of_it() -> None:
    net = make_net()
    optimizer, records = SGD(net.parameters(), 1e-2), []
    with watch(net, optimizer, records, recipes=["bf16"]):
        train(net, optimizer, 5)
    assert not [key for key in list_figures(records[-1]) if "running" in key]


def test_figures_of_statistics_stand_at_the_layers_of_batch_norm_alone() -> None:
    net, records = make_net(), []
    optimizer = SGD(net.parameters(), 1e-2)
    with watch(net, optimizer, records):
        train(net, optimizer, 5)
    keys = [key for key in list_figures(records[-1]) if "running" in key]
    assert {key.split()[0] for key in keys} == {"1.weight", "4.weight", "7.weight"}
    assert "running_var_error/bf16-true" in records[-1].model
    with pytest.raises(KeyError, match="expected a state of"):
        records[-1].layers["0.weight"]["running_var_error/bf16-true"]


@pytest.mark.parametrize("recipes", [(), "bf16", "bf16-true"])
def test_a_module_without_a_count_of_batches_is_trained_as_ever(recipes: Any) -> None:
    net, records = make_net(), []
    net[1].num_batches_tracked = None
    optimizer = SGD(net.parameters(), 1e-2)
    with watch(net, optimizer, records, recipes=recipes):
        train(net, optimizer, 5)
    numbers = list_figures(records[-1]).items()
    names = {key.split()[0] for key, each in numbers if "running" in key and not math.isnan(each)}
    assert names == ({"4.weight", "7.weight"} if recipes == "bf16-true" else set())


def test_an_error_of_statistics_ends_them_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("no count")

    monkeypatch.setattr(BatchStatistic, "note_batches", fail)
    net, records, notices = make_net(), [], []
    optimizer = SGD(net.parameters(), 1e-2)
    with watch(net, optimizer, records, strict=False, warn=notices.append):
        train(net, optimizer, 5)
    assert [each for each in notices if "has no figures of running_mean: " in each]
    figures = list_figures(records[-1])
    assert not [key for key in figures if "running" in key]
    assert "0.weight progress_kept/bf16-true" in figures


@pytest.mark.parametrize("act", ["evaluate", "reset", "load"])
def test_what_else_happens_to_a_module_is_followed(act: str) -> None:
    net = make_net()
    real, optimizer, records = Real(net), SGD(net.parameters(), 1e-2), []
    monitor = watch(net, optimizer, records)
    train(net, optimizer, 12)
    if act == "evaluate":
        net.eval()
        net(torch.randn(16, 3, 8, 8))
        net.train()
    for each in (net[1], real.modules["1.weight"]):
        if act == "reset":
            each.reset_running_stats()
        elif act == "load":
            each.running_var.fill_(4.0)
            each.running_mean.fill_(2.0)
    train(net, optimizer, 3, first=12)
    monitor.detach()
    for name in NAMES:
        ours = getattr(real.modules["1.weight"], name).double()
        theirs = getattr(net[1], name).double()
        found = records[-1].layers["1.weight"][f"{name}_ratio/bf16-true"]
        assert found == pytest.approx((ours / theirs).median().item(), abs=0.01)


@pytest.mark.parametrize("name", ["momentum", "num_batches_tracked"])
def test_a_module_that_loses_its_momentum_or_count_leaves_those_of_others(name: str) -> None:
    net = make_net()
    real, optimizer, records = Real(net), SGD(net.parameters(), 1e-2), []
    with watch(net, optimizer, records, every_n_steps=1):
        train(net, optimizer, 6)
        for each in (net[1], real.modules["1.weight"]):
            setattr(each, name, None)
        train(net, optimizer, 9, first=6)
    ours = real.modules["4.weight"].running_var.double()
    found = records[-1].layers
    ratio = (ours / net[4].running_var.double()).median().item()
    assert found["4.weight"]["running_var_ratio/bf16-true"] == pytest.approx(ratio, abs=0.01)
    assert found["1.weight"].get("running_var_error/bf16-true", 0) < 0.01


def test_several_batches_between_two_steps_are_as_many_updates() -> None:
    net = make_net(0.01)
    real, optimizer, records = Real(net), SGD(net.parameters(), 1e-2), []
    with watch(net, optimizer, records):
        train(net, optimizer, 30, batches=4)
    low, high = (each.running_var.double() for each in (real.modules["1.weight"], net[1]))
    error = ((low - high).norm() / high.norm()).item()
    assert error > 0.05
    found = records[-1].layers["1.weight"]["running_var_error/bf16-true"]
    assert found == pytest.approx(error, rel=0.1)


def count_operations_after(batches: int) -> int:
    """Count the operations of a step that follows batches of which none is trained on."""
    net = make_net(0.01)
    optimizer = SGD(net.parameters(), 1e-2)
    with watch(net, optimizer, [], recipes=["bf16-true"], every_n_steps=lambda i: i == 0):
        train(net, optimizer, 3)
        for index in range(batches):
            net(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(index)))
        with Operations() as counted:
            optimizer.step()
    return counted.counts.total() + counted.on_host.total()


def test_a_step_after_many_batches_costs_no_more_than_one_after_a_few() -> None:
    most = count_operations_after(65)
    assert count_operations_after(8) < most
    assert count_operations_after(200) == most


def test_many_batches_between_two_steps_move_twins_as_far_as_the_run() -> None:
    net, records = make_net(0.01), []
    real, optimizer = Real(net), SGD(net.parameters(), 1e-2)
    with watch(net, optimizer, records, every_n_steps=1):
        train(net, optimizer, 2)
        for index in range(300):
            net(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(index)) * 3)
        train(net, optimizer, 1, first=2)
    low, high = (each.running_var.double() for each in (real.modules["1.weight"], net[1]))
    found = records[-1].layers["1.weight"]
    # Copies in bf16 lose a part in each of the 300 batches, and twins in the last 64 alone.
    assert (low / high).median() - 0.02 < found["running_var_ratio/bf16-true"] < 1
    assert found["running_var_ratio/low"] == pytest.approx(1, abs=0.02)


def copy_buffers(net: nn.Module, _: tuple[Tensor]) -> None:
    for each in net.buffers():
        each.copy_(each.clone())


def test_buffers_that_are_copied_before_each_batch_count_as_no_batches() -> None:
    """DistributedDataParallel copies the buffers of the first rank to all, which torch counts."""
    figures = []
    for copies in (False, True):
        net, records = make_net(0.01), []
        optimizer = SGD(net.parameters(), 1e-2)
        if copies:
            net.register_forward_pre_hook(copy_buffers)
        with watch(net, optimizer, records, recipes=["bf16-true"]):
            train(net, optimizer, 15)
        figures.append(list_figures(records[-1]))
    assert figures[0] == pytest.approx(figures[1], rel=0, abs=0, nan_ok=True)


def test_a_resumed_run_has_the_figures_of_one_that_was_not_interrupted() -> None:
    ends = []
    for stops in (False, True):
        net, records = make_net(0.01), []
        optimizer = SGD(net.parameters(), 1e-2, momentum=0.9)
        monitor = watch(net, optimizer, records)
        train(net, optimizer, 8)
        if stops:
            states = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
            state = copy.deepcopy(monitor.state_dict())
            monitor.detach()
            net = make_net(0.01)
            net.load_state_dict(states[0])
            optimizer = SGD(net.parameters(), 1e-2, momentum=0.9)
            optimizer.load_state_dict(states[1])
            monitor = UpdateMonitor(
                net,
                records.append,
                recipes=RECIPES,
                formats="e4m3fn",
                every_n_steps=lambda index: index in (1, 6),
                strict=True,
            )
            monitor.load_state_dict(state)
            monitor.attach(optimizer)
        train(net, optimizer, 7, first=8)
        ends.append(list_figures(records[-1]))
    assert ends[0] == pytest.approx(ends[1], rel=0, abs=0, nan_ok=True)
    assert ends[0]["1.weight running_var_error/bf16-true"] > 0


@pytest.mark.parametrize("observes", [False, True])
def test_batch_norm_adds_no_host_copy_and_leaves_the_training_as_it_is(observes: bool) -> None:
    ends, counts = [], []
    for recipes in (["bf16"], ["bf16-true"]):
        net = make_net()
        optimizer = SGD(net.parameters(), 1e-2)
        settings = {"recipes": recipes, "every_n_steps": lambda index: index == 0 or observes}
        with watch(net, optimizer, [], **settings):
            train(net, optimizer, 3)
            with host_copies() as copies:
                train(net, optimizer, 1, first=3)
        counts.append(len(copies))
        ends.append([each.clone() for each in net.state_dict().values()])
    assert counts[0] == counts[1]
    assert all(map(torch.equal, *ends))
