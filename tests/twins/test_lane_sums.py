"""`LaneSums`: the sums by which twins differ, for all layers of a lane."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from altgrad.measurement.catalogue import NOW
from altgrad.measurement.ratio_bins import count_numbers
from altgrad.measurement.twin_sums import TwinColumns, TwinStack, measure_alone, measure_twins
from altgrad.twins.lane_sums import LaneSums, compare_twins
from altgrad.twins.run_weights import RunWeights
from tests.twins.planned import KIND, Planned


def make_run() -> RunWeights:
    planned, run = Planned(), RunWeights(KIND)
    planned.arrange("a", "b")
    run.rearrange(planned.plan.layers, planned.plan.layout)
    run.note_gradients(torch.ones_like(run.values), None)
    return run


def make_stack(run: RunWeights, factor: float) -> TwinStack:
    now, still = run.values[run.rows].double(), torch.zeros_like(run.mask)
    state = {"exp_avg": factor * torch.ones_like(now)}
    return TwinStack(now, now, now, factor * now, still, still, state)


def compare(run: RunWeights, **options: object) -> tuple[tuple[str, ...], Tensor, Tensor | None]:
    stacks = {"bf16": make_stack(run, 0.5), NOW: make_stack(run, 0.25)}
    if options.get("is_alone"):
        del stacks["bf16"]
    settings = {"is_alone": False, "most_elements": None} | options
    return compare_twins(run, make_stack(run, 2.0), stacks, **settings)  # type: ignore[arg-type]


def test_twins_are_compared_with_the_baseline() -> None:
    run = make_run()
    states, values, bins = compare(run)
    twins = [make_stack(run, factor) for factor in (0.5, 0.25)]
    expected = measure_twins(run.mask, make_stack(run, 2.0), twins, states, blocks=run.blocks)
    assert (states, bins) == (("exp_avg",), None)
    assert torch.equal(values.nan_to_num(-1), expected.nan_to_num(-1))
    assert values.shape[:2] == (2, 2)  # layers, recipes


def test_a_run_that_is_left_alone_has_its_own_sums() -> None:
    run = make_run()
    states, values, _ = compare(run, is_alone=True)
    has_gradient = run.has_gradient[run.rows]
    expected = measure_alone(run.mask, make_stack(run, 0.25), has_gradient, blocks=run.blocks)
    assert states == ()
    assert torch.equal(values.nan_to_num(-1), expected.nan_to_num(-1))


def test_without_the_run_nothing_is_left_to_measure() -> None:
    run = make_run()
    _, values, _ = compare_twins(run, make_stack(run, 2.0), {}, is_alone=True, most_elements=None)
    assert values.shape == (2, 0, len(TwinColumns()))


@pytest.mark.parametrize(("is_alone", "states"), [(False, 1), (True, 0)])
def test_ranks_that_share_layers_count_ratios_of_states(is_alone: bool, states: int) -> None:
    run = make_run()
    _, _, bins = compare(run, is_alone=is_alone, most_elements=256)
    assert bins is not None
    assert bins.shape == (2, 2 - is_alone, states, count_numbers(256))


def test_bins_go_to_the_host_if_there_are_any() -> None:
    one = torch.zeros(1)
    sums = LaneSums((), (), (), one, one, (), (), ())
    assert (len(sums.tensors), len(sums._replace(bins=one).tensors)) == (2, 3)
