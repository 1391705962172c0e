"""Twins of random weights, for tests of their figures."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from altgrad.measurement.twin_figures import TwinValues
from altgrad.measurement.twin_sums import TwinStack, measure_twins

STATES = ("exp_avg", "exp_avg_sq")
RECIPES = ("low", "lower")


def make_stacks(
    layers: int,
    width: int,
    seed: int,
    *,
    coarseness: Sequence[float] = (0.02, 0.3),
    alike: int = 1,
) -> tuple[TwinStack, list[TwinStack]]:
    """Make fp32 and twins that round what it does; so many neighbours have steps of one size."""
    generator = torch.Generator().manual_seed(seed)
    start, *noise = (
        torch.randn(layers, width, generator=generator, dtype=torch.float64) for _ in range(5)
    )
    size = ((noise[1] / 3).exp() * (noise[2] < 1))[:, ::alike].repeat_interleave(alike, dim=1)
    step = 0.1 * noise[0] * size[:, :width]
    window, before = start + 0.3 * step, start + 0.8 * step
    states = {name: noise[3] ** (k + 1) for k, name in enumerate(STATES)}
    weights = start, window, before, start + step
    high = TwinStack(*weights, step != 0, step != 0, states)
    twins = []
    for grid in coarseness:
        low = [start, *(start + (each - start).div(grid).round() * grid for each in weights[1:])]
        rounded = {name: state.div(grid).round() * grid for name, state in states.items()}
        twins.append(TwinStack(*low, low[3] != low[1], low[3] != start, rounded))
    return high, twins


def repeat(stack: TwinStack, layers: int) -> TwinStack:
    """Return layers that are all like the only one."""
    *weights, states = stack
    rows = (each.expand(layers, -1) for each in weights)
    return TwinStack(*rows, {name: each.expand(layers, -1) for name, each in states.items()})


def flatten(stack: TwinStack) -> TwinStack:
    """Return one layer that has the elements of all."""
    *weights, states = stack
    rows = (each.reshape(1, -1) for each in weights)
    return TwinStack(*rows, {name: each.reshape(1, -1) for name, each in states.items()})


def choose(stack: TwinStack, indices: Tensor) -> TwinStack:
    """Return the elements at some indices, for each layer a row of them."""
    *weights, states = stack
    return TwinStack(
        *(each.gather(1, indices) for each in weights),
        {name: each.gather(1, indices) for name, each in states.items()},
    )


def measure_sample(
    layers: Sequence[str],
    high: TwinStack,
    twins: Sequence[TwinStack],
    populations: Sequence[int],
    *,
    recipes: Sequence[str] = RECIPES,
    states: Sequence[str] = STATES,
    block: int = 1,
    sizes: Sequence[int] | None = None,
) -> TwinValues:
    """Return the sums of twins as a step has them on the host."""
    width = high.now.shape[1]
    sizes = [width] * len(layers) if sizes is None else sizes
    mask = torch.arange(width) < torch.tensor(sizes).view(-1, 1)
    blocks = [block] * len(layers)
    values = measure_twins(mask, high, twins, states, blocks=blocks).numpy()
    counts = [-(-size // block) if block > 1 else 0 for size in sizes]
    return TwinValues.read(
        (layers, recipes, states), values, sizes=sizes, populations=populations, blocks=counts
    )


def measure_layers(
    layers: Sequence[str], seed: int = 0, width: int = 256, **options: Any
) -> TwinValues:
    """Return the sums of some layers whose populations differ."""
    high, twins = make_stacks(len(layers), width, seed)
    populations = [width * (3 * k + 2) + k for k in range(len(layers))]
    return measure_sample(layers, high, twins, populations, **options)
