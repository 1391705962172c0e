"""Optimizers that a user's function makes: it is called again when hyperparameters change."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_pre_hook

from altgrad.recipes import OptimizerMaker
from altgrad.recipes.recipe import Recipe
from altgrad.twins.factory import FactoryGroup
from tests.twins.twinning import Watched, make_net, train


def parameters(count: int = 2) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3)) for _ in range(count)]


def make_tenth(held: list[nn.Parameter], group: dict[str, Any]) -> Optimizer:
    return SGD(held, lr=group["lr"] / 10, momentum=0.9)


def make_group(factory: Any, **options: Any) -> FactoryGroup:
    return FactoryGroup(factory, parameters(), {"lr": 1.0, "betas": (0.9, 0.99), **options}, seed=0)


def read(group: FactoryGroup, key: str) -> Any:
    return group.optimizer.param_groups[0][key]


# --- what it makes


def test_the_function_gets_copies_of_parameters_and_options() -> None:
    rate, seen = torch.tensor(0.5), []

    def factory(held: list[nn.Parameter], group: dict[str, Any]) -> Optimizer:
        optimizer = SGD([*held], lr=group["lr"])
        seen.append(group["lr"])
        held.clear()
        group.clear()
        return optimizer

    made = make_group(factory, lr=rate)
    assert len(read(made, "params")) == 2
    assert seen[0] is not rate
    assert torch.equal(seen[0], rate)
    made.follow({"betas": (0.5, 0.6)})  # the second call has all options, too
    assert torch.equal(seen[1], rate)


def test_a_factory_must_return_an_optimizer() -> None:
    with pytest.raises(TypeError, match=r"returned list: expected a torch\.optim\.Optimizer"):
        make_group(lambda held, _: held)


@pytest.mark.parametrize("take", [lambda held: held[:1], lambda held: [*held, *parameters(1)]])
def test_a_factory_must_use_exactly_the_given_parameters(take: Any) -> None:
    with pytest.raises(ValueError, match="expected exactly the 2"):
        make_group(lambda held, _: SGD(take(held), lr=1.0))


# --- what it chooses when the run changes


FACTORIES: dict[str, Any] = {
    "a share": lambda held, group: SGD(held, lr=group["lr"] / 10),
    "a sum": lambda held, group: SGD(held, lr=group["lr"] + 0.25),
    "a limit": lambda held, group: SGD(held, lr=min(group["lr"], 0.3)),
    "a constant": lambda held, group: SGD(held, lr=0.125),
    "another name": lambda held, group: SGD(held, lr=1.0, momentum=group["lr"] / 4),
    "two keys": lambda held, group: SGD(held, lr=group["lr"], weight_decay=1 / (1 + group["lr"])),
    "a tensor": lambda held, group: AdamW(held, lr=torch.tensor(group["lr"]), foreach=False),
    "groups": lambda held, group: SGD(
        [{"params": [p], "lr": group["lr"] * (k + 1)} for k, p in enumerate(held)], lr=1.0
    ),
}


@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_choices_equal_those_of_an_optimizer_that_is_made_then(factory: Any) -> None:
    made = make_group(factory)
    for rate in (0.5, 0.25, 0.75):
        made.follow({"lr": rate})
        expected = factory(parameters(), {"lr": rate, "betas": (0.9, 0.99)})
        for group, other in zip(made.optimizer.param_groups, expected.param_groups, strict=True):
            assert {**group, "params": 0} == {**other, "params": 0}


def test_what_the_optimizer_itself_has_changed_stays() -> None:
    made = make_group(make_tenth)
    made.optimizer.param_groups[0].update(k=5, momentum=0.8)
    made.follow({"lr": 0.5})
    assert [read(made, key) for key in ("lr", "k", "momentum")] == [0.05, 5, 0.8]


def test_a_tensor_is_filled_in_place() -> None:
    made = make_group(FACTORIES["a tensor"])
    rate = read(made, "lr")
    made.follow({"lr": 0.5})
    assert read(made, "lr") is rate
    assert rate.item() == 0.5


def test_a_further_call_leaves_parameters_and_random_numbers() -> None:
    drawn: list[float] = []

    def factory(held: list[nn.Parameter], group: dict[str, Any]) -> Optimizer:
        drawn.append(torch.rand(()).item() + random.random())
        return make_tenth(held, group)

    made = make_group(factory)
    before = torch.get_rng_state(), random.getstate()
    held = read(made, "params")
    made.follow({"lr": 0.5})
    assert read(made, "params") is held
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert drawn[0] == drawn[1]


# --- how its states are read


def make_momentum(held: list[nn.Parameter], group: dict[str, Any]) -> Optimizer:
    return SGD(held, lr=group["lr"], momentum=0.9)


def test_states_are_compared_as_the_maker_reads_them() -> None:
    net = make_net()
    optimizer = SGD(net.parameters(), 0.01, momentum=0.9)
    maker = OptimizerMaker(
        make_momentum, read=lambda state, _: {"momentum_buffer": 2 * state["momentum_buffer"]}
    )
    recipes = [Recipe("plain", optimizer=make_momentum), Recipe("mine", optimizer=maker)]
    watched = Watched(net, optimizer, recipes=recipes)
    train(net, optimizer, 8)
    layer = watched.records[-1].layers["0.weight"]
    assert layer["momentum_buffer_ratio/plain"] == pytest.approx(1.0)
    assert layer["momentum_buffer_ratio/mine"] == pytest.approx(2.0)


def test_states_that_cannot_be_read_end_their_twin_alone() -> None:
    def read(state: Any, group: Any) -> Any:
        raise KeyError("m")

    net = make_net()
    optimizer = SGD(net.parameters(), 0.01, momentum=0.9)
    mine = Recipe("mine", optimizer=OptimizerMaker(make_momentum, read=read))
    watched = Watched(net, optimizer, recipes=["bf16", mine])
    train(net, optimizer, 15)
    [notice] = watched.notices
    assert "ends the twin of mine" in notice
    assert watched.records[-1].model.recipes == ("bf16",)


# --- what it compiles


def test_compiling_steps_copies_without_effects() -> None:
    stepped: list[tuple[torch.Size, float, float]] = []

    class Noting(SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            held = self.param_groups[0]["params"]
            stepped.extend((p.shape, p.grad.sum().item(), torch.rand(()).item()) for p in held)
            warnings.warn("of a compiler", stacklevel=2)
            super().step(closure)

    held = parameters()
    made = FactoryGroup(lambda each, group: Noting(each, lr=group["lr"]), held, {"lr": 1.0}, seed=0)
    before, called = torch.get_rng_state(), []
    hook = register_optimizer_step_pre_hook(lambda *_: called.append(1))
    made.compile()
    hook.remove()
    assert [each[:2] for each in stepped] == [(torch.Size([3]), 0.0)] * 2
    assert torch.equal(torch.get_rng_state(), before)
    assert called == []
    for each in held:
        assert each.grad is None
        assert torch.equal(each, torch.ones(3))
    assert not made.optimizer.state


@pytest.mark.parametrize("compiles", [True, False])
def test_only_a_maker_that_compiles_makes_a_step_before_the_first_of_the_run(
    compiles: bool,
) -> None:
    steps: list[str] = []

    class Noting(SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            steps.append("twin")
            super().step(closure)

    net = make_net()
    optimizer = SGD(net.parameters(), 0.01)
    maker = OptimizerMaker(lambda held, group: Noting(held, lr=group["lr"]), compiles=compiles)
    Watched(net, optimizer, recipes=Recipe("mine", optimizer=maker))
    optimizer.register_step_pre_hook(lambda *_: steps.append("run"))
    train(net, optimizer, 2)
    assert steps == ["twin"] * compiles + ["run", "twin", "run", "twin"]


# --- state


def test_a_state_restores_what_the_optimizer_changed() -> None:
    made = make_group(make_tenth)
    made.optimizer.param_groups[0]["k"] = 5
    other = make_group(make_tenth)
    other.load_state_dict(made.state_dict())
    assert read(other, "k") == 5


def test_a_state_does_not_restore_a_choice_that_is_another_one_now() -> None:
    made = make_group(make_tenth)
    made.optimizer.param_groups[0]["momentum"] = 0.8
    other = make_group(make_tenth, lr=0.5)
    other.load_state_dict(made.state_dict())
    assert [read(other, key) for key in ("lr", "momentum")] == [0.05, 0.8]


def test_a_state_with_another_number_of_groups_is_left_out() -> None:
    other = make_group(FACTORIES["groups"])
    other.load_state_dict(make_group(make_tenth).state_dict())
    assert [group["lr"] for group in other.optimizer.param_groups] == [1.0, 2.0]


def test_a_state_is_a_copy() -> None:
    made = make_group(FACTORIES["a tensor"])
    state = made.state_dict()
    made.follow({"lr": 0.5})
    assert state["options"][0]["lr"].item() == 1.0


# --- in a run


@pytest.mark.default_twins
def test_a_schedule_scales_what_a_factory_chose() -> None:
    rates: list[float] = []

    class Recording(SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            rates.append(self.param_groups[0]["lr"])
            super().step(closure)

    net = make_net()
    optimizer = SGD(net.parameters(), 0.01)
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    recipe = Recipe("tenth", optimizer=lambda held, group: Recording(held, lr=group["lr"] / 10))
    watched = Watched(net, optimizer, recipes=[recipe])
    expected = []
    for index in range(6):
        expected.append(optimizer.param_groups[0]["lr"] / 10)
        # From the third step on a layer has no gradient, so that all twins are rearranged.
        train(net, optimizer, 1, first=index, before_step=lambda i: freeze(net, since=2, index=i))
        schedule.step()
    assert rates == expected
    assert watched.notices == []


def freeze(net: nn.Sequential, *, since: int, index: int) -> None:
    if index >= since:
        net[0].bias.grad = None


@pytest.mark.default_twins
@pytest.mark.parametrize("place", ["appended", "replaced"])
def test_a_factory_whose_step_changes_the_parameters_ends_its_twin_alone(place: str) -> None:
    class Changing(SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step(closure)
            if place == "appended":
                self.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
            else:
                self.param_groups[0]["params"][0] = nn.Parameter(torch.zeros(3))

    net = make_net()
    optimizer = SGD(net.parameters(), 0.01)
    recipe = Recipe("mine", optimizer=lambda held, group: Changing(held, lr=group["lr"]))
    watched = Watched(net, optimizer, recipes=["bf16", recipe])
    train(net, optimizer, 10, before_step=lambda index: freeze(net, since=2, index=index))
    [notice] = watched.notices
    assert "ends the twin of mine" in notice
    assert "other parameters after a step than before" in notice
    assert watched.records[-1].model.recipes == ("bf16",)
    watched.monitor.state_dict()


@pytest.mark.default_twins
@pytest.mark.parametrize("saves_before_schedule", [True, False])
def test_a_resumed_run_with_a_schedule_goes_on_with_the_same_choices(
    saves_before_schedule: bool,
) -> None:
    class Warming(SGD):
        """Counts its steps in its group, and warms up by the count."""

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            group = self.param_groups[0]
            group["k"] = group.get("k", 0) + 1
            group["params"][0].grad.mul_(group["k"] / 20)
            super().step(closure)

    def run(*, stops: bool) -> dict[str, float]:
        net = make_net()
        optimizer = SGD(net.parameters(), 0.01)
        schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
        recipe = Recipe("warm", optimizer=lambda held, group: Warming(held, lr=group["lr"] / 10))
        settings: dict[str, Any] = {"recipes": ["bf16", recipe], "every_n_steps": 1}
        watched = Watched(net, optimizer, **settings)
        for index in range(16):
            train(net, optimizer, 1, first=index)
            if stops and index == 9:
                if not saves_before_schedule:
                    schedule.step()
                saved = [x.state_dict() for x in (optimizer, schedule, watched.monitor)]
                watched.monitor.detach()
                optimizer = SGD(net.parameters(), 0.01)
                schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
                optimizer.load_state_dict(saved[0])
                schedule.load_state_dict(saved[1])
                watched = Watched(net, **settings)
                watched.monitor.load_state_dict(saved[2])
                if saves_before_schedule:
                    schedule.step()
                watched.monitor.attach(optimizer)
            else:
                schedule.step()
        assert watched.notices == []
        layer = watched.records[-1].layers["0.weight"]
        return {key: layer[key] for key in layer.twin_keys}

    whole, resumed = run(stops=False), run(stops=True)
    assert whole["progress_kept/warm"] < 0.1
    assert whole == pytest.approx(resumed, rel=0, abs=0, nan_ok=True)
