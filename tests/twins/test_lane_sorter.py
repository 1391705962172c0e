"""`LaneSorter`: which layers lie in which lane, and when they are sorted anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from altgrad import WeightStorage
from altgrad.recipes import PackedStates, StateParts
from altgrad.twins.drawing import Drawing
from altgrad.twins.lane_sorter import LaneSorter


class Source:
    """All layers of a net but one, each with twins."""

    is_shared = False

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.names = {parameter: name for name, parameter in net.named_parameters()}
        self.notices: list[str] = []

    def find_stepped(self, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
        return [(self.names[p], p) for group in optimizer.param_groups for p in group["params"]]

    def has_twins(self, name: str) -> bool:
        return name != "2.weight"

    def warn_about_omission(self, notice: str) -> None:
        self.notices.append(notice)


class Sorted:
    """A net with gradients, sorted once."""

    def __init__(self, drawings: tuple[Drawing, ...] = (Drawing(1),)) -> None:
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).double(), nn.Linear(4, 4))
        self.optimizer = torch.optim.SGD(self.net.parameters(), 0.1, momentum=0.9)
        self.source = Source(self.net)
        for each in self.net.parameters():
            each.grad = torch.ones_like(each)
        self.sorter = LaneSorter(self.source, drawings)  # type: ignore[arg-type]
        self.lanes = self.sort()

    def sort(self):
        return self.sorter.sort(self.optimizer)

    def names(self) -> list[list[str]]:
        return [[each.name for each in stepped] for stepped in self.sort().values()]


def test_each_dtype_has_a_lane_and_layers_without_twins_have_none() -> None:
    result = Sorted()
    assert result.names() == [["0.weight", "0.bias", "2.bias"], ["1.weight", "1.bias"]]
    assert [kind.dtype for kind in result.lanes] == [torch.float32, torch.float64]


def test_each_block_has_a_lane() -> None:
    assert [kind.block for kind in Sorted((Drawing(1), Drawing(32))).lanes] == [1, 32, 1, 32]


def test_layers_whose_states_are_packed_have_a_lane_of_their_own() -> None:
    packed = PackedStates(StateParts, dict, block=8, least=128, only_whole=True)
    net = nn.ParameterDict(
        {name: nn.Parameter(torch.ones(n)) for name, n in (("a", 128), ("b", 132), ("c", 120))}
    )
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    source: Any = Source(net)
    drawings = [Drawing(), Drawing(packed=packed)]
    lanes = LaneSorter(source, drawings).sort(optimizer)
    found = {
        (kind.block, kind.packed is not None): [each.name for each in stepped]
        for kind, stepped in lanes.items()
    }
    assert found == {(1, False): ["a", "b", "c"], (8, True): ["a"], (1, True): ["b", "c"]}
    assert [kind.drawing for kind in lanes] == [drawings[0], *[drawings[1]] * 2]


def test_steps_of_equal_layers_have_the_same_objects() -> None:
    result = Sorted()
    result.optimizer.step()
    for each in result.net.parameters():
        each.grad = torch.zeros_like(each)
    assert result.sort() is result.lanes


def freeze(result: Sorted) -> None:
    result.net[0].weight.grad = None


def reshape(result: Sorted) -> None:
    result.net[0].weight.data = torch.zeros(2, 4)


def cast(result: Sorted) -> None:
    result.net.to(torch.bfloat16)


def split(result: Sorted) -> None:
    [group] = result.optimizer.param_groups
    group["params"], tail = group["params"][:3], group["params"][3:]
    result.optimizer.add_param_group({"params": tail})


def replace(result: Sorted) -> None:
    result.net[0].weight = nn.Parameter(torch.ones(4, 4))
    result.optimizer.param_groups[0]["params"][0] = result.net[0].weight
    result.source.names[result.net[0].weight] = "0.weight"


def rename(result: Sorted) -> None:
    result.source.names = {p: f"net.{name}" for p, name in result.source.names.items()}


@pytest.mark.parametrize("change", [freeze, reshape, cast, split, replace, rename])
def test_other_layers_are_sorted_anew(change: Callable[[Sorted], None]) -> None:
    result = Sorted()
    change(result)
    assert result.sort() is not result.lanes


def test_a_layer_without_a_gradient_stays_in_the_lane_of_its_last_one() -> None:
    result = Sorted()
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    weight.grad_dtype = torch.float32
    weight.grad = torch.ones(4)
    result.source.names[weight] = "low"
    result.optimizer.add_param_group({"params": [weight]})
    kinds = [*result.sort()]
    weight.grad = None
    assert [*result.sort()] == kinds
    assert kinds[-1].gradient_dtype == torch.float32


def test_sparse_layers_are_left_out_with_a_notice() -> None:
    result = Sorted()
    weight = result.net[0].weight
    weight.grad = torch.ones(4, 4).to_sparse()
    assert "0.weight" not in result.names()[0]
    assert "sparse" in result.source.notices[0]


def test_stored_layers_are_in_lanes_of_their_own() -> None:
    result = Sorted()
    assert not any(kind.is_stored or kind.is_low for kind in result.sort())
    bias = result.net[2].bias
    optimizer = torch.optim.SGD([bias], 1e-3)
    storage = WeightStorage("bf16").attach(optimizer, module=result.net)
    bias.grad = torch.zeros_like(bias)
    [kind] = result.sorter.sort(optimizer)
    assert kind.is_stored
    assert kind.is_low
    storage.detach()
    [kind] = result.sorter.sort(optimizer)
    assert not kind.is_stored
