"""`Watch`: what a monitor is about to observe, as the other ranks have to know it."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from altgrad import SamplingRule
from altgrad.monitor.elements import sample_elements
from altgrad.monitor.layer_settings import LayerSettings
from altgrad.monitor.watch import Watch
from altgrad.observation.parameter_names import ParameterRegistry
from altgrad.quantization.format_set import FormatSet

FORMATS = FormatSet(("bf16", "e4m3fn"))


class Model(nn.Module):
    """Parameters that are measured, one of another dtype, one that is left out, one untrained."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.ones(50, 60))
        self.waves = nn.Parameter(torch.ones(3, dtype=torch.complex64))
        self.quiet = nn.Parameter(torch.ones(4))
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
        self.last = nn.Parameter(torch.ones(6))


def watch_of(model: nn.Module, **options: Any) -> tuple[Watch, list[str]]:
    registry, said = ParameterRegistry(model), []
    rules = options.pop("rules", [SamplingRule("quiet", enabled=False)])
    own = {"every_n_steps": 1, "max_elements": 100, "seed": 0} | options
    names = [*registry.names.values()]
    settings = LayerSettings(names, rules, FORMATS, FORMATS.formats, **own)
    return Watch(registry, settings, FORMATS, decides, said.append), said


def decides() -> Mapping[str, Mapping[str, object]]:
    return {"settings": {"seed": 0}, "state": {"steps": 7}}


def sgd(*parameters: nn.Parameter) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def test_parameters_are_in_the_order_of_the_model() -> None:
    model = Model()
    watch, _ = watch_of(model)
    assert [*watch.parameters] == ["first", "waves", "quiet", "frozen", "last"]
    assert all(watch.parameters[name] is each for name, each in model.named_parameters())
    assert watch.formats is FORMATS


def test_measured_are_the_layers_of_an_optimizer_that_can_and_should_be() -> None:
    model = Model()
    watch, _ = watch_of(model)
    stranger = nn.Parameter(torch.ones(1))
    assert watch.measured_by(sgd(*model.parameters(), stranger)) == ("first", "frozen", "last")
    assert watch.measured_by(sgd(model.last, model.first)) == ("last", "first")
    assert watch.measured_by(sgd(model.waves, model.quiet)) == ()


def test_what_optimizers_step_together_is_in_the_order_of_the_model() -> None:
    model = Model()
    watch, _ = watch_of(model)
    one, two = sgd(model.last, model.waves), sgd(model.frozen, model.quiet, model.first)
    assert [*watch.stepped_by([one, two])] == ["first", "frozen", "last"]
    assert [*watch.stepped_by([one])] == ["last"]
    assert watch.stepped_by([one])["last"] is model.last
    assert watch.stepped_by([]) == {}


def test_layers_that_the_module_got_since_are_found_when_they_are_stepped() -> None:
    model = Model()
    watch, _ = watch_of(model)
    model.late = nn.Parameter(torch.ones(2))
    assert watch.measured_by(sgd(model.first, model.late)) == ("first", "late")
    assert "late" in watch.parameters
    assert watch.describe()["layers"]["late"].formats == ("bf16", "e4m3fn")


def test_indices_are_the_sample_of_a_large_layer_and_none_of_a_small_one() -> None:
    watch, _ = watch_of(Model(), seed=3)
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
def test_descriptions_are_alike_where_all_layers_are_observed_alike(option, is_alike) -> None:
    described = watch_of(Model())[0].describe()
    assert {key: described[key] for key in ("settings", "state")} == decides()
    assert [*described["layers"]] == ["first", "waves", "quiet", "frozen", "last"]
    assert (watch_of(Model(), **option)[0].describe() == described) is is_alike


def test_layers_that_are_left_out_are_measured_no_more_and_it_is_said_why() -> None:
    model = Model()
    watch, said = watch_of(model)
    optimizer, before = sgd(*model.parameters()), watch.describe()
    enabled = [name for name in watch.parameters if watch.is_enabled(name)]
    assert (enabled, said) == (["first", "waves", "frozen", "last"], [])
    watch.leave_out(["first", "frozen"], "leaves out first and frozen: not here")
    assert said == ["leaves out first and frozen: not here"]
    assert [watch.is_enabled(name) for name in ("first", "frozen", "last")] == [False, False, True]
    assert watch.measured_by(optimizer) == ("last",)
    assert [*watch.stepped_by([optimizer])] == ["last"]
    assert watch.describe() != before
