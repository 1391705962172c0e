"""Ratios in bins: the median of the sum over ranks against the median of all ratios."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from altgrad.measurement.ratio_bins import count_numbers, count_ratios, find_medians
from tests.strategies import thorough

RATIOS = st.one_of(
    st.sampled_from([0.0, 1.0, math.nan]),
    st.floats(2.0**-12, 2.0**12),
    st.floats(-4.0, 4.0, allow_subnormal=False),
)


def find_lower_median(ratios: list[float]) -> float:
    known = sorted(each for each in ratios if not math.isnan(each))
    return known[(len(known) - 1) // 2] if known else math.nan


def merge(shards: list[list[float]], most: int) -> float:
    packed = sum(count_ratios(torch.tensor(each, dtype=torch.float64), most) for each in shards)
    return float(find_medians(packed.numpy(), most))


@thorough
@given(st.lists(st.lists(RATIOS, max_size=20), min_size=1, max_size=4))
def test_the_median_over_ranks_is_in_the_bin_of_the_median_of_all_ratios(shards) -> None:
    truth = find_lower_median([ratio for shard in shards for ratio in shard])
    found = merge(shards, 80)
    if math.isnan(truth) or truth < 0:
        assert math.isnan(found)
    elif truth in (0.0, 1.0):
        assert found == truth
    else:
        octaves = abs(math.log2(truth))
        # Half a bin, whose width grows with the square of 1 + octaves / 4.
        assert abs(math.log2(found / truth)) <= (1 + (octaves + 1) / 4) ** 2 / 32 * 1.3


@pytest.mark.parametrize("most", [1, 63, 256, 1023, 10**6])
def test_counts_up_to_the_most_do_not_run_into_each_other(most: int) -> None:
    many = min(most, 1024)
    ratios = torch.logspace(-9, 9, many, base=2, dtype=torch.float64)
    packed = [count_ratios(part, most).numpy() for part in ratios.chunk(3)]
    assert packed[0].shape == (count_numbers(most),)
    whole = count_ratios(ratios, most).numpy()
    np.testing.assert_array_equal(sum(packed), whole)
    same = count_ratios(torch.full((many,), 0.7, dtype=torch.float64), most).numpy()
    assert find_medians(same, most) == pytest.approx(0.7, rel=0.03)
    assert whole.max() <= 2.0**53


def test_each_row_has_a_median_and_the_bins_around_one_are_narrow() -> None:
    ratios = torch.tensor([[[1.11] * 5], [[0.5, 2.0, 6.2, math.inf, -1.0]]], dtype=torch.float64)
    medians = find_medians(count_ratios(ratios, 256).numpy(), 256)
    assert medians.shape == (2, 1)
    assert medians[0, 0] == pytest.approx(1.11, rel=0.025)
    assert medians[1, 0] == pytest.approx(2.0, rel=0.04)
