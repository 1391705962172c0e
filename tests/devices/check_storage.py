"""Weights and states on a device are stored as on the CPU, bit for bit."""

from typing import Any

import pytest
import torch

from altgrad import Recipe, WeightStorage
from tests.devices.simulated import counting, is_on_device
from tests.devices.training import assert_equal_states, give_gradients, make_layers, make_slow_but

STORAGES: dict[str, dict[str, Any]] = {
    "bf16": {"format": "bf16"},
    "kahan": {"format": "bf16", "compensation": "kahan"},
    "e4m3fn": {"format": "e4m3fn"},
    "channel": {"format": "e4m3fn", "scaling": "channel", "compensation": "kahan"},
    "block": {"format": "e2m1", "scaling": ("block", 16)},
    "mxfp4": {"format": "mxfp4"},
    "states": {"format": None, "states": {"exp_avg": "e4m3fn", "exp_avg_sq": "bf16"}},
    "both": {"format": "bf16", "states": {"*": "mxfp8_e4m3"}, "scaling": "channel"},
}


def train(device: torch.device | str, storage: WeightStorage, steps: int = 4) -> Any:
    """Store a model at each step; return its weights and the states of its optimizer."""
    model = make_layers().to(device)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.05)
    with storage.attach(optimizer):
        for step in range(steps):
            give_gradients(model, step)
            optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("name", make_slow_but(["channel", "both"], STORAGES))
def test_stored_weights_and_states_are_those_of_the_cpu(device: torch.device, name: str) -> None:
    here, there = WeightStorage(**STORAGES[name]), WeightStorage(**STORAGES[name])
    assert_equal_states(train("cpu", here), train(device, there))
    for one, other in zip(
        here.state_dict()["layers"].values(), there.state_dict()["layers"].values(), strict=True
    ):
        for key in ("scales", "lost"):
            assert (one[key] is None) is (other[key] is None)
            if one[key] is not None:
                assert torch.equal(one[key], other[key].cpu())


@pytest.mark.parametrize("name", make_slow_but(["both"], ["e4m3fn", "block", "states", "both"]))
def test_stochastic_rounding_draws_what_the_cpu_draws(limited: torch.device, name: str) -> None:
    storages = [
        WeightStorage(**STORAGES[name] | {"rounding": "stochastic"}, seed=5) for _ in range(2)
    ]
    assert_equal_states(train("cpu", storages[0]), train(limited, storages[1]))


def test_a_recipe_is_stored_as_on_the_cpu(device: torch.device) -> None:
    recipe = Recipe("own", weights="mxfp8_e4m3", states={"*": "bf16"})
    both = [train(where, recipe.make_storage()) for where in ("cpu", device)]
    assert_equal_states(*both)


def test_a_resumed_storage_goes_on_as_on_the_cpu(limited: torch.device) -> None:
    def resume(device: Any) -> Any:
        options: dict[str, Any] = STORAGES["channel"] | {"compensation": None}
        first = WeightStorage(**options, rounding="stochastic")
        model, optimizer = train(device, first, steps=2)
        second = WeightStorage(**options, rounding="stochastic", seed=9)
        second.load_state_dict(first.state_dict())
        with second.attach(optimizer):
            for step in range(2, 4):
                give_gradients(model, step)
                optimizer.step()
        return model, optimizer

    assert_equal_states(resume("cpu"), resume(limited))


def test_each_layer_is_copied_once_to_the_host_and_back(limited: torch.device) -> None:
    model = make_layers().to(limited)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.05)
    with WeightStorage("e4m3fn", compensation="kahan").attach(optimizer):
        give_gradients(model, 0)
        with counting() as traffic:
            optimizer.step()
    layers = len([*model.parameters()])
    assert (traffic.to_host, traffic.to_device, traffic.waits.total()) == (layers, layers, 0)


def test_nothing_is_copied_from_a_device_with_float64(able: torch.device) -> None:
    model = make_layers().to(able)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.05)
    with WeightStorage("e4m3fn", compensation="kahan").attach(optimizer):
        give_gradients(model, 0)
        optimizer.step()
        give_gradients(model, 1)
        with counting() as traffic:
            optimizer.step()
    assert traffic.to_host == traffic.waits.total() == 0
    assert all(map(is_on_device, model.parameters()))
