"""The record of stored parameters, and monitors that do not judge their formats."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from altgrad import FloatFormat, SamplingRule, UpdateMonitor, WeightStorage, get_format
from altgrad.observation.stored import (
    Stored,
    forget_stored,
    get_stored,
    get_stored_formats,
    register_stored,
)
from altgrad.recipes.rounding import store_
from tests.recipes.storing import net, train


class Storage:
    """A stand-in for a recipe that stores weights."""


def sgd(*parameters: nn.Parameter) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters or [nn.Parameter(torch.ones(1))], lr=1.0)


E4M3FN, BF16 = get_format("e4m3fn"), get_format("bf16")


def in_format(element: FloatFormat) -> Stored:
    return Stored(element, "nearest_even", None, lambda: None, lambda: None)


def test_stored_parameters_are_returned_for_the_given_optimizers() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    one, two, other = sgd(a), sgd(b), sgd()
    storage = Storage()
    register_stored(one, storage, {a: in_format(E4M3FN)})
    register_stored(two, storage, {b: in_format(BF16)})
    assert get_stored_formats([one]) == {a: E4M3FN}
    assert get_stored_formats([one, two]) == {a: E4M3FN, b: BF16}
    assert get_stored_formats([other]) == get_stored_formats([]) == {}
    forget_stored(storage)
    assert get_stored_formats([one, two]) == {}


def test_stored_parameters_are_found_under_a_wrapper() -> None:
    class Wrapper:
        def __init__(self, optimizer: object) -> None:
            self.optimizer = optimizer

    a = nn.Parameter(torch.ones(2))
    optimizer, storage = sgd(a), Storage()
    register_stored(optimizer, storage, {a: in_format(E4M3FN)})
    assert get_stored_formats([Wrapper(Wrapper(optimizer))]) == {a: E4M3FN}


def test_forgetting_one_storage_keeps_the_parameters_of_another() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer, one, two = sgd(a, b), Storage(), Storage()
    register_stored(optimizer, one, {a: in_format(E4M3FN)})
    register_stored(optimizer, two, {b: in_format(BF16)})
    assert get_stored_formats([optimizer]) == {a: E4M3FN, b: BF16}
    forget_stored(one)
    assert get_stored_formats([optimizer]) == {b: BF16}
    register_stored(optimizer, two, {a: in_format(BF16)})  # replaces the earlier call
    assert get_stored_formats([optimizer]) == {a: BF16}
    forget_stored(Storage())
    assert get_stored_formats([optimizer]) == {a: BF16}


def test_an_optimizer_whose_weights_are_stored_is_not_kept_alive() -> None:
    a = nn.Parameter(torch.ones(2))
    optimizer = sgd(a)
    register_stored(optimizer, Storage(), {a: in_format(E4M3FN)})
    known = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert known() is None


# In a monitor


@pytest.mark.parametrize(
    ("stored", "hidden"),
    [
        ("bf16", {"fp16", "bf16"}),
        ("e4m3fn", {"fp16", "bf16", "e4m3fn", "mxfp8_e4m3"}),
        ("mxfp8_e5m2", {"fp16", "bf16", "e4m3fn", "mxfp8_e4m3", "e5m2"}),
    ],
)
def test_a_monitor_does_not_judge_formats_that_are_as_fine_as_the_stored_one(
    stored: str, hidden: set[str]
) -> None:
    """All weights lie on the stored grid, so that a judgement would call frozen layers fine."""
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    storage = WeightStorage(stored, layers=[SamplingRule("2.*", enabled=False)])
    storage.attach(optimizer, module=model)
    formats = ["fp16", "bf16", "e4m3fn", "mxfp8_e4m3", "e5m2", "mxfp4"]
    monitor = UpdateMonitor(model, formats=formats, strict=True)
    with pytest.warns(
        UserWarning, match=r"cannot judge .*bf16.*stores in e?[45bm].*moved_since_start_frac"
    ):
        monitor.attach(optimizer)
    train(model, optimizer, 2)
    for name, figures in monitor.latest.layers.items():
        judged = {key.split("/")[1] for key in figures if key.startswith("stall_frac/")}
        assert judged == {*formats} - ({*hidden} if name[0] != "2" else set()), name
    assert monitor.layers["0.weight"].formats == tuple(f for f in formats if f not in hidden)
    assert monitor.latest.model["stall_frac/bf16"] > 0  # from the layer that is not stored
    monitor.detach()
    storage.detach()
    again = UpdateMonitor(model, formats=formats, strict=True).attach(optimizer)  # no warning
    train(model, optimizer, 1)
    assert "stall_frac/bf16" in again.latest.layers["0.weight"]


@pytest.mark.parametrize("format", ["bf16", "e4m3fn", "mxfp4"])
@pytest.mark.parametrize("scaling", ["tensor", "channel", ("block", 8)])
@pytest.mark.parametrize("compensation", [None, "kahan"])
def test_a_sample_can_be_stored_exactly_as_the_run_stores_it(format, scaling, compensation) -> None:
    """The sample is every third weight, stepped by the same updates."""
    weight = nn.Parameter(torch.randn(4, 40, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.SGD([weight], lr=0.125)
    WeightStorage(format, scaling, compensation=compensation).attach(optimizer)
    stored = get_stored([optimizer])[weight]
    assert (stored.rounding, stored.compensation) == ("nearest_even", compensation)

    def sample(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().expand(weight.shape).flatten()[::3].clone()

    ours = sample(weight)
    lost = None if compensation is None else sample(stored.lost())
    generator = torch.Generator().manual_seed(1)
    for step in range(12):
        weight.grad = torch.randn(4, 40, generator=generator) * 2.0 ** (step - 6)
        ours -= 0.125 * sample(weight.grad)
        optimizer.step()
        scale = stored.scale()
        store_(ours, stored.element, None if scale is None else sample(scale), lost=lost)
        assert torch.equal(ours, sample(weight)), step


def test_a_stored_layer_has_neither_scales_nor_errors_that_it_does_not_need() -> None:
    weight = nn.Parameter(torch.ones(4))
    optimizer = sgd(weight)
    WeightStorage("bf16", rounding="stochastic").attach(optimizer)
    stored = get_stored([optimizer])[weight]
    assert (stored.rounding, stored.compensation) == ("stochastic", None)
    assert stored.scale() is stored.lost() is None
