"""`Twins`: the reference twin equals the run, and the run is as it is without twins."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from altgrad import SamplingRule, UpdateMonitor, WeightStorage, quantize
from altgrad.recipes import OptimizerMaker, PackedStates, StateParts
from altgrad.recipes.recipe import Recipe
from altgrad.twins.self_check import Check
from tests.combining import combine
from tests.twins.twinning import Watched, copy_weights, make_net, one_thread, train

on_one_thread = one_thread()
pytestmark = pytest.mark.default_twins


def checks(watched: Watched) -> set[Check]:
    return {*watched.monitor.twins.checks.values()}


@pytest.mark.parametrize("recipes", [None, ["bf16-sr", "bf16-true", "e4m3fn-kahan"]])
def test_weights_are_bit_identical_with_twins_and_without(recipes: Any) -> None:
    trained = []
    for chosen in ((), recipes):
        net = make_net()
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
        watched = Watched(net, optimizer, recipes=chosen)
        random = torch.get_rng_state()
        train(net, optimizer, 20)
        assert torch.equal(torch.get_rng_state(), random)
        trained.append(copy_weights(net))
    assert all(map(torch.equal, *trained))
    assert checks(watched) == {Check.EQUAL}


@pytest.mark.slow
def test_a_compiled_optimizer_steps_as_without_twins() -> None:
    trained = []
    for chosen in ((), ["bf16", "bf16-true"]):
        torch.compiler.reset()
        net = make_net()
        optimizer = torch.optim.AdamW(net.parameters(), torch.tensor(1e-3))
        optimizer.step = torch.compile(optimizer.step)  # type: ignore[method-assign]
        watched = Watched(net, optimizer, recipes=chosen)
        train(net, optimizer, 12)
        trained.append(copy_weights(net))
    assert all(map(torch.equal, *trained))
    assert checks(watched) <= {Check.EQUAL, Check.TAILS}
    assert watched.records[-1].model["progress_kept/bf16"] > 0


def test_figures_stand_beside_those_of_formats() -> None:
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    watched = Watched(net, optimizer)
    train(net, optimizer, 30)
    gains = watched.records[-1].layers["2.weight"]
    assert gains["progress_kept/bf16-true"] == 0  # gains at 1 do not move in bf16
    assert gains["frozen_frac/bf16-true"] == 1
    assert gains["progress_kept/bf16-sr"] == pytest.approx(1, abs=0.2)
    assert gains["exp_avg_sq_ratio/bf16-true"] == pytest.approx(1, abs=0.1)
    assert watched.records[-1].model["frozen_frac/bf16"] < 0.2


@pytest.mark.parametrize("elements", [256, 10_000])
def test_moved_rms_is_how_far_the_run_in_float32_has_moved(elements: int) -> None:
    """Of all elements it is exact, and by it the figures of a model follow from those of layers."""
    net = make_net(width=128)  # without tails, which samples leave out
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    watched = Watched(net, optimizer, recipes=["bf16", "bf16-true"], twin_elements=elements)
    start = copy_weights(net)
    train(net, optimizer, 14)
    model, layers = watched.records[-1].model, watched.records[-1].layers
    key, population, energy, kept = "moved_rms/bf16", 0, 0.0, 0.0
    for (name, now), first in zip(net.named_parameters(), start, strict=True):
        way = (now.detach().double() - first.double()).square().mean().sqrt().item()
        is_whole = elements >= now.numel()
        assert layers[name][key] == pytest.approx(way, rel=1e-12 if is_whole else 0.1)
        population += now.numel()
        own = layers[name][key] ** 2 * now.numel()
        energy += own
        kept += own * layers[name]["progress_kept/bf16"]
    assert model[key] == pytest.approx((energy / population) ** 0.5, rel=1e-12)
    assert model["progress_kept/bf16"] == pytest.approx(kept / energy, rel=1e-12)
    assert model["moved_rms/bf16-true"] == model[key]  # every recipe has the same float32


def test_layers_that_come_and_go_equal_the_run() -> None:
    net = make_net()
    optimizer = torch.optim.AdamW(
        [{"params": net[0].parameters()}, {"params": [*net[2:].parameters()], "lr": 1e-4}], 1e-3
    )

    def change(index: int) -> None:
        if index % 3 == 0:
            net[0].bias.grad = None
        if index < 10:
            net[3].weight.grad = None
        if index == 15:
            optimizer.param_groups[0]["lr"] *= 0.5

    watched = Watched(net, optimizer)
    train(net, optimizer, 40, before_step=change)
    assert checks(watched) == {Check.EQUAL}
    assert watched.monitor.twins.resynchronised == {}
    assert "progress_kept/bf16" in watched.records[-1].layers["3.weight"]


def test_weights_that_something_else_changes_are_taken_over_and_counted() -> None:
    net = make_net()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)

    def change(index: int) -> None:
        if index == 5:
            with torch.no_grad():
                net[0].weight.mul_(0.5)
        if index == 11:
            net[3].weight.data.mul_(0.5)
        if index == 20:
            net[3].weight.data = net[3].weight.data * 0.7

    watched = Watched(net, optimizer)
    train(net, optimizer, 40, before_step=change)
    assert checks(watched) == {Check.EQUAL}
    assert watched.monitor.twins.resynchronised == {"0.weight": 1, "3.weight": 2}
    assert watched.notices == []


def test_an_optimizer_that_differs_at_some_steps_alone_is_found() -> None:
    class Sometimes(torch.optim.AdamW):
        """Clips its update by a norm over the whole layer, at every third step."""

        def step(self, closure: Any = None) -> None:
            parameters = self.param_groups[0]["params"]
            before = [p.detach().clone() for p in parameters]
            super().step(closure)
            if self.state[parameters[0]]["step"] % 3 == 2:
                for p, old in zip(parameters, before, strict=True):
                    p.data.copy_(old + (p.data - old) / (1 + old.square().sum()))

    net = make_net()
    optimizer = Sometimes(net.parameters(), 1e-3)
    watched = Watched(net, optimizer, every_n_steps=6)
    train(net, optimizer, 30)
    assert any("differs from the run" in notice for notice in watched.notices)


@pytest.mark.parametrize("kind", ["Adafactor", "Muon", "LBFGS"])
def test_an_optimizer_that_is_not_elementwise_feeds_twins_with_its_updates(kind: str) -> None:
    net = make_net()
    parameters = [p for p in net.parameters() if kind != "Muon" or p.dim() == 2]
    optimizer = getattr(torch.optim, kind)(parameters, lr=1e-3)
    watched = Watched(net, optimizer)
    for _ in range(15):

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = net(torch.ones(4, 65)).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
    ended, fed = watched.notices
    assert "ends the twins of bf16-true" in ended
    assert "feeds the twins of bf16, bf16-sr" in fed
    assert checks(watched) == {Check.DIFFERENT}  # although fed twins equal the run
    model = watched.records[-1].model
    assert model["progress_kept/bf16"] == model["progress_kept/bf16"]  # a number


def test_an_optimizer_that_rounds_at_random_is_not_checkable() -> None:
    class Rounding(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> None:
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    exact = p.float() - 1e-3 * p.grad.float()
                    down, up = (quantize(exact, "bf16", rounding=r) for r in ("down", "up"))
                    goes_up = torch.rand_like(exact) * (up - down) < exact - down
                    p.copy_(torch.where(goes_up, up, down))

    Rounding.__module__ = "elsewhere"
    net = make_net(torch.bfloat16)
    optimizer = Rounding(net.parameters(), {})
    watched = Watched(net, optimizer, formats=["e4m3fn"])
    train(net, optimizer, 20)
    assert Check.NOT_CHECKABLE in checks(watched)
    assert Check.DIFFERENT not in checks(watched)
    assert watched.monitor.twins.resynchronised == {}


def test_a_factory_that_fails_ends_its_twin_alone() -> None:
    def fail(parameters: list[nn.Parameter], group: dict[str, Any]) -> torch.optim.Optimizer:
        raise ValueError("no such optimizer")

    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    watched = Watched(net, optimizer, recipes=["bf16", Recipe("mine", optimizer=fail)])
    train(net, optimizer, 10)
    [notice] = watched.notices
    assert "ends the twin of mine" in notice
    assert "no such optimizer" in notice
    assert watched.records[-1].model.recipes == ("bf16",)


def test_names_of_states_that_no_optimizer_has_are_told_once() -> None:
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    states = {"exp_avg_sp": "e5m2", "exp_avg": "bf16", "*": "bf16"}
    watched = Watched(net, optimizer, recipes=[Recipe("mine", states=states)])
    train(net, optimizer, 10)
    [notice] = watched.notices
    assert "exp_avg_sp" in notice
    assert "'exp_avg', 'exp_avg_sq'" in notice


def test_experts_that_step_apart_are_limited_with_one_notice() -> None:
    torch.manual_seed(1)
    experts = nn.ModuleList(nn.Linear(20, 20) for _ in range(64))
    optimizer = torch.optim.AdamW(experts.parameters(), 1e-3)
    watched = Watched(experts, optimizer)
    for _ in range(30):
        optimizer.zero_grad()
        for k in torch.randperm(64)[:8].tolist():
            experts[k](torch.randn(4, 20)).square().mean().backward()
        optimizer.step()
    [notice] = watched.notices
    assert "32 groups of layers" in notice
    assert checks(watched) == {Check.EQUAL}


def test_twins_of_block_formats_have_a_sample_of_their_own() -> None:
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    watched = Watched(net, optimizer, formats=["bf16", "mxfp4"])
    train(net, optimizer, 20)
    figures = watched.records[-1].layers["0.weight"]
    assert figures["progress_kept/mxfp4"] < 0.2 < figures["progress_kept/bf16"]


def test_rules_set_the_size_of_samples() -> None:
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    rules = [SamplingRule("0.*", twin_elements=0), SamplingRule("3.weight", twin_elements=64)]
    watched = Watched(net, optimizer, sampling=rules)
    train(net, optimizer, 10)
    layers = watched.records[-1].layers
    assert layers["0.weight"].recipes == ()
    assert layers["3.weight"].moved_elements == 64
    assert layers["2.weight"].moved_elements == 128  # up to the last full chunk of 130


@pytest.mark.parametrize(("recipes", "word"), [((), ""), (None, " and progress_kept/now")])
def test_a_notice_about_a_stored_run_names_the_figures_that_it_has(recipes: Any, word: str) -> None:
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    with WeightStorage("bf16").attach(optimizer):
        watched = Watched(net, optimizer, recipes=recipes)
        train(net, optimizer, 10)
    assert watched.notices
    for notice in watched.notices:
        assert notice.endswith(f"read moved_since_start_frac/now{word}")
    figures = watched.records[-1].model
    assert math.isnan(figures.get("progress_kept/now", math.nan)) != bool(word)
    assert figures["moved_since_start_frac/now"] > 0


def test_nothing_is_left_on_the_optimizer_after_detach() -> None:
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    before = {*vars(optimizer)}
    watched = Watched(net, optimizer)
    train(net, optimizer, 3)
    watched.monitor.detach()
    assert {*vars(optimizer)} == before
    assert not optimizer._optimizer_step_pre_hooks  # torch has no public name
    assert not optimizer._optimizer_step_post_hooks  # torch has no public name
    assert watched.monitor.twins.nbytes() == 0


SCALED = [
    *("e4m3fn", "e4m3fn-kahan", "mxfp4"),
    Recipe("v8", states={"exp_avg_sq": "e5m2"}),
    Recipe("v8-sr", weights="bf16", states={"*": "e5m2"}, rounding="stochastic"),
]


@pytest.mark.parametrize(("recipes", "stop"), combine([None, SCALED], [4, 13]))
def test_a_resumed_run_continues_every_figure_bit_for_bit(recipes: Any, stop: int) -> None:
    def run(stops: bool) -> dict[str, float]:
        net = make_net()
        torch.nn.init.zeros_(net[3].weight)  # its scales rise between the observed steps
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
        settings: dict[str, Any] = {"every_n_steps": lambda index: index % 5 == 4}
        settings["recipes"] = recipes
        watched = Watched(net, optimizer, **settings)
        train(net, optimizer, stop if stops else 30)
        if stops:
            saved = [x.state_dict() for x in (net, optimizer, watched.monitor)]
            net = make_net()
            net.load_state_dict(saved[0])
            optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
            optimizer.load_state_dict(saved[1])
            watched.monitor.detach()
            monitor = UpdateMonitor(
                net,
                watched.records.append,
                formats=["bf16", "e4m3fn"],
                recipes=recipes,
                every_n_steps=lambda index: (index + stop) % 5 == 4,
                strict=True,
                warn=watched.notices.append,
            )
            monitor.load_state_dict(saved[2])
            monitor.attach(optimizer)
            train(net, optimizer, 30 - stop, first=stop)
        assert watched.notices == []
        last = watched.records[-1]
        keys = last.model.twin_keys
        return {f"{name} {k}": last.layers[name][k] for name in last.layers for k in keys}

    whole, resumed = run(False), run(True)
    assert whole == pytest.approx(resumed, rel=0, abs=0, nan_ok=True)
    assert len(whole) > 100


def test_no_recipes_step_no_twin() -> None:
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    watched = Watched(net, optimizer, recipes=())
    train(net, optimizer, 10)
    assert watched.monitor.recipes == ()
    assert watched.monitor.twins.nbytes() == 0
    assert watched.records[-1].model.recipes == ()


@pytest.mark.parametrize(
    ("weights", "scaling"), [("mxfp8", "tensor"), ("e4m3fn", ("block", 32)), ("e4m3fn", "tensor")]
)
def test_a_recipe_has_blocks_in_its_formats_or_in_the_states_of_its_optimizer(
    weights: str, scaling: Any
) -> None:
    maker = OptimizerMaker(torch.optim.SGD, packed=PackedStates(StateParts, dict))
    recipe = Recipe("mine", weights=weights, optimizer=maker)
    if scaling == "tensor" and weights == "e4m3fn":
        UpdateMonitor(make_net(), recipes=recipe, scaling=scaling)
    else:
        with pytest.raises(
            ValueError, match="the recipe mine has formats with scales for blocks of 32"
        ):
            UpdateMonitor(make_net(), recipes=recipe, scaling=scaling)
