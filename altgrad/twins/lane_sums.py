"""`LaneSums`: the sums by which the twins of a lane differ, from which figures follow.

A *twin* is a sample of each layer of the *run*, the training that is watched, stepped and stored as
a recipe says. The *baseline* is the twin in float32. A *lane* is a set of layers whose samples lie
in one tensor; all are measured together, with a row for each layer.

Read `lane_twins` first; `lane` comes next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from altgrad.measurement.catalogue import NOW
from altgrad.measurement.ratio_bins import count_ratios
from altgrad.measurement.twin_sums import (
    TwinColumns,
    TwinStack,
    find_state_ratios,
    measure_alone,
    measure_twins,
)
from altgrad.twins.run_weights import RunWeights


class LaneSums(NamedTuple):
    """The measurements of a `Lane` after a step whose figures are recorded, on the device.

    A lane has a *twin* for each recipe: a sample of each layer, stepped as the recipe says.

    Attributes:
        layers: Names of the layers.
        recipes: Names of the recipes.
        states: Names of the optimizer states that are compared.
        values: Sums and medians that compare each twin with one in float32, as
            `altgrad.measurement.twin_sums` says, float64 (layers, recipes, columns).
        counts: The counts by which the sample and the training differ,
            `altgrad.twins.self_check.COUNTS`, and the first four of them again for each average of
            the weights, float64 (layers, counts).
        sizes: Number of sampled elements of each layer.
        populations: Number of elements of each layer.
        blocks: Number of blocks in which the sample of each layer was drawn; 0 if single elements
            were drawn.
        bins: The ratios of each state to that in float32 in bins, float64 (layers, recipes, states,
            numbers). None if no other rank has a part of the samples.
    """

    layers: tuple[str, ...]
    recipes: tuple[str, ...]
    states: tuple[str, ...]
    values: Tensor
    counts: Tensor
    sizes: tuple[int, ...]
    populations: tuple[int, ...]
    blocks: tuple[int, ...]
    bins: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The measurements that go to the host: `values`, `counts`, and `bins` if there are any."""
        each = self.values, self.counts
        return each if self.bins is None else (*each, self.bins)


def compare_twins(
    run: RunWeights,
    baseline: TwinStack,
    stacks: Mapping[str, TwinStack],
    *,
    is_alone: bool,
    most_elements: int | None,
) -> tuple[tuple[str, ...], Tensor, Tensor | None]:
    """Return the sums by which twins differ from the baseline, from which figures follow.

    Args:
        run: The places of the sampled elements, by row.
        baseline: The weights and states of the twin in float32.
        stacks: Those of the other twins, by name of the recipe.
        is_alone: True if `stacks` has the training alone under `NOW`, or nothing, and no twin is
            left to compare it with.
        most_elements: Largest number of sampled elements of a layer on all ranks together; None if
            no other rank has a part of the samples.

    Returns:
        Names of the optimizer states that are compared; `LaneSums.values` and `LaneSums.bins`.
    """
    mask, twins = run.mask, [*stacks.values()]
    states = () if is_alone else tuple(baseline.states)
    if not is_alone:
        values = measure_twins(mask, baseline, twins, states, blocks=run.blocks)
    elif NOW in stacks:
        values = measure_alone(mask, stacks[NOW], run.has_gradient[run.rows], blocks=run.blocks)
    else:
        empty = (len(mask), 0, len(TwinColumns()))
        values = torch.zeros(empty, dtype=torch.float64, device=mask.device)
    if most_elements is None:
        return states, values, None
    ratios = find_state_ratios(mask, baseline, twins, states)
    return states, values, count_ratios(ratios, most_elements)
