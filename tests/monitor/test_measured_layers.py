"""`MeasuredLayers`: layers that no rule disables, with a dtype that is measured."""

import pytest
import torch
from torch import nn

from altgrad import SamplingRule
from altgrad.monitor.layer_settings import LayerSettings
from altgrad.monitor.measured_layers import MeasuredLayers
from altgrad.observation.parameter_names import ParameterRegistry
from altgrad.quantization import devices
from altgrad.quantization.format_set import FormatSet
from tests.monitor.watching import Model

FORMATS = FormatSet("bf16")


def make_layers(model: nn.Module) -> MeasuredLayers:
    registry, rules = ParameterRegistry(model), [SamplingRule("quiet", enabled=False)]
    own = {"every_n_steps": 1, "max_elements": 100, "seed": 0}
    names = [*registry.names.values()]
    return MeasuredLayers(registry, LayerSettings(names, rules, FORMATS, FORMATS.formats, **own))


def sgd(*parameters: nn.Parameter) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def test_frozen_layers_are_measured_if_an_optimizer_steps_them() -> None:
    model = Model()
    layers = make_layers(model)
    assert layers.names == ["first", "frozen", "last"]
    assert layers.parameters == {"first": model.first, "last": model.last}


def test_the_layers_of_an_optimizer_are_in_the_order_of_its_groups() -> None:
    model = Model()
    layers = make_layers(model)
    stranger = nn.Parameter(torch.ones(1))
    assert layers.list_stepped(sgd(*model.parameters(), stranger)) == ("first", "frozen", "last")
    assert layers.list_stepped(sgd(model.last, model.first)) == ("last", "first")
    assert layers.list_stepped(sgd(model.waves, model.quiet)) == ()


def test_the_layers_of_several_optimizers_are_in_the_order_of_the_model() -> None:
    model = Model()
    layers = make_layers(model)
    one, two = sgd(model.last, model.waves), sgd(model.frozen, model.quiet, model.first)
    assert [*layers.find_stepped([one, two])] == ["first", "frozen", "last"]
    assert layers.find_stepped([one]) == {"last": model.last}
    assert layers.find_stepped([]) == {}


def test_layers_left_out_or_added_later_are_seen() -> None:
    model = Model()
    layers = make_layers(model)
    layers.settings.leave_out(["first"])
    model.late = nn.Parameter(torch.ones(2))
    assert layers.list_stepped(sgd(model.late)) == ("late",)
    assert layers.names == ["frozen", "last", "late"]


def test_large_layers_are_not_whole() -> None:
    layers = make_layers(Model())
    assert [layers.count_elements(name) for name in ("first", "last")] == [100, 6]
    whole = [name for name in ("first", "quiet", "last", "unknown") if layers.is_whole(name)]
    assert whole == ["last"]


def test_the_cpu_measures_its_layers_and_those_of_devices_without_float64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_meta = nn.ParameterDict({"w": nn.Parameter(torch.ones(3, device="meta"))})
    assert make_layers(Model()).measures_on_host
    monkeypatch.setattr(devices, "EXACT", frozenset({"cpu", "meta"}))
    assert not MeasuredLayers(
        ParameterRegistry(on_meta), make_layers(Model()).settings
    ).measures_on_host
