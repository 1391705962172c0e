"""States of optimizers in formats: which are stored, their scales, and exact continuation."""

from __future__ import annotations

import io

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from altgrad import Recipe, SamplingRule
from altgrad.observation.stored import get_stored, get_stored_formats
from tests.recipes.storing import net, scale_for, train


def adam(parameters, **options) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, **{"lr": 0.01, **options})


def test_a_second_moment_is_stored_as_ml_dtypes_rounds_it() -> None:
    weight = nn.Parameter(torch.ones(64))
    optimizer = adam([weight])
    Recipe("small-v", states={"exp_avg_sq": "e5m2"}).attach(optimizer)
    generator = torch.Generator().manual_seed(0)
    expected = np.zeros(64, np.float32)
    for step in range(20):
        # Gradients fall by many binades, and the scale has to follow.
        weight.grad = torch.randn(64, generator=generator) * 2.0 ** (-step)
        gradient = weight.grad.numpy()
        v = (
            torch.from_numpy(expected)
            .mul(0.999)
            .addcmul(torch.from_numpy(gradient), torch.from_numpy(gradient), value=1 - 0.999)
        )
        optimizer.step()
        scale = np.float32(scale_for(v.max().item(), "e5m2"))
        expected = (v.numpy() / scale).astype(ml_dtypes.float8_e5m2).astype(np.float32) * scale
        assert np.array_equal(optimizer.state[weight]["exp_avg_sq"].numpy(), expected), step


def test_scales_of_states_fall_with_the_states() -> None:
    weight = nn.Parameter(torch.ones(8))
    optimizer = adam([weight], betas=(0.5, 0.5))
    Recipe("small", states={"*": "e4m3fn"}).attach(optimizer)
    scales = []
    for gradient in (1.0, 0.0, 0.0, 0.0):
        weight.grad = torch.full((8,), gradient)
        optimizer.step()
        scales.append(get_stored([optimizer])[weight].states["exp_avg_sq"].scale.item())
    assert scales == [scale_for(0.5 / 2**step, "e4m3fn") for step in range(4)]


def test_a_star_stores_every_floating_point_state_of_the_shape() -> None:
    weight, scalar = nn.Parameter(torch.ones(300)), nn.Parameter(torch.tensor(1.0))
    optimizer = adam([weight, scalar], amsgrad=True)
    Recipe("low", states={"*": "bf16", "exp_avg": "fp16"}).attach(optimizer)
    for _ in range(300):
        weight.grad, scalar.grad = torch.rand(300), torch.tensor(0.3)
        optimizer.step()
    stored = get_stored([optimizer])
    for parameter in (weight, scalar):
        states = optimizer.state[parameter]
        assert {*stored[parameter].states} == {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
        assert states["step"] == 300  # bf16 counts to 256
        assert torch.equal(states["exp_avg"], states["exp_avg"].half().float())
        for name in ("exp_avg_sq", "max_exp_avg_sq"):
            assert torch.equal(states[name], states[name].bfloat16().float())


def test_counters_of_a_layer_without_dimensions_are_not_stored() -> None:
    counters = []
    for recipe in (None, Recipe("low", states={"*": "e5m2"})):
        scalar = nn.Parameter(torch.tensor(1.0))
        optimizer = torch.optim.NAdam([scalar])
        if recipe is not None:
            recipe.attach(optimizer)
        for _ in range(5):
            scalar.grad = torch.tensor(0.3)
            optimizer.step()
        counters.append({name: optimizer.state[scalar][name] for name in ("step", "mu_product")})
    assert counters[0] == counters[1]


def test_weights_stay_as_they_are_without_a_format() -> None:
    model, other = net(), net()
    optimizer, plain = (torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, other))
    Recipe("states", states={"*": "e5m2"}).attach(optimizer, module=model)
    assert get_stored_formats([optimizer]) == {}
    train(model, optimizer, 3)
    train(other, plain, 3)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_layer_can_be_left_out() -> None:
    model = net()
    optimizer = adam(model.parameters())
    rules = [SamplingRule("2.*", enabled=False)]
    Recipe("low", weights="bf16", states={"*": "bf16"}).attach(
        optimizer, module=model, layers=rules
    )
    stored = get_stored([optimizer])
    assert {*stored} == {*model[0].parameters(), *model[1].parameters()}


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_a_resumed_run_goes_on_exactly(rounding) -> None:
    recipe = Recipe(
        "low", weights="e4m3fn", rounding=rounding, states={"exp_avg": "bf16", "*": "e5m2"}
    )

    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = net()
        return model, adam(model.parameters())

    model, optimizer = start()
    storage = recipe.attach(optimizer, module=model)
    train(model, optimizer, 5)
    saved = model.state_dict(), optimizer.state_dict(), storage.state_dict()
    saved = torch.load(_to_file(saved), weights_only=True)
    train(model, optimizer, 5, seed=2)

    again, resumed = start()
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    storage = recipe.make_storage()
    storage.load_state_dict(saved[2])
    storage.attach(resumed, module=again)
    train(again, resumed, 5, seed=2)
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        for name, state in resumed.state[ours].items():
            assert torch.equal(state, optimizer.state[theirs][name]), name


def _to_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_a_state_that_is_not_finer_than_its_format_is_an_error() -> None:
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = adam([weight])
    Recipe("odd", states={"exp_avg": "fp16"}).attach(optimizer)
    weight.grad = torch.ones_like(weight)
    with pytest.raises(ValueError, match=r"the state 'exp_avg' of .* has dtype torch.bfloat16"):
        optimizer.step()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"dtype": "bfloat16"},
            r"model.to\(torch.bfloat16\) before .* Trainer\(precision='bf16-true'",
        ),
        ({"fused": True}, "fused=True: .* create the optimizer with fused=True"),
        ({"optimizer": adam}, "do create that optimizer"),
        ({"accumulate": "bf16"}, "accumulate='bf16': .* do add up the gradients in tensors of"),
    ],
)
def test_a_recipe_that_needs_another_optimizer_cannot_be_attached(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe("mine", **fields).attach(adam([nn.Parameter(torch.ones(1))]))


def step(*optimizers: torch.optim.Optimizer) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()


WRONG = r"states=\['exp_avg_sp'\]: expected names .* Adam has 'exp_avg', 'exp_avg_sq'\. These names"


def test_a_warning_names_states_that_the_optimizer_does_not_have() -> None:
    optimizer = adam([nn.Parameter(torch.ones(3))])
    Recipe("typo", states={"exp_avg": "bf16", "exp_avg_sp": "bf16", "*": "bf16"}).attach(optimizer)
    optimizer.step()  # without a gradient, there is no state yet
    with pytest.warns(UserWarning, match=WRONG):
        step(optimizer)
    step(optimizer)  # a second warning would be an error


def test_names_of_counters_and_of_states_of_other_shapes_store_nothing() -> None:
    optimizer = torch.optim.Adafactor([nn.Parameter(torch.ones(3, 2))])
    Recipe("factored", states={"row_var": "bf16", "step": "bf16"}).attach(optimizer)
    with pytest.warns(
        UserWarning, match=r"states=\['row_var', 'step'\]: .* Adafactor has none\. These names"
    ):
        step(optimizer)


def test_a_name_is_right_if_one_of_several_optimizers_has_it() -> None:
    first = adam([nn.Parameter(torch.ones(3))], amsgrad=True)
    second = adam([nn.Parameter(torch.ones(3))])
    plain = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)
    recipe = Recipe("several", states={"exp_avg": "bf16"})
    with recipe.attach(first, plain):
        step(plain, first, plain)
    wrong = Recipe("several", states={"exp_avg_sp": "bf16"})
    with wrong.attach(plain, first, second):
        step(plain, first, first)
        with pytest.warns(UserWarning, match="SGD has none; Adam has .*'max_exp_avg_sq'"):
            step(second)


def test_a_storage_is_made_before_it_is_attached() -> None:
    recipe = Recipe("low", weights="e4m3fn", rounding="stochastic", states={"*": "bf16"})
    rules = [SamplingRule("2.*", enabled=False)]
    model, other = net(), net()
    for each, attach in (
        (model, lambda *given, **names: recipe.attach(*given, **names, layers=rules, seed=3)),
        (other, recipe.make_storage(layers=rules, seed=3).attach),
    ):
        optimizer = adam(each.parameters())
        attach(optimizer, module=each)
        train(each, optimizer, 3)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
