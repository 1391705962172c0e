"""Twins against runs that are really stored low, of which `benchmarks.twin_runs` measures all.

The real runs are plain torch: ``net.to(dtype)``, or rounding written by hand. `benchmarks.twins`
makes longer ones, and prints the tables of the documentation.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import statistics
from collections.abc import Callable

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.optim import AdamW

from benchmarks.twin_runs import WAYS, Comparison, Layer, Run, compare, train, watch
from benchmarks.twin_tasks import TASKS, Task, Transformer, symbol_worlds
from tests.twins.twinning import one_thread

on_one_thread = one_thread()

SMALL = {
    "perceptron": TASKS["perceptron"],
    "small transformer": Task(lambda: Transformer(depth=1), *symbol_worlds()),
}
MOSTLY_PERCEPTRON = [
    pytest.param(net, marks=() if net == "perceptron" else pytest.mark.slow) for net in SMALL
]
RATES = (1e-5, 1e-4, 3e-4, 1e-3)


@functools.cache
def tune(
    net: str, lr: float, recipe: str = "bf16-true", steps: int = 30, elements: int = 256
) -> Comparison:
    """Train in fp32, and fine-tune with twins and for real."""
    task = {**TASKS, **SMALL}[net]
    torch.manual_seed(0)
    start = task.make_net()
    optimizer = AdamW(start.parameters(), 1e-3)
    train(start, task.pretraining, steps, optimizer.step)
    return compare(start, task.tuning, lambda held: AdamW(held, lr), recipe, steps, elements)


def mean_error(layers: list[Layer], read: Callable[[Layer], tuple[float, float]]) -> float:
    return statistics.fmean(abs(a - b) for a, b in map(read, layers))


# --- a separate run


def assert_that_frozen_weights_agree(layers: list[Layer], at_most: float) -> None:
    many = [layer for layer in layers if layer.moved >= 64]
    assert mean_error(many, lambda x: (x.predicted.frozen, x.real.frozen)) <= at_most
    assert statistics.fmean(layer.real.frozen for layer in many) > 0.2


@pytest.mark.parametrize("net", SMALL)
def test_as_many_weights_are_frozen_as_in_a_separate_run(net: str) -> None:
    assert_that_frozen_weights_agree(tune(net, 1e-4).layers, 0.05)


def test_a_recipe_that_rounds_the_weights_alone_freezes_as_many_as_a_separate_run() -> None:
    assert_that_frozen_weights_agree(tune("perceptron", 1e-4, "bf16").layers, 0.05)


def test_stochastic_rounding_keeps_the_progress_of_a_separate_run() -> None:
    nearest, random = (tune("perceptron", 1e-4, recipe).layers for recipe in ("bf16", "bf16-sr"))
    large = [k for k, layer in enumerate(nearest) if layer.moved == 256]
    for side in ("predicted", "real"):
        assert all(getattr(random[k], side).kept > 0.75 for k in large)
        assert statistics.fmean(getattr(nearest[k], side).kept for k in large) < 0.6


# --- the gradients of the real run


def assert_that_progress_and_second_moments_agree(layers: list[Layer]) -> None:
    assert mean_error(layers, lambda x: (x.fed.kept, x.real_fed.kept)) <= 0.05
    octaves = [abs(math.log2(x.fed.v_ratio / x.real_fed.v_ratio)) for x in layers]
    assert sum(each <= 0.1 for each in octaves) >= 0.95 * len(octaves)


@pytest.mark.parametrize("net", SMALL)
def test_with_the_real_gradients_progress_and_second_moments_agree_with_the_real_run(
    net: str,
) -> None:
    assert_that_progress_and_second_moments_agree(tune(net, 1e-4).layers)


@pytest.mark.slow
def test_each_net_and_rate_is_predicted_from_its_own_and_from_the_real_gradients() -> None:
    """Check all figures of each run in one test: the runs take minutes."""
    runs = [tune(net, lr, steps=120).layers for net in TASKS for lr in RATES]
    for layers in runs:
        assert_that_progress_and_second_moments_agree(layers)
    layers = [layer for run in runs for layer in run]
    assert len(layers) > 200
    assert_that_frozen_weights_agree(layers, 0.03)
    predicted = [layer.predicted.kept for layer in layers]
    real = [layer.real.kept for layer in layers]
    assert spearmanr(predicted, real).statistic >= 0.9
    # Gradients of the real run go on where it was held up, and make up for a part.
    assert -0.2 < statistics.fmean(predicted) - statistics.fmean(real) < 0.02


@pytest.mark.parametrize("net", MOSTLY_PERCEPTRON)
def test_with_whole_layers_and_the_real_gradients_twin_and_run_are_equal(net: str) -> None:
    layers = tune(net, 1e-4, steps=10, elements=10**6).layers
    for layer in layers:
        # A few elements that another processor rounds in another way are allowed for.
        assert [*layer.fed] == pytest.approx([*layer.real_fed], abs=2e-3), layer.name
    assert len(layers) >= 10


@pytest.mark.parametrize("net", SMALL)
def test_the_figures_of_a_run_in_bf16_are_those_of_all_its_elements(net: str) -> None:
    known = [(x.now, x.real_fed) for x in tune(net, 1e-4).layers if x.now is not None]
    assert len(known) == len(tune(net, 1e-4).layers)
    assert statistics.fmean(abs(now.kept - real.kept) for now, real in known) <= 0.05
    assert statistics.fmean(abs(now.frozen - real.frozen) for now, real in known) <= 0.03
    assert statistics.fmean(now.frozen for now, _ in known) > 0.2


# --- fp16 with an eps that it stores as 0


@pytest.mark.parametrize("net", MOSTLY_PERCEPTRON)
def test_a_run_whose_twin_is_not_finite_ends_in_nan(net: str) -> None:
    outcome = tune(net, 1e-4, "fp16-true", steps=6)
    assert math.isfinite(outcome.loss)
    assert math.isnan(outcome.low_loss)
    assert statistics.fmean(x.predicted.nonfinite for x in outcome.layers) > 0.1
    assert statistics.fmean(x.real.nonfinite for x in outcome.layers) > 0.9


# --- what one rounding of the update cannot see


class Pair:
    """A layer in fp32, with a twin, and the same layer really in bf16; gradients are given."""

    def __init__(self, steps: int, weight_decay: float, foreach: bool) -> None:
        torch.manual_seed(0)
        net = nn.Linear(64, 64, bias=False)

        def make(held) -> torch.optim.Optimizer:
            return AdamW(held, lr=1e-3, weight_decay=weight_decay, foreach=foreach)

        self.high = Run(net, make)
        self.low = Run(copy.deepcopy(net).to(WAYS["bf16-true"].dtype), make)
        self._monitor = watch(self.high, steps, "bf16-true", 256)

    def step(self, gradient: Tensor) -> None:
        for run in (self.high, self.low):
            weight = run.parameters["weight"]
            weight.grad = gradient.to(weight.dtype, copy=True)
            run.step()

    def predict(self, metric: str) -> float:
        self._monitor.detach()
        assert self._monitor.latest is not None
        return self._monitor.latest.layers["weight"][f"{metric}/bf16-true"]


@pytest.mark.parametrize("foreach", [False, True])
def test_a_weight_decay_without_effect_in_the_real_run_has_none_in_the_twin(foreach: bool) -> None:
    pair = Pair(300, 1.0, foreach)
    start = pair.high.parameters["weight"].detach().norm().item()
    for _ in range(300):
        pair.step(torch.zeros(64, 64))
    weights, low = (run.parameters["weight"].detach().double() for run in (pair.high, pair.low))
    assert weights.norm() == pytest.approx(start * 0.999**300, rel=1e-3)  # 0.74
    assert low.norm() > start * 0.97  # lr · weight_decay = 0.001 is below 2**-9
    real = ((low - weights) * weights).sum() / weights.square().sum()
    assert real > 0.3
    assert pair.predict("decay_projection") == pytest.approx(real.item(), abs=0.01)


@pytest.mark.parametrize("foreach", [False, True])
def test_a_second_moment_that_only_rises_in_the_real_run_does_so_in_the_twin(foreach: bool) -> None:
    pair = Pair(250, 0.01, foreach)
    random = torch.Generator().manual_seed(0)
    seen = []
    for step in range(250):
        size = 1e-2 if step < 50 else 1e-4
        pair.step(size * torch.randn(64, 64, generator=random))
        seen.append(pair.low.state("weight", "exp_avg_sq"))
    assert all((now >= before).all() for before, now in itertools.pairwise(seen))
    v32 = pair.high.state("weight", "exp_avg_sq")
    real = (seen[-1] / v32).median().item()
    assert real > 1.15  # fp32 fell by 0.999**200 = 0.82
    assert pair.predict("exp_avg_sq_ratio") == pytest.approx(real, rel=0.03)
