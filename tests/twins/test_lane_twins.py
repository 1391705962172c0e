"""`LaneTwins`: the twins of a lane, and which of them go on after an error."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from altgrad.recipes.recipe import Recipe
from tests.twins.twinning import Watched, make_net, one_thread, train

on_one_thread = one_thread()


def test_a_notice_names_the_type_and_the_place_of_an_error_in_a_step() -> None:
    class Keyed(torch.optim.SGD):
        """Looks up its parameters by their numbers, which others do not have."""

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                p.grad.mul_(self.factors[id(p)])
            super().step(closure)

    net = make_net()
    optimizer = Keyed(net.parameters(), 1e-3)
    optimizer.factors = {id(p): 1.0 for p in net.parameters()}
    watched = Watched(net, optimizer, recipes=["bf16"])
    train(net, optimizer, 2)
    [notice] = watched.notices
    assert re.search(r"Keyed cannot run on a sample: KeyError\(\d+\) in step, .*test_lane", notice)


class FailsAt(torch.optim.SGD):
    """SGD that raises an error in a step of a given number."""

    def __init__(self, parameters: list[Tensor], number: int) -> None:
        super().__init__(parameters, 1e-3)
        self.left = number

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.left -= 1
        if self.left < 0:
            raise ArithmeticError("out of numbers")
        super().step(closure)


@pytest.mark.parametrize("number", [0, 1, 5])
def test_a_twin_that_fails_ends_alone(number: int) -> None:
    failing = Recipe("failing", optimizer=lambda held, _: FailsAt(held, number))
    records = []
    for recipes in (["bf16"], ["bf16", failing]):
        net = make_net()
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
        watched = Watched(net, optimizer, recipes=recipes)
        train(net, optimizer, 7)
        records.append(watched.records[-1].layers["0.weight"])
    [notice] = watched.notices
    assert re.search(r"ends the twin of failing: ArithmeticError.* in step", notice)
    alone, beside = records
    assert beside.recipes == ("bf16",)
    for key in alone.twin_keys:
        assert beside[key] == alone[key] or math.isnan(alone[key])


def test_a_factory_that_fails_ends_its_twin_alone() -> None:
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    failing = Recipe("failing", optimizer=lambda held, group: group["no such key"])
    watched = Watched(net, optimizer, recipes=["bf16", failing])
    train(net, optimizer, 7)
    [notice] = watched.notices
    assert "ends the twin of failing: KeyError" in notice
    assert watched.records[-1].model.recipes == ("bf16",)


def test_an_optimizer_of_whole_tensors_feeds_the_recipes_of_weights_alone() -> None:
    class Normalised(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad / p.grad.norm() * 0.01)

    net = make_net()
    optimizer = Normalised(net.parameters(), 1e-3)
    watched = Watched(net, optimizer, recipes=["bf16", "bf16-true", "e4m3fn-sr"])
    train(net, optimizer, 7)
    ended, fed = watched.notices
    assert ended.startswith("ends the twins of bf16-true:")
    assert fed.startswith("feeds the twins of bf16, e4m3fn-sr")
    assert watched.records[-1].model.recipes == ("bf16", "e4m3fn-sr")
