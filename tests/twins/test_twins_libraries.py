"""Twins of other libraries' optimizers against real runs of these optimizers, and beside a run.

`benchmarks.libraries` makes longer runs, and prints the table of the documentation. Steps that the
libraries compile run without a compiler here, but in slow tests.
"""

from __future__ import annotations

import copy
import functools
import itertools
import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from altgrad import Recipe
from altgrad.monitor.elements import sample_elements
from altgrad.recipes.libraries import LIBRARY_RECIPES
from benchmarks.library_runs import (
    ADAM,
    LIBRARIES,
    Comparison,
    Layer,
    compare,
    make_library_run,
)
from benchmarks.twin_runs import Run, train as train_on
from benchmarks.twin_tasks import TASKS, Transformer, symbol_worlds
from tests.twins.twinning import Watched, copy_weights, make_net, one_thread, train

on_one_thread = one_thread()
PACKED = ("torchao-8bit", "torchao-fp8", "bnb-8bit")
RANDOM = ("torchao-sr",)
"""Recipes that round at random, so that a twin and a real run agree only on average."""


@pytest.fixture(autouse=True)
def without_a_compiler(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run compiled code as it is written, unless the test is about the compiler."""
    with torch.compiler.set_stance("default" if "compiler" in request.node.name else "force_eager"):
        yield


@pytest.fixture(params=LIBRARIES)
def recipe(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(LIBRARIES[request.param].module)
    return request.param


# --- a real run


@functools.cache
def tune(recipe: str, lr: float, steps: int = 15, elements: int = 256) -> Comparison:
    """Train in fp32, and fine-tune with twins and by the library itself."""
    start = pretrain()
    torch.manual_seed(0)
    return compare(start, symbol_worlds()[1], recipe, lr, steps, elements)


@functools.cache
def pretrain() -> nn.Module:
    torch.manual_seed(0)
    start, (pretraining, _) = Transformer(depth=1), symbol_worlds()
    train_on(start, pretraining, 30, AdamW(start.parameters(), 1e-3).step)
    return start


def many(layers: list[Layer]) -> list[Layer]:
    return [layer for layer in layers if layer.numel >= 1024]


# At 1e-5, a few large jumps of weights that are rounded to bf16 decide over progress and drift.
AT_SMALL_RATES = [(name, 1e-5, 0.5) for name in ("torchao-sr", "optimi-kahan")]
CASES = [
    *AT_SMALL_RATES,
    *(
        pytest.param(name, 1e-3, 0.04, marks=() if name == "torchao-8bit" else pytest.mark.slow)
        for name in LIBRARIES
    ),
]


@pytest.mark.parametrize(("recipe", "lr", "kept"), CASES)
def test_moved_share_drift_and_states_are_those_of_a_real_run(
    recipe: str, lr: float, kept: float
) -> None:
    pytest.importorskip(LIBRARIES[recipe].module)
    layers = many(tune(recipe, lr).layers)
    assert len(layers) >= 6
    for layer in layers:
        twin, real = layer.fed, layer.real_fed
        assert twin.moved == pytest.approx(real.moved, abs=0.03), layer.name
        assert twin.m_ratio == pytest.approx(real.m_ratio, abs=0.03), layer.name
        assert twin.v_ratio == pytest.approx(real.v_ratio, abs=0.03), layer.name
        # The second moments of rare symbols become 0 in 8 bits: a few elements, most of the drift.
        if layer.name != "symbols.weight":
            assert twin.kept == pytest.approx(real.kept, abs=kept), layer.name
            assert twin.drift == pytest.approx(real.drift, abs=kept), layer.name


@pytest.mark.parametrize("recipe", ["torchao-sr", "optimi-kahan"])
def test_a_twin_that_never_sees_the_real_run_predicts_how_many_weights_move(recipe: str) -> None:
    pytest.importorskip(LIBRARIES[recipe].module)
    layers = many(tune(recipe, 1e-5).layers)
    off = [abs(layer.predicted.moved - layer.real.moved) for layer in layers]
    assert statistics.fmean(off) < 0.03


def test_with_whole_layers_a_twin_equals_a_real_run_that_rounds_to_nearest(recipe: str) -> None:
    if recipe in RANDOM:
        pytest.skip("draws other random numbers than the real run")
    for layer in tune(recipe, 1e-4, steps=4, elements=10**6).layers:
        # A few elements that another processor rounds in another way are allowed for.
        assert [*layer.fed] == pytest.approx([*layer.real_fed], abs=2e-3), layer.name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "lr"), [*zip(LIBRARIES, itertools.cycle([1e-5, 1e-4, 1e-3]))], indirect=["recipe"]
)
def test_compiled_by_a_compiler_twins_predict_real_runs(recipe: str, lr: float) -> None:
    task = TASKS["perceptron"]
    torch.manual_seed(0)
    start = task.make_net()
    train_on(start, task.pretraining, 100, AdamW(start.parameters(), 1e-3).step)
    # Medians of E4M3 differ between blocks: 16 of them.
    layers = many(compare(start, task.tuning, recipe, lr, 100, elements=4096).layers)
    assert len(layers) == 3
    for layer in layers:
        assert layer.fed.moved == pytest.approx(layer.real_fed.moved, abs=0.05)
        allowed = 0.06 if recipe == "torchao-fp8" else 0.02
        assert layer.fed.v_ratio == pytest.approx(layer.real_fed.v_ratio, abs=allowed)


class Fed:
    """A layer in fp32 with a twin, and the same layer that a library steps with equal gradients."""

    def __init__(self, recipe: str, shape: tuple[int, int], **settings: Any) -> None:
        torch.manual_seed(0)
        high, low = nn.Linear(*shape, bias=False), nn.Linear(*shape, bias=False)
        low.load_state_dict(high.state_dict())
        self.low = make_library_run(low, recipe, 1e-3)
        self.high = Run(high, lambda held: AdamW(held, lr=1e-3, **ADAM))
        self.watched = Watched(high, self.high.optimizer, recipes=recipe, **settings)

    def step(self, steps: int) -> None:
        random = torch.Generator().manual_seed(0)
        for _ in range(steps):
            gradient = torch.randn(self.high.parameters["weight"].shape, generator=random).exp()
            for run in (self.high, self.low):
                run.parameters["weight"].grad = gradient.clone()
                run.step()


@pytest.mark.parametrize("shape", [(64, 128), (67, 130)])  # 8,192 and 8,710 elements
@pytest.mark.parametrize("recipe", PACKED)
def test_a_twin_has_whole_blocks_of_a_layer_just_as_the_library_has_them(
    recipe: str, shape: tuple[int, int]
) -> None:
    pytest.importorskip(LIBRARIES[recipe].module)
    fed = Fed(recipe, shape, every_n_steps=1, twin_elements=512)
    fed.step(10)
    twin = fed.watched.records[-1].layers["weight"]
    numel = shape[0] * shape[1]
    if LIBRARY_RECIPES[recipe].maker.packed.packs(numel):
        body, block = numel - numel % 256, 256
    else:
        body, block = numel - numel % 64, 1
    sampled = sample_elements("weight", (body,), 512, block=block)
    high, low = (run.parameters["weight"].detach().double().view(-1) for run in (fed.high, fed.low))
    start = high - fed.high.movement("weight").view(-1)
    drift = (low - high)[sampled].norm() / (high - start)[sampled].norm()
    assert twin[f"drift/{recipe}"] == pytest.approx(drift.item(), rel=1e-6, abs=1e-7)
    assert drift > 1e-4 or block == 1


@pytest.mark.parametrize("elements", [256, 4000])
@pytest.mark.parametrize("recipe", PACKED)
def test_the_library_packs_states_in_the_twin_where_it_packs_them_in_the_run(
    recipe: str, elements: int
) -> None:
    pytest.importorskip(LIBRARIES[recipe].module)
    made: list[Optimizer] = []
    maker = LIBRARY_RECIPES[recipe].maker

    def make(held: list[nn.Parameter], group: dict[str, Any]) -> Optimizer:
        made.append(maker.make(held, group))
        return made[-1]

    net = nn.Sequential(
        nn.Linear(64, 64),  # 4,096 weights, 64 biases
        nn.Linear(64, 300),  # 19,200 weights, 300 biases
        nn.Linear(300, 17),  # 5,100 weights, no whole number of blocks
        *(nn.LayerNorm(17) for _ in range(20)),
    )
    optimizer, real = AdamW(net.parameters(), 1e-3), copy.deepcopy(net)
    library = make_library_run(real, recipe, 1e-3)
    recipe_of_ours = Recipe("ours", optimizer=replace(maker, make=make, compiles=False))
    watched = Watched(net, optimizer, recipes=recipe_of_ours, twin_elements=elements)
    for each in (net, real):
        each(torch.ones(4, 64)).square().mean().backward()
    optimizer.step()
    library.step()
    assert watched.notices == []
    kinds: dict[bool, set[Any]] = {True: set(), False: set()}
    for each in real.parameters():
        kinds[maker.packed.packs(each.numel())].add(find_kind(library.optimizer.state[each]))
    assert len(kinds[True]) == len(kinds[False]) == len(kinds[True] - kinds[False]) == 1
    found = [(p.numel(), find_kind(o.state[p])) for o in made for p in o.state]
    assert {kind for numel, kind in found if numel >= 4096} == kinds[True]
    assert {kind for numel, kind in found if numel < 4096} == kinds[False]


def find_kind(state: dict[str, Any]) -> tuple[type, torch.dtype]:
    """Return the class and dtype of the first moment."""
    moment = state.get("state1", state.get("exp_avg"))
    return type(moment), moment.dtype


def test_layers_that_begin_to_differ_go_apart_and_go_on_as_in_the_real_run(recipe: str) -> None:
    if recipe in RANDOM:
        pytest.skip("draws other random numbers than the real run")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 80))
    low = copy.deepcopy(net)
    library = make_library_run(low, recipe, 1e-3)
    run = Run(net, lambda held: AdamW(held, lr=1e-3, **ADAM))
    watched = Watched(net, run.optimizer, recipes=recipe, every_n_steps=1, twin_elements=10**6)
    random = torch.Generator().manual_seed(0)
    for step in range(9):
        for name, each in run.parameters.items():
            rests = name == "1.weight" and 3 <= step < 6
            other = library.parameters[name]
            gradient = torch.randn(each.shape, generator=random).to(other.dtype)
            each.grad = None if rests else gradient.float()
            other.grad = None if rests else gradient.clone()
        run.step()
        library.step()
    assert watched.notices == []
    for name in run.parameters:
        start = run.parameters[name].detach().double() - run.movement(name)
        apart = library.parameters[name].detach().double() - run.parameters[name].detach().double()
        drift = (apart.norm() / run.movement(name).norm()).item()
        found = watched.records[-1].layers[name][f"drift/{recipe}"]
        # optimi rounds in 16 bits, in a tensor of another length here.
        assert found == pytest.approx(drift, abs=1e-3), (name, start.norm())


# --- beside a run


def test_a_run_draws_and_trains_as_if_there_were_no_twin(recipe: str) -> None:
    def run(recipes: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
        net = make_net()
        optimizer = AdamW(net.parameters(), 1e-3)
        watched = Watched(net, optimizer, recipes=recipes, every_n_steps=3)
        torch.manual_seed(1)
        train(net, optimizer, 8)
        assert watched.notices == []
        return copy_weights(net), torch.get_rng_state()

    (weights, random), (expected, untouched) = run(recipe), run(())
    assert torch.equal(random, untouched)
    assert all(map(torch.equal, weights, expected))


@pytest.mark.parametrize("others", [(), ("bf16-sr",)])
def test_a_run_in_bf16_has_figures_of_itself_in_each_layer_beside_each_recipe(
    recipe: str, others: tuple[str, ...]
) -> None:
    net = make_net(torch.bfloat16, width=256)
    optimizer = AdamW(net.parameters(), 1e-3)
    watched = Watched(net, optimizer, recipes=[recipe, *others])
    train(net, optimizer, 8)
    assert len(watched.records[-1].layers) == 6
    for layer in watched.records[-1].layers.values():
        for each in ("now", recipe, *others):
            assert layer[f"drift/{each}"] >= 0


def test_a_run_without_the_hyperparameters_of_adam_ends_the_twin_with_one_sentence(
    recipe: str,
) -> None:
    net = make_net()
    optimizer = SGD(net.parameters(), 0.01)
    watched = Watched(net, optimizer, recipes=["bf16", recipe])
    train(net, optimizer, 8)
    [notice] = watched.notices
    assert notice.startswith(f"ends the twin of {recipe}: the run's optimizer has no betas, eps: ")
    assert "libraries.py" not in notice
    assert watched.records[-1].model.recipes == ("bf16",)


def test_a_schedule_of_the_run_reaches_the_twin(recipe: str) -> None:
    def run(factor: float) -> float:
        net = make_net()
        optimizer = AdamW(net.parameters(), 1e-3)
        schedule = LambdaLR(optimizer, lambda step: 1.0 if step < 4 else factor)
        watched = Watched(net, optimizer, recipes=recipe, every_n_steps=1)
        for index in range(8):
            train(net, optimizer, 1, first=index)
            schedule.step()
        assert watched.notices == []
        return watched.records[-1].layers["0.weight"][f"step_projection/{recipe}"]

    # Each figure is relative to fp32, which follows the schedule: a twin that did not would be 16
    # times too fast.
    assert run(1 / 16) == pytest.approx(1.0, abs=0.6)


def test_a_resumed_twin_goes_on_exactly(recipe: str) -> None:
    def run(*, stops: bool) -> dict[str, float]:
        net = make_net(width=256)  # 16,640 weights: packed
        optimizer = AdamW(net.parameters(), 1e-3)
        settings: dict[str, Any] = {"recipes": recipe, "every_n_steps": 1}
        watched = Watched(net, optimizer, **settings)
        for index in range(13):
            if stops and index == 6:
                state = watched.monitor.state_dict()
                tensors = [each for each in walk(state) if isinstance(each, torch.Tensor)]
                # Such a checkpoint is read without the library.
                assert {type(each) for each in tensors} == {torch.Tensor}
                watched.monitor.detach()
                watched = Watched(net, **settings)
                watched.monitor.load_state_dict(state)
                watched.monitor.attach(optimizer)
            train(net, optimizer, 1, first=index)
        assert watched.notices == []
        layer = watched.records[-1].layers["0.weight"]
        return {key: layer[key] for key in layer.twin_keys}

    whole = run(stops=False)
    assert len(whole) > 5
    assert whole == pytest.approx(run(stops=True), rel=0, abs=0, nan_ok=True)


def walk(value: Any) -> Iterator[Any]:
    inner = value.values() if isinstance(value, dict) else value
    if isinstance(value, (dict, list, tuple)):
        for each in inner:
            yield from walk(each)
    else:
        yield value


@pytest.mark.slow
def test_a_compiler_runs_before_the_first_step_alone() -> None:
    pytest.importorskip("torchao.optim")
    from torch._dynamo.utils import counters

    compiled: list[int] = []
    torch.compiler.reset()
    net = nn.Linear(64, 40)
    optimizer = AdamW(net.parameters(), 1e-3)
    watched = Watched(net, recipes="torchao-sr", every_n_steps=5)

    def note(*_: Any) -> None:
        compiled.append(counters["stats"]["unique_graphs"])

    counters.clear()
    watched.monitor.attach(optimizer)
    note()
    optimizer.register_step_pre_hook(note)  # after the twins' own hook, before the step
    optimizer.register_step_post_hook(note)
    for _ in range(2):
        net(torch.randn(8, 64)).square().mean().backward()
        optimizer.step()
    note()
    assert watched.notices == []
    assert compiled[0] == 0
    assert {*compiled[1:]} == {1}
