"""`Sharding`: whole parameters belong to one rank; sharded ones need the others."""

import pytest
import torch
from torch import nn

from altgrad import UpdateMonitor
from altgrad.distributed.peers import Alone
from altgrad.monitor.layer_settings import LayerSettings
from altgrad.monitor.measured_layers import MeasuredLayers
from altgrad.monitor.sharding import Sharding
from altgrad.observation.parameter_names import ParameterRegistry
from altgrad.quantization.format_set import FormatSet
from tests.distributed.parameters import Parameters
from tests.monitor.watching import net

FORMATS = FormatSet("bf16")


@pytest.fixture
def sharded(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The parameters that count as sharded, in place of those of fully_shard."""
    found: list[torch.Tensor] = []
    monkeypatch.setattr(
        "altgrad.monitor.sharding.is_sharded", lambda each: any(each is one for one in found)
    )
    return found


def test_a_rank_with_whole_parameters_is_alone() -> None:
    sharding = Sharding()
    assert isinstance(sharding.find(Parameters(dict(net().named_parameters()))), Alone)
    assert not sharding.is_shared


def test_sharded_parameters_need_a_process_group(sharded: list[torch.Tensor]) -> None:
    parameters = dict(net().named_parameters())
    sharded.append(parameters["3.weight"])
    with pytest.raises(RuntimeError, match=r"torch\.distributed has no process group"):
        Sharding().find(Parameters(parameters))


def test_layers_sharded_after_attach_are_an_error_that_names_them(
    sharded: list[torch.Tensor],
) -> None:
    model, other = nn.Linear(2, 2), nn.Parameter(torch.ones(1))
    registry = ParameterRegistry(model)
    names = [*registry.names.values()]
    own = {"every_n_steps": 1, "max_elements": 100, "seed": 0}
    layers = MeasuredLayers(registry, LayerSettings(names, [], FORMATS, FORMATS.formats, **own))
    optimizer, sharding = torch.optim.SGD([*model.parameters(), other], lr=0.1), Sharding()
    sharding.check(optimizer, layers)
    sharded.append(other)  # which is not observed
    sharding.check(optimizer, layers)
    sharded.append(model.bias)
    with pytest.raises(RuntimeError, match=r"^bias: sharded after attach\(\); shard the module"):
        sharding.check(optimizer, layers)


def test_a_step_of_layers_sharded_after_attach_is_that_error(sharded: list[torch.Tensor]) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with UpdateMonitor(model, strict=True).attach(optimizer):
        model(torch.ones(2)).sum().backward()
        sharded.append(model.weight)
        with pytest.raises(RuntimeError, match=r"^weight: sharded after attach\(\)"):
            optimizer.step()
