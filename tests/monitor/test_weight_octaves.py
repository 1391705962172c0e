"""`weight_octaves` against numpy's histogram."""

import math

import numpy as np
import pytest
import torch

from altgrad.distributed.peers import Alone
from altgrad.monitor.weight_octaves import weight_octaves

ALONE = Alone()


def test_octaves_equal_those_of_numpy() -> None:
    torch.manual_seed(0)
    weights = torch.randn(900) * 2.0 ** torch.randint(-8, 4, (900,))
    weights[:5] = torch.tensor([0.0, torch.nan, torch.inf, 1.0, -0.5])
    histogram = weight_octaves({"a": weights, "b": torch.tensor([2.0, 3.0]).half()}, ALONE)
    finite = [abs(x) for x in weights.tolist() if math.isfinite(x) and x] + [2.0, 3.0]
    edges = 2.0 ** (histogram.first + np.arange(len(histogram.counts) + 1))
    assert histogram.counts == np.histogram(finite, edges)[0].tolist()
    assert sum(histogram.counts) == 899


def test_octaves_of_a_sample_are_weighted_to_all_elements() -> None:
    torch.manual_seed(0)
    large = torch.full((30, 1000), 0.75)
    large[:10] = 3.0
    counts = weight_octaves({"large": large, "none": torch.ones(0)}, ALONE).counts
    assert sum(counts) == pytest.approx(30_000)
    assert counts[64 + 1] == pytest.approx(10_000, rel=0.2)  # 2 to 4


def test_octaves_beyond_the_ends_are_in_the_outer_bins() -> None:
    tiny = torch.tensor([2.0**-149, 2.0**127])
    histogram = weight_octaves({"w": tiny}, ALONE)
    assert histogram.counts[0] == histogram.counts[-1] == 1
    assert sum(weight_octaves({}, ALONE).counts) == 0
