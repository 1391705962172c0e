"""`Watch`: layers, elements and settings that ranks compare."""

from typing import Any

import pytest
import torch
from torch import nn

from altgrad import SamplingRule
from altgrad.distributed.twin_message import TwinPlan
from altgrad.monitor.elements import sample_elements
from altgrad.monitor.layer_settings import LayerSettings
from altgrad.monitor.measured_layers import MeasuredLayers
from altgrad.monitor.watch import Watch
from altgrad.observation.parameter_names import ParameterRegistry
from altgrad.quantization.format_set import FormatSet
from tests.monitor.watching import Model

FORMATS = FormatSet(("bf16", "e4m3fn"))


def make_watch(model: nn.Module, **options: Any) -> tuple[Watch, list[str]]:
    registry, said = ParameterRegistry(model), []
    rules = options.pop("rules", [SamplingRule("quiet", enabled=False)])
    own = {"every_n_steps": 1, "max_elements": 100, "seed": 0} | options
    names = [*registry.names.values()]
    settings = LayerSettings(names, rules, FORMATS, FORMATS.formats, **own)
    layers = MeasuredLayers(registry, settings)
    arguments, describe_state = {"seed": 0}, lambda: {"steps": 7}
    return Watch(layers, FORMATS, arguments, describe_state, said.append, TwinPlan()), said


def sgd(*parameters: nn.Parameter) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def test_parameters_are_in_the_order_of_the_model() -> None:
    model = Model()
    watch, _ = make_watch(model)
    assert [*watch.parameters] == ["first", "waves", "quiet", "frozen", "last"]
    assert all(watch.parameters[name] is each for name, each in model.named_parameters())
    assert watch.formats is FORMATS


def test_measured_by_lists_enabled_layers_with_a_measured_dtype() -> None:
    model = Model()
    watch, _ = make_watch(model)
    stranger = nn.Parameter(torch.ones(1))
    assert watch.measured_by(sgd(*model.parameters(), stranger)) == ("first", "frozen", "last")
    assert watch.measured_by(sgd(model.last, model.first)) == ("last", "first")
    assert watch.measured_by(sgd(model.waves, model.quiet)) == ()


def test_layers_added_to_the_module_are_found_when_stepped() -> None:
    model = Model()
    watch, _ = make_watch(model)
    model.late = nn.Parameter(torch.ones(2))
    assert watch.measured_by(sgd(model.first, model.late)) == ("first", "late")
    assert "late" in watch.parameters
    (late,) = [each for each in watch.describe() if each.startswith("sampling late=")]
    assert "formats=('bf16', 'e4m3fn')" in late


def test_indices_are_a_sample_for_large_layers_and_none_for_small_layers() -> None:
    watch, _ = make_watch(Model(), seed=3)
    shape = torch.Size((50, 60))
    expected = sample_elements("first", shape, 100, seed=3)
    assert torch.equal(watch.indices("first", shape), expected)
    assert watch.indices("last", torch.Size((6,))) is None


@pytest.mark.parametrize(
    ("option", "is_alike"),
    [
        ({}, True),
        ({"max_elements": 99}, False),
        ({"every_n_steps": 2}, False),
        ({"rules": []}, False),
    ],
    ids=str,
)
def test_descriptions_are_equal_if_layers_and_settings_are_equal(option, is_alike) -> None:
    described = make_watch(Model())[0].describe()
    assert described[:2] == ["setting seed=0", "state steps=7"]
    names = ("first", "waves", "quiet", "frozen", "last")
    for name, each in zip(names, described[2:], strict=True):
        assert each.startswith(f"sampling {name}=LayerSampling(")
    assert (make_watch(Model(), **option)[0].describe() == described) is is_alike


def test_layers_left_out_are_no_longer_measured_with_a_notice() -> None:
    model = Model()
    watch, said = make_watch(model)
    optimizer, before = sgd(*model.parameters()), watch.describe()
    assert (watch.measured_by(optimizer), said) == (("first", "frozen", "last"), [])
    watch.leave_out(["first", "frozen"], "leaves out first and frozen: not here")
    assert said == ["leaves out first and frozen: not here"]
    assert watch.measured_by(optimizer) == ("last",)
    assert watch.describe() != before
