"""Functions that make optimizers, with facts about these: what recipes and headers make of them."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

from altgrad import Recipe
from altgrad.monitor.header import describe_recipe
from altgrad.recipes import OptimizerMaker


def make_sgd(parameters: list[nn.Parameter], group: dict[str, Any]) -> Optimizer:
    return SGD(parameters, lr=group["lr"])


def test_a_maker_is_called_as_its_function() -> None:
    held = [nn.Parameter(torch.ones(3))]
    made = OptimizerMaker(make_sgd)(held, {"lr": 0.25})
    assert isinstance(made, SGD)
    assert made.param_groups[0]["lr"] == 0.25
    assert made.param_groups[0]["params"] == held


def test_a_recipe_has_a_maker_for_a_plain_function_and_takes_a_maker_as_it_is() -> None:
    maker = OptimizerMaker(make_sgd, state_bytes=0)
    assert Recipe("a", optimizer=make_sgd).maker == OptimizerMaker(make_sgd)
    assert Recipe("a", optimizer=maker).maker is maker
    assert Recipe("a").maker is None


@pytest.mark.parametrize(
    ("state_bytes", "dtype", "expected"),
    [(0, None, 4.0), (6, "bfloat16", 8.0), (2.0625, None, 6.0625), (None, "bfloat16", 6.0)],
)
def test_a_recipe_counts_the_bytes_that_the_maker_says(state_bytes, dtype, expected) -> None:
    maker = OptimizerMaker(make_sgd, state_bytes=state_bytes)
    assert Recipe("a", dtype=dtype, optimizer=maker).bytes_per_parameter == expected


def test_a_header_names_the_function_within_a_maker() -> None:
    plain, inside = (Recipe("a", optimizer=each) for each in (make_sgd, OptimizerMaker(make_sgd)))
    name = f"{__name__}.make_sgd"
    assert describe_recipe(plain, None)["optimizer"] == name
    assert describe_recipe(inside, None)["optimizer"] == name


def test_recipes_with_equal_makers_are_equal_and_can_be_pickled() -> None:
    recipe = Recipe("a", optimizer=OptimizerMaker(make_sgd, compiles=True))
    again = pickle.loads(pickle.dumps(recipe))
    assert again == recipe
    assert hash(again) == hash(recipe)
    assert recipe != Recipe("a", optimizer=OptimizerMaker(make_sgd))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"make": 3}, TypeError, "make=3: expected a function of parameters"),
        ({"read": "m"}, TypeError, "read='m': expected a function of the state"),
        ({"compiles": 1}, TypeError, "compiles=1: expected"),
        ({"state_bytes": -1}, ValueError, "state_bytes=-1: expected 0 or more"),
        ({"state_bytes": float("nan")}, ValueError, "state_bytes=nan: expected 0 or more"),
    ],
)
def test_a_wrong_argument_is_an_error_with_a_remedy(settings, error, message) -> None:
    with pytest.raises(error, match=message):
        OptimizerMaker(**{"make": make_sgd, **settings})
