"""`RunSamples`: samples of the layers, followed by twins or by their weights at the start."""

import copy
import threading
from typing import Any

import pytest
import torch
from torch import nn

from altgrad.distributed.peers import Alone
from altgrad.measurement.catalogue import NOW
from altgrad.monitor.layer_settings import LayerSettings
from altgrad.monitor.measured_layers import MeasuredLayers
from altgrad.monitor.run_samples import EMPTY, RunSamples
from altgrad.monitor.scale_state import ScaleState
from altgrad.monitor.sharding import Sharding
from altgrad.monitor.twin_layers import TwinLayers
from altgrad.observation.parameter_names import ParameterRegistry
from altgrad.quantization.format_set import FormatSet
from altgrad.recipes.names import get_recipes

FORMATS = FormatSet("e4m3fn")


class Run:
    """A model in 16 bits whose samples are followed, without a monitor."""

    def __init__(self, *recipes: str, scaling: Any = "tensor") -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(16, 4).bfloat16()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
        registry, formats = ParameterRegistry(self.model), FormatSet("e4m3fn", scaling)
        own = {"every_n_steps": 1, "max_elements": 100, "seed": 0}
        names = [*registry.names.values()]
        settings = LayerSettings(names, [], formats, formats.formats, **own)
        layers = TwinLayers(
            MeasuredLayers(registry, settings),
            ScaleState(formats),
            Sharding(),
            pytest.fail,
            warn_here=pytest.fail,
            most_elements=256,
            warns_about_omissions=True,
        )
        lock = threading.RLock()
        self.samples = RunSamples(get_recipes(recipes), layers, registry, lock, strict=True)
        self.samples.attach([self.optimizer])

    def step(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.samples.twins.capture(self.optimizer, is_observed=True)
        self.optimizer.step()
        self.samples.twins.finish(self.optimizer)

    def read(self, *shown: str) -> Any:
        tensors, read = self.samples.measure(self.optimizer, shown)
        return read([each.numpy() for each in tensors])


@pytest.mark.parametrize("recipes", [(), ("bf16",)])
def test_the_run_itself_has_figures_with_and_without_recipes(recipes: tuple[str, ...]) -> None:
    run = Run(*recipes)
    run.step()
    (part,) = run.read("weight", "bias").parts
    assert tuple(part.layers) == ("weight", "bias")
    assert {*part.recipes} == {NOW, *recipes}


@pytest.mark.parametrize("recipes", [(), ("bf16",)])
def test_a_skipped_step_and_an_error_have_no_figures(recipes: tuple[str, ...]) -> None:
    run = Run(*recipes)
    run.step()
    assert not run.read().parts
    _, read = run.samples.measure(run.optimizer, ("weight",))
    assert not read([]).parts


@pytest.mark.parametrize(
    ("recipes", "scaling", "needs"),
    [((), "tensor", False), (("bf16",), "tensor", False), (("e4m3fn-sr",), "tensor", True)],
)
def test_weights_in_few_bits_need_an_amax(recipes: Any, scaling: Any, needs: bool) -> None:
    assert Run(*recipes, scaling=scaling).samples.needs_amax is needs


@pytest.mark.parametrize("recipes", [(), ("bf16",)])
def test_a_state_is_restored(recipes: tuple[str, ...]) -> None:
    run, resumed = Run(*recipes), Run(*recipes)
    run.step()
    state = copy.deepcopy(run.samples.state_dict(Alone()))
    assert bool(state["twins"]["lanes"]) is bool(recipes)
    assert bool(state["starts"]) is not bool(recipes)
    resumed.samples.load_state_dict(state)
    again = resumed.samples.state_dict(Alone())
    assert [*again["starts"]] == [*state["starts"]]
    assert len(again["twins"]["lanes"]) == len(state["twins"]["lanes"])


def test_samples_begin_anew_from_an_empty_state() -> None:
    for recipes in ((), ("bf16",)):
        run = Run(*recipes)
        run.samples.load_state_dict(EMPTY)
        run.step()
        run.read("weight")


def test_ranks_exchange_the_states_of_their_twins() -> None:
    class Two(Alone):
        size = 2

        def exchange(self, own: bytes) -> list[bytes]:
            return [own, own]

    for recipes, lanes in (((), 0), (("bf16",), 1)):
        run = Run(*recipes)
        run.step()
        assert len(run.samples.state_dict(Two())["twins"]["lanes"]) == lanes
