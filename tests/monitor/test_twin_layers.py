"""`TwinLayers`: the samples and scales that a monitor gives to its twins."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from altgrad.monitor.layer_settings import LayerSettings
from altgrad.monitor.measured_layers import MeasuredLayers
from altgrad.monitor.scale_state import ScaleState
from altgrad.monitor.sharding import Sharding
from altgrad.monitor.twin_layers import TwinLayers, count_most_sampled
from altgrad.observation.parameter_names import ParameterRegistry
from altgrad.observation.rules import SamplingRule
from altgrad.quantization.block_formats import get_formats
from altgrad.quantization.format_set import FormatSet
from altgrad.recipes import Recipe

FORMATS = get_formats(["bf16", "e4m3fn"])


class Layered:
    """The layers of a small net, with a rule for each."""

    def __init__(self, *, scaling="tensor", is_named: bool = True) -> None:
        self.net = nn.ModuleDict({name: nn.Linear(32, 32, bias=False) for name in "abc"})
        self.notices: list[str] = []
        self.sharding = Sharding()
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
            MeasuredLayers(registry, settings),
            ScaleState(formats),
            self.sharding,
            self.notices.append,
            warn_here=self.notices.append,
            most_elements=256,
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


def test_layers_of_a_single_process_are_ready_and_whole() -> None:
    layered = Layered()
    weight = layered.net["a"].weight
    assert not layered.layers.is_shared
    assert not layered.layers.tears("a.weight", 16)
    assert not layered.layers.is_ready("a.weight", weight)  # e4m3fn needs its scale
    layered.layers.find_amaxes("a.weight", torch.arange(4))
    assert layered.layers.is_ready("a.weight", weight)
    indices = torch.tensor([3, 5])
    for found in layered.layers.find_part("a.weight", indices):
        assert torch.equal(found, indices)


def test_each_rank_has_random_numbers_of_its_own_and_the_same_samples() -> None:
    layered = Layered()
    seed, drawn = layered.layers.seed, layered.layers.draw("a.weight", torch.Size([32, 32]), 1)
    layered.sharding.peers.rank = 1
    assert layered.layers.seed != seed
    assert torch.equal(layered.layers.draw("a.weight", torch.Size([32, 32]), 1), drawn)


def test_the_largest_sample_is_the_wanted_size_or_a_whole_block() -> None:
    plain, block = Recipe("plain", weights="bf16"), Recipe("block", weights="mxfp8_e4m3")
    eight = Recipe("eight", weights="e4m3fn")
    assert count_most_sampled([256, 1024, 0], [plain], "tensor") == 1024
    assert count_most_sampled([16], [plain, block], "tensor") == 63
    assert count_most_sampled([16], [plain, eight], ("block", 128)) == 128


def test_omissions_are_told_if_the_user_has_named_recipes() -> None:
    for is_named in (True, False):
        layered = Layered(is_named=is_named)
        layered.layers.warn_about_omission("has none")
        layered.layers.warn("ends all")
        assert layered.notices == ["has none", "ends all"][not is_named :]
