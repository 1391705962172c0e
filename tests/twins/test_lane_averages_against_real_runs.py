"""Averages of twins against averages that are really kept in bf16.

`benchmarks.averages` makes longer runs, and prints the table of the documentation.
"""

from __future__ import annotations

import functools

import pytest
from torch import nn

from benchmarks.averages import DECAYS, Layer, compare_averages, pretrain
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


@functools.cache
def start_from(net: str) -> nn.Module:
    return pretrain({**TASKS, **SMALL}[net], 20)


def compare(net: str, decay: float, steps: int = 20, elements: int = 256) -> list[Layer]:
    task = {**TASKS, **SMALL}[net]
    return compare_averages(start_from(net), task, 3e-4, decay, steps, elements)


def weigh(layers: list[Layer], side: str) -> float:
    return sum(getattr(layer, side).error for layer in layers) / len(layers)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("net", MOSTLY_PERCEPTRON)
def test_the_error_of_an_average_in_bf16_is_that_of_a_separate_run(net: str, decay: float) -> None:
    layers = compare(net, decay)
    assert len(layers) >= 4
    assert weigh(layers, "predicted") == pytest.approx(weigh(layers, "real"), rel=0.15)
    for layer in layers:
        assert layer.fed.error == pytest.approx(layer.real_fed.error, rel=0.2), layer.name
        assert layer.fed.ratio == pytest.approx(layer.real_fed.ratio, abs=0.01), layer.name


@pytest.mark.parametrize("net", MOSTLY_PERCEPTRON)
def test_with_whole_layers_and_the_real_gradients_both_averages_are_equal(net: str) -> None:
    for layer in compare(net, 0.99, steps=10, elements=10**6):
        # A few elements that another processor rounds in another way are allowed for.
        assert [*layer.fed] == pytest.approx([*layer.real_fed], rel=2e-3), layer.name


@pytest.mark.slow
@pytest.mark.parametrize("net", TASKS)
def test_the_error_of_a_longer_run_is_predicted(net: str) -> None:
    layers = compare(net, 0.99, steps=120)
    assert weigh(layers, "predicted") == pytest.approx(weigh(layers, "real"), rel=0.3)
    assert weigh(layers, "real") > 0.01
