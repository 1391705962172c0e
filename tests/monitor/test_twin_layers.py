"""`TwinLayers`: the samples and scales that a monitor gives to its twins."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from altgrad.distributed.peers import Alone
from altgrad.monitor.layer_settings import LayerSettings
from altgrad.monitor.scale_state import ScaleState
from altgrad.monitor.twin_layers import TwinLayers
from altgrad.observation.parameter_names import ParameterRegistry
from altgrad.observation.rules import SamplingRule
from altgrad.quantization.block_formats import get_formats
from altgrad.quantization.format_set import FormatSet

FORMATS = get_formats(["bf16", "e4m3fn"])


class Layered:
    """The layers of a small net, with a rule for each."""

    def __init__(self, *, scaling="tensor", is_named: bool = True) -> None:
        self.net = nn.ModuleDict({name: nn.Linear(32, 32, bias=False) for name in "abc"})
        self.notices: list[str] = []
        self.peers = Alone()
        registry = ParameterRegistry(self.net)
        formats = FormatSet(FORMATS, scaling)
        rules = [
            SamplingRule("a.*", twin_elements=100),
            SamplingRule("b.*", twin_elements=0),
            SamplingRule("c.*", enabled=False),
        ]
        settings = LayerSettings(
            [*registry.names.values()],
            rules,
            formats,
            FORMATS,
            every_n_steps=1,
            max_elements=1024,
            seed=3,
            twin_elements=256,
        )
        self.layers = TwinLayers(
            registry,
            settings,
            ScaleState(formats),
            lambda: self.peers,
            self.notices.append,
            warns_about_omissions=is_named,
        )


def test_rules_decide_which_layers_have_twins_and_how_many_elements() -> None:
    layers = Layered().layers
    assert [layers.has_twins(f"{name}.weight") for name in "abc"] == [True, False, False]
    drawn = layers.draw("a.weight", torch.Size([32, 32]), 1)
    assert len(drawn) == 100
    assert torch.equal(drawn, layers.draw("a.weight", torch.Size([32, 32]), 1))


def test_blocks_are_drawn_as_a_whole() -> None:
    drawn = Layered().layers.draw("a.weight", torch.Size([32, 32]), 16)
    assert torch.equal(drawn.view(-1, 16) % 16, torch.arange(16).expand(len(drawn) // 16, 16))


def test_layers_are_those_that_an_optimizer_steps() -> None:
    layered = Layered()
    optimizer = torch.optim.SGD(layered.net["b"].parameters(), 0.1)
    [(name, parameter)] = layered.layers.find_stepped(optimizer)
    assert name == "b.weight"
    assert parameter is layered.net["b"].weight


@pytest.mark.parametrize("scaling", ["tensor", "channel"])
def test_each_element_has_the_amax_of_its_scale(scaling) -> None:
    layered = Layered(scaling=scaling)
    weight = layered.net["a"].weight.detach()
    indices = torch.arange(0, 1024, 7)
    groups = layered.layers.find_amaxes("a.weight", indices)
    rows = weight.abs().amax(1)[indices // 32] if scaling == "channel" else weight.abs().amax()
    assert torch.equal(groups.expand(len(indices)), rows.expand(len(indices)))


def test_twins_stand_still_where_ranks_share_parameters() -> None:
    layered = Layered()
    assert layered.layers.can_step
    layered.peers.size = 2
    assert not layered.layers.can_step


def test_omissions_are_told_if_the_user_has_named_recipes() -> None:
    for is_named in (True, False):
        layered = Layered(is_named=is_named)
        layered.layers.warn_about_omission("has none")
        layered.layers.warn("ends all")
        assert layered.notices == ["has none", "ends all"][not is_named :]
