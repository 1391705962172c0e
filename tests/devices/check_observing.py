"""A monitor of a model on a device has the figures of one on the CPU, and copies once a step."""

from typing import Any

import pytest
import torch

from altgrad import SamplingRule, StepRecord, UpdateMonitor
from tests.devices.simulated import Traffic
from tests.devices.training import (
    assert_equal_records,
    make_layers,
    make_pairs,
    make_slow_but,
    step_often,
)

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "whole": {"max_elements": None},
    "sampled": {"max_elements": 300, "formats": ("bf16", "e2m1")},
    "channel": {"scaling": "channel"},
    "block": {"scaling": ("block", 32), "max_elements": 300},
    "block formats": {"formats": ("nvfp4", "mxfp8_e4m3", "bf16"), "max_elements": 300},
    "no formats": {"formats": ()},
    "no scales": {"scaling": None, "max_elements": None},
    "rules": {"sampling": [SamplingRule("2.weight", max_elements=100, formats=("e5m2",))]},
}
DTYPES = torch.float32, torch.bfloat16
EVERY_TENTH: dict[str, Any] = {"every_n_steps": 10}
Trained = tuple[list[StepRecord], list[Traffic], UpdateMonitor]


def train(
    device: torch.device | str, dtype: torch.dtype = torch.float32, steps: int = 4, **options: Any
) -> Trained:
    """Observe a model; return the records, what went between host and device in each step, …"""
    model, records = make_layers(dtype).to(device), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    settings = {"recipes": (), "strict": True} | options
    monitor = UpdateMonitor(model, records.append, warn=[].append, **settings)
    with monitor.attach(optimizer):
        return records, step_often(model, optimizer, steps), monitor


@pytest.mark.parametrize(
    ("name", "dtype"),
    make_pairs(("sampled", torch.float32), OPTIONS, DTYPES),
)
def test_figures_are_those_of_the_cpu(device: torch.device, name: str, dtype: torch.dtype) -> None:
    here, there = (train(where, dtype, **OPTIONS[name])[0] for where in ("cpu", device))
    assert_equal_records(here, there)


def test_without_twins_a_run_in_bf16_has_the_share_that_moved(device: torch.device) -> None:
    key = "moved_since_start_frac/now"
    here, there = (train(where, torch.bfloat16, steps=6)[0] for where in ("cpu", device))
    shares = [[each.layers[name][key] for name in each.layers] for each in there]
    assert shares == [[each.layers[name][key] for name in each.layers] for each in here]
    assert min(shares[-1]) < max(shares[-1])


@pytest.mark.parametrize("name", make_slow_but(["channel", "block formats"], OPTIONS))
def test_an_observed_step_copies_once_to_the_host_and_never_to_the_device(
    device: torch.device, name: str
) -> None:
    # No layer is all 0: while one is, its scale is computed anew after some steps.
    model = make_layers().to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    settings: dict[str, Any] = {"recipes": (), "strict": True} | OPTIONS[name]
    with UpdateMonitor(model, **settings).attach(optimizer):
        traffics = step_often(model, optimizer, 4)
    for traffic in traffics[1:]:
        assert (traffic.to_host, traffic.to_device, traffic.waits.total()) == (1, 0, 0)


def test_a_step_that_is_not_observed_copies_nothing(device: torch.device) -> None:
    _, traffics, _ = train(device, **EVERY_TENTH)
    plain_model = make_layers().to(device)
    plain = torch.optim.AdamW(plain_model.parameters(), lr=1e-3)
    for traffic, expected in zip(traffics[1:], step_often(plain_model, plain, 4)[1:], strict=True):
        assert (traffic.to_host, traffic.to_device, traffic.waits.total()) == (0, 0, 0)
        assert traffic.operations == expected.operations


def test_training_is_bit_identical(device: torch.device) -> None:
    watched, alone = make_layers().to(device), make_layers().to(device)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-3) for each in (watched, alone)]
    with UpdateMonitor(watched, recipes=(), strict=True).attach(optimizers[0]):
        step_often(watched, optimizers[0], 3)
    step_often(alone, optimizers[1], 3)
    for one, other in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("from_device", [True, False])
def test_a_run_resumes_on_another_device(device: torch.device, from_device: bool) -> None:
    options: dict[str, Any] = {"max_elements": 300, "scaling": "channel", "recipes": ()}
    whole, _, _ = train("cpu", steps=6, **options)
    places = (device, "cpu") if from_device else ("cpu", device)
    first, _, monitor = train(places[0], steps=3, **options)
    model, records = make_layers().to("cpu"), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step_often(model, optimizer, 3)
    states = optimizer.state_dict()
    model.to(places[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer.load_state_dict(states)
    resumed = UpdateMonitor(model, records.append, strict=True, **options)
    resumed.load_state_dict(monitor.state_dict())
    with resumed.attach(optimizer):
        step_often(model, optimizer, 3, first=3)
    assert_equal_records(whole, [*first, *records])


def test_layers_on_several_devices_are_measured_in_one_step(device: torch.device) -> None:
    def observe(*places: torch.device | str) -> list[StepRecord]:
        model, records = make_layers(), []
        for place, layer in zip(places, model, strict=True):
            layer.to(place)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        with UpdateMonitor(model, records.append, recipes=(), strict=True).attach(optimizer):
            step_often(model, optimizer, 3)
        return records

    here, there = observe(*["cpu"] * 4), observe("cpu", device, "cpu", device)
    # Layers on CUDA are measured apart from those on the CPU, so that sums have another order.
    assert_equal_records(here, there, tolerance=1e-12)


def test_a_step_that_a_scaler_skips_is_found(device: torch.device) -> None:
    model = make_layers().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    optimizer.grad_scale, optimizer.found_inf = None, torch.zeros((), device=device)
    with UpdateMonitor(model, recipes=(), strict=True).attach(optimizer) as monitor:
        step_often(model, optimizer, 1)
        optimizer.found_inf = torch.ones((), device=device)
        traffic = step_often(model, optimizer, 1)[0]
    assert monitor.skipped == {"inf": 1}
    assert (traffic.to_host, traffic.waits.total()) == (1, 0)


def test_weights_that_moved_in_no_step_are_found(device: torch.device) -> None:
    notices: list[str] = []
    model = make_layers().to(device)
    optimizer, other = (torch.optim.SGD(model.parameters(), lr=1.0) for _ in range(2))
    with UpdateMonitor(model, recipes=(), warn=notices.append).attach(optimizer):
        step_often(model, other, 1)
    assert [notice.split(":")[0] for notice in notices] == [
        "cannot see what moves 0.weight, 0.bias, 1.weight and 5 more"
    ]
