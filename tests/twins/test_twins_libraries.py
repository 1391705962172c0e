"""Twins of other libraries' optimizers against real runs of these optimizers, and beside a run.

`benchmarks.libraries` makes longer runs, and prints the table of the documentation. Steps that the
libraries compile run without a compiler here, but in slow tests.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.library_runs import LIBRARIES, Comparison, Layer, compare
from benchmarks.twin_runs import train as train_on
from benchmarks.twin_tasks import TASKS, Transformer, symbol_worlds
from tests.twins.twinning import Watched, copy_weights, make_net, one_thread, train

on_one_thread = one_thread()
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
def tune(recipe: str, lr: float, steps: int = 20, elements: int = 256) -> Comparison:
    """Train in fp32, and fine-tune with twins and by the library itself."""
    torch.manual_seed(0)
    start, (pretraining, tuning) = Transformer(depth=1), symbol_worlds()
    train_on(start, pretraining, 30, AdamW(start.parameters(), 1e-3).step)
    return compare(start, tuning, recipe, lr, steps, elements)


def many(layers: list[Layer]) -> list[Layer]:
    return [layer for layer in layers if layer.numel >= 1024]


# At 1e-5, a few large jumps of weights that are rounded decide over progress and drift.
@pytest.mark.parametrize(("lr", "moved", "kept"), [(1e-5, 0.03, 0.3), (1e-3, 0.03, 0.04)])
def test_moved_share_drift_and_states_are_those_of_a_real_run(
    recipe: str, lr: float, moved: float, kept: float
) -> None:
    layers = many(tune(recipe, lr).layers)
    assert len(layers) >= 6
    for layer in layers:
        twin, real = layer.fed, layer.real_fed
        assert twin.moved == pytest.approx(real.moved, abs=moved), layer.name
        assert twin.kept == pytest.approx(real.kept, abs=kept), layer.name
        assert twin.drift == pytest.approx(real.drift, abs=kept), layer.name
        assert twin.m_ratio == pytest.approx(real.m_ratio, abs=0.02), layer.name
        assert twin.v_ratio == pytest.approx(real.v_ratio, abs=0.02), layer.name


def test_a_twin_that_never_sees_the_real_run_predicts_how_many_weights_move(recipe: str) -> None:
    layers = many(tune(recipe, 1e-5).layers)
    off = [abs(layer.predicted.moved - layer.real.moved) for layer in layers]
    assert statistics.fmean(off) < 0.03


def test_with_whole_layers_a_twin_equals_a_real_run_that_rounds_to_nearest(recipe: str) -> None:
    if recipe in RANDOM:
        pytest.skip("draws other random numbers than the real run")
    for layer in tune(recipe, 1e-4, steps=8, elements=10**6).layers:
        # A few elements that another processor rounds in another way are allowed for.
        assert [*layer.fed] == pytest.approx([*layer.real_fed], abs=2e-3), layer.name


@pytest.mark.slow
@pytest.mark.parametrize("lr", [1e-5, 1e-4, 1e-3])
def test_compiled_by_a_compiler_twins_predict_real_runs(recipe: str, lr: float) -> None:
    task = TASKS["perceptron"]
    torch.manual_seed(0)
    start = task.make_net()
    train_on(start, task.pretraining, 100, AdamW(start.parameters(), 1e-3).step)
    layers = many(compare(start, task.tuning, recipe, lr, 100).layers)
    assert len(layers) == 3
    for layer in layers:
        assert layer.fed.moved == pytest.approx(layer.real_fed.moved, abs=0.05)
        assert layer.fed.v_ratio == pytest.approx(layer.real_fed.v_ratio, abs=0.02)


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
        net = make_net()
        optimizer = AdamW(net.parameters(), 1e-3)
        settings: dict[str, Any] = {"recipes": recipe, "every_n_steps": 1}
        watched = Watched(net, optimizer, **settings)
        for index in range(13):
            if stops and index == 6:
                state = watched.monitor.state_dict()
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
