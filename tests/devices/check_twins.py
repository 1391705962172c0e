"""Twins of a run on a device have the figures of a run on the CPU, and step where it computes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from altgrad import Recipe, UpdateMonitor, WeightStorage
from altgrad.twins.self_check import Check
from tests.devices.simulated import Traffic, counting
from tests.devices.training import (
    assert_equal_records,
    give_gradients,
    make_layers,
    make_pairs,
    make_slow_but,
    step_often,
)

DTYPES = torch.float32, torch.bfloat16
RECIPES = "bf16", "bf16-true", Recipe("fp8", weights="e4m3fn", states={"*": "bf16"})
# A step of twins is hundreds of operations, each of which the simulated device hands on in Python.
mostly_limited = pytest.mark.parametrize(
    "device", [pytest.param("able", marks=pytest.mark.slow), "limited"], indirect=True
)
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
    "fused": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, foreach=False),
    "rate": lambda model: torch.optim.Adam(model.parameters(), lr=torch.tensor(1e-3)),
}


def train(
    device: torch.device | str,
    make_optimizer: Callable[[nn.Module], Optimizer] = OPTIMIZERS["AdamW"],
    *,
    dtype: torch.dtype = torch.float32,
    steps: int = 6,
    before: Callable[[nn.Module, Optimizer], object] = lambda *_: None,
    **options: Any,
) -> tuple[list[Any], list[Traffic], UpdateMonitor]:
    model = make_layers(dtype).to(device)
    optimizer, records = make_optimizer(model), []
    settings = {"recipes": RECIPES, "strict": True, "every_n_steps": 3, "warn": [].append}
    before(model, optimizer)
    monitor = UpdateMonitor(model, records.append, **settings | options)
    with monitor.attach(optimizer):
        return records, step_often(model, optimizer, steps), monitor


@pytest.mark.parametrize(
    ("name", "dtype"),
    make_pairs(("AdamW", torch.float32), OPTIMIZERS, DTYPES[::-1]),
)
def test_figures_are_those_of_the_cpu(device: torch.device, name: str, dtype: torch.dtype) -> None:
    here, there = (train(where, OPTIMIZERS[name], dtype=dtype) for where in ("cpu", device))
    assert_equal_records(here[0], there[0])
    assert any("progress_kept" in key for key in there[0][-1].model)
    assert {*there[2].twins.checks.values()} == {*here[2].twins.checks.values()} == {Check.EQUAL}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"recipes": ("bf16", Recipe("block", weights="mxfp4", states={"*": "mxfp8_e4m3"}))},
        {"scaling": "channel", "twin_elements": 100},
        {"scaling": ("block", 32), "max_elements": 100},
        {"every_n_steps": 1, "max_elements": None, "twin_elements": 10**6},
    ],
    ids=str,
)
def test_figures_of_other_recipes_and_scales_are_those_of_the_cpu(
    device: torch.device, options: dict[str, Any]
) -> None:
    here, there = (train(where, **options)[0] for where in ("cpu", device))
    assert_equal_records(here, there)


def test_a_recipe_that_rounds_at_random_draws_what_the_cpu_draws(limited: torch.device) -> None:
    recipes = "bf16-sr", Recipe("own", weights="e4m3fn", rounding="stochastic")
    here, there = (train(where, recipes=recipes)[0] for where in ("cpu", limited))
    assert_equal_records(here, there)


@pytest.mark.slow
def test_twins_of_a_stored_run_are_those_of_the_cpu(device: torch.device) -> None:
    def store(_: nn.Module, optimizer: Optimizer) -> None:
        WeightStorage("e4m3fn", "channel", states={"exp_avg": "bf16"}).attach(optimizer)

    here, there = (train(where, before=store) for where in ("cpu", device))
    assert_equal_records(here[0], there[0])
    assert {*there[2].twins.checks.values()} == {*here[2].twins.checks.values()}


@pytest.mark.parametrize("rounding", make_slow_but(["stochastic"], ["nearest_even", "stochastic"]))
def test_a_recipe_that_adds_up_gradients_is_that_of_the_cpu(
    limited: torch.device, rounding: Any
) -> None:
    recipe = Recipe("low", accumulate="bf16", rounding=rounding)

    def run(device: torch.device | str) -> tuple[list[Any], list[Traffic]]:
        model, records, traffics = make_layers().to(device), [], []
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        monitor = UpdateMonitor(model, records.append, recipes=recipe, strict=True)
        with monitor.attach(optimizer):
            for step in range(4):
                optimizer.zero_grad()
                with counting() as traffic:
                    for part in range(3):
                        add_gradients(model, 3 * step + part)
                traffics.append(traffic)
                optimizer.step()
        return records, traffics

    here, there = run("cpu"), run(limited)
    assert_equal_records(here[0], there[0])
    # One transfer brings the sampled gradients of a whole backward pass, at the next one.
    assert [traffic.to_host for traffic in there[1][1:]] == [2, 2, 2]


def add_gradients(model: nn.Module, step: int) -> None:
    """Have a backward pass add gradients that depend on the step alone."""
    wanted = make_layers(next(model.parameters()).dtype)
    give_gradients(wanted, step)
    pairs = [
        (p, w.grad.to(p.device))
        for p, w in zip(model.parameters(), wanted.parameters(), strict=True)
    ]
    with counting() as traffic:
        sum((p * gradient).sum() for p, gradient in pairs).backward()
    assert traffic.to_device == 0


@mostly_limited
@pytest.mark.parametrize("kind", make_slow_but(["EMA, lists"], ["mean", "EMA", "EMA, lists"]))
def test_averages_are_those_of_the_cpu(device: torch.device, kind: str) -> None:
    functions: dict[str, dict[str, Any]] = {
        "mean": {},
        "EMA": {"avg_fn": get_ema_avg_fn(0.9)},
        "EMA, lists": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    }

    def run(place: torch.device | str) -> tuple[list[Any], list[str]]:
        model, records, notices = make_layers().to(place), [], []
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        averaged = AveragedModel(model, **functions[kind])
        settings: dict[str, Any] = {"recipes": RECIPES, "strict": True, "warn": notices.append}
        monitor = UpdateMonitor(model, records.append, **settings)
        with monitor.watch_average(averaged).attach(optimizer):
            for step in range(5):
                step_often(model, optimizer, 1, first=step)
                averaged.update_parameters(model)
        return records, notices

    here, there = run("cpu"), run(device)
    assert any("average_error" in key for key in there[0][-1].model)
    # AveragedModel itself computes a mean by another formula on a device than on the CPU.
    assert_equal_records(here[0], there[0], tolerance=1e-2 if kind == "mean" else 0)
    assert here[1] == there[1]


@mostly_limited
def test_running_statistics_of_batchnorm_are_those_of_the_cpu(device: torch.device) -> None:
    def run(place: torch.device | str) -> list[Any]:
        torch.manual_seed(0)
        model, records = nn.Sequential(nn.BatchNorm1d(80)).to(place), []
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        monitor = UpdateMonitor(model, records.append, recipes=RECIPES, strict=True)
        with monitor.attach(optimizer):
            for step in range(5):
                generator = torch.Generator().manual_seed(step)
                model(torch.randn(16, 80, generator=generator).to(place))
                step_often(model, optimizer, 1, first=step)
        return records

    assert_equal_records(run("cpu"), run(device))


@pytest.mark.slow
def test_weights_that_something_else_writes_are_taken_over(device: torch.device) -> None:
    def run(place: torch.device | str) -> tuple[list[Any], Any]:
        model, records = make_layers().to(place), []
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        monitor = UpdateMonitor(model, records.append, recipes=RECIPES, strict=True)
        with monitor.attach(optimizer):
            step_often(model, optimizer, 2)
            with torch.no_grad():
                model[2].weight.clamp_(-0.05, 0.05)
            optimizer.state[model[3].weight]["exp_avg"].zero_()
            step_often(model, optimizer, 2, first=2)
        return records, monitor.twins.resynchronised

    here, there = run("cpu"), run(device)
    assert here[1] == there[1] == {"2.weight": 1}
    assert_equal_records(here[0], there[0])


@pytest.mark.slow
@pytest.mark.parametrize("from_device", [True, False])
def test_twins_go_on_from_a_checkpoint_of_another_device(
    limited: torch.device, from_device: bool
) -> None:
    options: dict[str, Any] = {"recipes": RECIPES, "strict": True, "every_n_steps": 1}
    whole = train("cpu", steps=6, **options)[0]
    places = (limited, "cpu") if from_device else ("cpu", limited)
    first, _, monitor = train(places[0], steps=3, **options)
    model, records = make_layers(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step_often(model, optimizer, 3)
    states = optimizer.state_dict()
    model.to(places[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer.load_state_dict(states)
    resumed = UpdateMonitor(model, records.append, **options)
    resumed.load_state_dict(monitor.state_dict())
    with resumed.attach(optimizer):
        step_often(model, optimizer, 3, first=3)
    assert_equal_records(whole, [*first, *records])


def test_a_step_that_is_not_observed_copies_gradients_once_without_float64(
    limited: torch.device,
) -> None:
    _, traffics, _ = train(limited, steps=4, every_n_steps=10)
    for traffic in traffics[2:]:
        assert (traffic.to_host, traffic.to_device, traffic.waits.total()) == (1, 0, 0)


def test_an_observed_step_copies_gradients_weights_twice_and_what_is_measured(
    limited: torch.device,
) -> None:
    # The first step makes the twins' memory.
    traffic = train(limited, steps=2, every_n_steps=1)[1][1]
    assert (traffic.to_host, traffic.to_device, traffic.waits.total()) == (4, 0, 0)


def test_a_step_that_is_not_observed_copies_nothing_with_float64(able: torch.device) -> None:
    _, traffics, _ = train(able, steps=4, every_n_steps=10)
    for traffic in traffics[2:]:
        assert (traffic.to_host, traffic.to_device, traffic.waits.total()) == (0, 0, 0)


class Noisy(torch.optim.SGD):
    """An optimizer that draws random numbers on the device of its weights."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)
        return loss


def make_noisy(model: nn.Module) -> Optimizer:
    return Noisy(model.parameters(), lr=1e-2)


@pytest.mark.slow
def test_a_run_that_draws_on_its_device_is_found(limited: torch.device) -> None:
    def run(place: torch.device | str) -> tuple[set[Check], list[str]]:
        notices: list[str] = []
        monitor = train(place, make_noisy, warn=notices.append)[2]
        # The size of the difference is random.
        return {*monitor.twins.checks.values()}, [each.split(", by up")[0] for each in notices]

    assert run("cpu") == run(limited)


@mostly_limited
def test_a_step_that_a_scaler_skips_moves_no_twin(device: torch.device) -> None:
    def run(place: torch.device | str) -> list[Any]:
        model, records = make_layers().to(place), []
        optimizer = OPTIMIZERS["fused"](model)
        monitor = UpdateMonitor(model, records.append, recipes=RECIPES, strict=True)
        with monitor.attach(optimizer):
            for step, found_inf in enumerate([0.0, 0.0, 1.0, 0.0]):
                optimizer.grad_scale = torch.tensor(2.0).to(place)
                optimizer.found_inf = torch.tensor(found_inf).to(place)
                step_often(model, optimizer, 1, first=step)
        return records

    here, there = run("cpu"), run(device)
    assert len(here) == 3
    assert_equal_records(here, there)


def test_an_observed_step_copies_nothing_to_a_device_with_float64(able: torch.device) -> None:
    traffic = train(able, steps=3, every_n_steps=1)[1][2]
    assert traffic.to_device == 0
